"""The demo corpus is deterministic, its labels are exact, and no test sentence can be learnt by heart."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest

from fastalign.config import TaskConfig
from fastalign.data.demo_corpus import (
    LANGUAGES,
    meanings,
    parallel_rows,
    phrases,
    plain_text,
    slot_name,
    task_rows,
    write,
)
from fastalign.data.parallel import read_pairs
from fastalign.data.templates import TaskReader, bio_spans

ROOT = Path(__file__).resolve().parents[1]
INTENTS = {"set_alarm", "get_weather", "play_music", "turn_on_device", "send_message", "add_to_list"}
MOST = {"train": 632, "test": 150, "parallel": 648, "plain": 11844}
Row = dict[str, Any]


@cache
def all_rows(split: Literal["train", "test"]) -> list[Row]:
    """Every row of a split, in every language."""
    return task_rows(split, LANGUAGES, MOST[split], seed=0)


@cache
def all_pairs() -> list[dict[str, str]]:
    return parallel_rows(MOST["parallel"], seed=0)


@cache
def all_plain(language: str) -> list[str]:
    return plain_text(language, MOST["plain"], seed=0)


def shape(row: Row) -> str:
    """The row with its values taken out: what its pattern was."""
    tagged = zip(row["tokens"], row["slots"], strict=True)
    return " ".join(tag if tag[0] == "B" else word for word, tag in tagged if tag[0] != "I")


def values(rows: list[Row], language: str) -> set[tuple[str, str]]:
    """(slot type, words) of all the values in the rows of a language."""
    return {
        (kind, " ".join(row["tokens"][first:end]))
        for row in rows
        if row["lang"] == language
        for kind, first, end in bio_spans(row["slots"])
    }


def by_id(rows: list[Row]) -> dict[str, dict[str, Row]]:
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        found[row["id"]][row["lang"]] = row
    return found


def sentences(rows: list[Row], language: str) -> list[str]:
    return [" ".join(row["tokens"]) for row in rows if row["lang"] == language]


def test_draws_are_the_same_in_every_process():
    code = (
        "from fastalign.data.demo_corpus import *\n"
        "print(ascii([task_rows('test', ['tr'], 3, 1), parallel_rows(3, 1), plain_text('hi', 3, 1)]))"
    )
    here = ascii([task_rows("test", ["tr"], 3, 1), parallel_rows(3, 1), plain_text("hi", 3, 1)])
    for hash_seed in ("1", "2"):
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == here


def test_a_draw_depends_on_its_seed_and_not_on_the_languages():
    assert task_rows("train", ["en"], 50, 0) == [
        row for row in task_rows("train", ["de", "en"], 50, 0) if row["lang"] == "en"
    ]
    assert task_rows("train", ["en"], 50, 0) != task_rows("train", ["en"], 50, 1)
    assert parallel_rows(50, 0) != parallel_rows(50, 1)
    assert plain_text("en", 50, 0) != plain_text("en", 50, 1)


def test_plain_texts_are_not_parallel():
    """Most sentences of one language have no translation among those of another."""
    translation = {meaning.text("en"): meaning.text("de") for meaning in meanings("task", "align", "test")}
    english, german = plain_text("en", 2000, 0), set(plain_text("de", 2000, 0))
    assert sum(translation[sentence] in german for sentence in english) < 500  # 2000 * 2000 / 11844 by chance
    assert sum(translation[a] == b for a, b in zip(english, plain_text("de", 2000, 0), strict=True)) < 20


@pytest.mark.parametrize("split", ["train", "test"])
def test_tags_are_bio_and_the_spans_are_the_values(split: Literal["train", "test"]):
    known = {
        (language, value.kind, " ".join(value.words[language])) for value in phrases("values") for language in LANGUAGES
    }
    for row in all_rows(split):
        assert len(row["tokens"]) == len(row["slots"])
        for before, tag in zip(["O", *row["slots"]], row["slots"], strict=False):
            assert re.fullmatch(r"O|[BI]-[a-z]+", tag)
            assert tag[0] != "I" or before[1:] == tag[1:]
        spans = bio_spans(row["slots"])
        assert len(spans) == 2
        for kind, first, end in spans:
            assert (row["lang"], kind, " ".join(row["tokens"][first:end])) in known


def test_an_example_is_labelled_as_by_hand():
    meaning = next(m for m in meanings("task") if m.text("en") == "wake me up at seven thirty on monday")
    assert list(zip(meaning.tokens("tr"), meaning.tags("tr"), strict=True)) == [
        ("pazartesi", "B-day"),
        ("günü", "I-day"),
        ("yedi", "B-time"),
        ("buçukta", "I-time"),
        ("beni", "O"),
        ("uyandır", "O"),
    ]


@pytest.mark.parametrize("split", ["train", "test"])
def test_rows_of_an_id_are_translations(split: Literal["train", "test"]):
    """The same intent and slot types, and value by value the translation that the table has."""
    translations = {tuple(" ".join(value.words[language]) for language in LANGUAGES) for value in phrases("values")}
    for rows in by_id(all_rows(split)).values():
        assert set(rows) == set(LANGUAGES)
        assert len({row["intent"] for row in rows.values()}) == 1
        assert len({tuple(sorted(kind for kind, _, _ in bio_spans(r["slots"]))) for r in rows.values()}) == 1
        filled = [
            {kind: " ".join(rows[language]["tokens"][a:b]) for kind, a, b in bio_spans(rows[language]["slots"])}
            for language in LANGUAGES
        ]
        for kind in filled[0]:
            assert tuple(values[kind] for values in filled) in translations


def test_patterns_of_an_intent_have_the_same_slots_in_every_language():
    slots: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for pattern in phrases("patterns"):
        for language in LANGUAGES:
            slots[pattern.kind].add(tuple(sorted(filter(None, map(slot_name, pattern.words[language])))))
    assert set(slots) == INTENTS
    assert all(len(found) == 1 for found in slots.values()), slots


@pytest.mark.parametrize("language", LANGUAGES)
def test_partitions_share_no_pattern_and_no_value(language: str):
    """Read off the rows; the sentences of the pairs are recognised among all that could be made."""
    train, test = all_rows("train"), all_rows("test")
    labelled = {
        m.text(language): {"lang": language, "tokens": m.tokens(language), "slots": m.tags(language)}
        for m in meanings("task", "align", "test")
    }
    align = [labelled[row[language]] for row in all_pairs()]
    shapes = [{shape(row) for row in rows if row["lang"] == language} for rows in (train, align, test)]
    assert [len(found) for found in shapes] == [12, 18, 6]
    assert len(set.union(*shapes)) == 36
    parts = [values(rows, language) for rows in (train, align, test)]
    assert min(Counter(kind for kind, _ in parts[0]).values()) >= 7
    assert min(Counter(kind for kind, _ in parts[1]).values()) >= 6
    assert min(Counter(kind for kind, _ in parts[2]).values()) >= 5
    assert len(set.union(*parts)) == sum(map(len, parts)) == len(phrases("values"))


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_test_sentence_is_anywhere_else(language: str):
    test = set(sentences(all_rows("test"), language))
    assert len(test) == MOST["test"]
    assert test.isdisjoint(all_plain(language))
    assert test.isdisjoint(row[language] for row in all_pairs())
    assert test.isdisjoint(sentences(all_rows("train"), language))


@pytest.mark.parametrize("language", LANGUAGES)
def test_plain_text_shows_the_words_of_all_sets(language: str):
    """Also those of the test set: a word that the model never read could not be learnt from anything."""
    read = {word for sentence in plain_text(language, 2000, 0) for word in sentence.split()}
    for rows in (all_rows("train"), all_rows("test")):
        assert read >= {word for row in rows if row["lang"] == language for word in row["tokens"]}


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_do_not_repeat(language: str):
    for found in (
        sentences(all_rows("train"), language),
        sentences(all_rows("test"), language),
        [row[language] for row in all_pairs()],
        all_plain(language),
    ):
        assert len(set(found)) == len(found)
    assert len({row["_id"] for row in all_pairs()}) == len(all_pairs())


@pytest.mark.parametrize("language", LANGUAGES)
def test_sentences_are_plain_words_in_the_script_of_the_language(language: str):
    letters = {"ru": "CYRILLIC", "hi": "DEVANAGARI"}.get(language, "LATIN")
    for sentence in all_plain(language):
        assert sentence == unicodedata.normalize("NFC", sentence).lower() == " ".join(sentence.split())
    found = {character for sentence in all_plain(language) for character in sentence if character != " "}
    for character in found:
        assert unicodedata.name(character).startswith(letters)
        assert unicodedata.category(character)[0] in "LM"


@pytest.mark.parametrize(("split", "n"), [("train", 400), ("test", 100)])
def test_every_intent_and_slot_type_is_in_each_split(split: Literal["train", "test"], n: int):
    types = {value.kind for value in phrases("values")}
    for language in LANGUAGES:
        rows = task_rows(split, [language], n, seed=0)
        assert {row["intent"] for row in rows} == INTENTS
        assert {kind for kind, _ in values(rows, language)} == types


def test_sizes():
    assert len(task_rows("train", ["en"], 400, 0)) == 400
    assert len(task_rows("test", LANGUAGES, 100, 0)) == 600
    assert len(parallel_rows(400, 0)) == 400
    assert len(plain_text("ru", 2000, 0)) == 2000
    assert task_rows("train", ["en"], 0, 0) == []


def test_too_many_and_unknown_are_refused():
    with pytest.raises(ValueError, match="at most 632 "):
        task_rows("train", ["en"], 633, 0)
    with pytest.raises(ValueError, match="at most 150 "):
        task_rows("test", ["en", "de"], 151, 0)
    with pytest.raises(ValueError, match="at most 648 "):
        parallel_rows(649, 0)
    with pytest.raises(ValueError, match="at most 11844 "):
        plain_text("es", 11845, 0)
    with pytest.raises(ValueError, match="not -1"):
        parallel_rows(-1, 0)
    with pytest.raises(ValueError, match="'fr'"):
        plain_text("fr", 1, 0)
    with pytest.raises(ValueError, match="'dev'"):
        task_rows("dev", ["en"], 1, 0)  # pyright: ignore[reportArgumentType]


def test_the_files_are_what_the_readers_read(tmp_path: Path):
    paths = write(tmp_path / "new" / "folder", seed=3, train=40, test=10, parallel=20, text=30)
    assert set(paths) == {"task.train", "task.test", "parallel", *(f"lm.{code}" for code in LANGUAGES)}
    train = [json.loads(line) for line in paths["task.train"].read_text(encoding="utf-8").splitlines()]
    assert train == task_rows("train", ["en"], 40, seed=3)
    for language in LANGUAGES:
        lines = paths[f"lm.{language}"].read_text(encoding="utf-8").splitlines()
        assert lines == plain_text(language, 30, seed=3)
    reader = TaskReader(TaskConfig(template="slots"))
    assert {example.language for example in reader.read(str(paths["task.train"]), "task.train")} == {"en"}
    assert Counter(example.language for example in reader.read(str(paths["task.test"]), "task.eval")) == {
        language: 10 for language in LANGUAGES
    }
    pairs = read_pairs(str(paths["parallel"]), "to_english", "alignment.train")
    assert Counter(pair.direction for pair in pairs) == {code: 20 for code in LANGUAGES if code != "en"}
