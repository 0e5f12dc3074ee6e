"""The tally: what was read and left out, in a line for the user and in numbers for the summary."""

from __future__ import annotations

import json

from fastalign.data.tally import Tally, listed_places


def test_nothing_to_say():
    tally = Tally()
    assert tally.lines() == []
    assert tally.as_dict() == {"files": {}, "rows": {}, "notes": {}}
    tally.out_of("task.data", "rows cut", 7)
    tally.file("task.data", "a.jsonl", "ab12", 7)
    assert tally.lines() == [], "a total, or a file that was read, is nothing to worry about"


def test_a_line_names_the_count_the_total_the_reason_and_the_first_places():
    tally = Tally()
    for number in (3, 9, 9, 17, 21):
        tally.add("alignment.data", "pairs skipped: a side is empty", f"pairs.jsonl, line {number}")
    tally.out_of("alignment.data", "pairs skipped: a side is empty", 1400)
    tally.add("task.data", "rows cut", "a.jsonl, line 2", count=1200)
    tally.add("task.data", "rows lost", "")
    tally.note("alignment.data", "no pair for xx: all its sentences are empty")
    assert tally.lines() == [
        "alignment.data: 5 of 1,400 pairs skipped: a side is empty (pairs.jsonl, line 3; line 9; line 17; ...)",
        "task.data: 1,200 rows cut (a.jsonl, line 2)",
        "task.data: 1 rows lost",
        "alignment.data: no pair for xx: all its sentences are empty",
    ]


def test_settings_and_reasons_are_counted_apart():
    tally = Tally()
    for key, reason in (("a", "x"), ("b", "x"), ("a", "y"), ("a", "x")):
        tally.add(key, reason, "f, line 1")
    assert tally.as_dict()["rows"] == {"a": {"x": 2, "y": 1}, "b": {"x": 1}}


def test_the_summary_gets_plain_data():
    tally = Tally()
    tally.file("task.data", "a.jsonl", "ab12", 7)
    tally.file("task.data", "some/set", None, 2)
    tally.add("task.data", "rows cut", "a.jsonl, line 2", count=3)
    tally.note("task.data", "hm")
    assert json.loads(json.dumps(tally.as_dict())) == {
        "files": {
            "task.data": [
                {"name": "a.jsonl", "sha256": "ab12", "rows": 7},
                {"name": "some/set", "sha256": None, "rows": 2},
            ]
        },
        "rows": {"task.data": {"rows cut": 3}},
        "notes": {"task.data": ["hm"]},
    }


def test_a_file_is_named_once_for_the_places_that_follow():
    places = ["a, line 1", "a, line 1", "a, line 2", "b, line 2"]
    assert listed_places(places) == "a, line 1; line 2; b, line 2"
    assert listed_places([*places, "b, line 3"]) == "a, line 1; line 2; b, line 2; ..."
    assert listed_places(["odd", "odder"]) == "odd; odder"
    assert listed_places([]) == ""
