"""What was read, and what became of it: nothing is dropped, skipped or cut without being counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PLACES = 3  # named in a line


class Tally:
    """Counts per setting (``task.data``, ``alignment.eval_data``, ...) and reason, with the first places.

    A reason is worded so that it can follow a number: ``pairs skipped: one side is empty``.
    """

    def __init__(self) -> None:
        self._files: dict[str, list[dict[str, Any]]] = {}
        self._counts: dict[tuple[str, str], int] = {}
        self._places: dict[tuple[str, str], list[str]] = {}
        self._totals: dict[tuple[str, str], int] = {}
        self._notes: dict[str, list[str]] = {}

    def file(self, key: str, name: str, sha256: str | None, rows: int) -> None:
        """A file of `rows` rows was read for the setting `key`."""
        self._files.setdefault(key, []).append({"name": name, "sha256": sha256, "rows": rows})

    def add(self, key: str, reason: str, where: str, count: int = 1) -> None:
        """`count` rows were dropped, skipped or cut; `where` is the place of the first of them."""
        entry = (key, reason)
        self._counts[entry] = self._counts.get(entry, 0) + count
        places = self._places.setdefault(entry, [])
        if where and len(places) <= PLACES and where not in places:
            places.append(where)

    def out_of(self, key: str, reason: str, total: int) -> None:
        """What is counted under `reason` is a part of `total`."""
        self._totals[key, reason] = total

    def note(self, key: str, text: str) -> None:
        """Something to say that is no count, such as a language without a pair."""
        self._notes.setdefault(key, []).append(text)

    def lines(self) -> list[str]:
        """A line for the user per setting and reason, in the order of their first appearance, then the notes."""
        counted = [self._line(entry) for entry in self._counts]
        return counted + [f"{key}: {text}" for key, texts in self._notes.items() for text in texts]

    def as_dict(self) -> dict[str, Any]:
        """For ``summary.json``: ``files`` (name, sha256 and rows of each), ``rows`` (counts by reason) and ``notes``.

        Each is a dictionary by setting; that of ``rows`` holds ``{reason: count}``.
        """
        rows: dict[str, dict[str, int]] = {}
        for (key, reason), count in self._counts.items():
            rows.setdefault(key, {})[reason] = count
        return {"files": self._files, "rows": rows, "notes": self._notes}

    def _line(self, entry: tuple[str, str]) -> str:
        key, reason = entry
        places = listed_places(self._places[entry])
        of = f" of {self._totals[entry]:,}" if entry in self._totals else ""
        return f"{key}: {self._counts[entry]:,}{of} {reason}" + (f" ({places})" if places else "")


def listed_places(places: Iterable[str]) -> str:
    """``a.jsonl, line 3; line 9; ...``: the first of the places, a file named once for those that follow."""
    different = [*dict.fromkeys(places)]
    words: list[str] = []
    file = ""
    for place in different[:PLACES]:
        name, _, line = place.rpartition(", ")
        words.append(line if name and name == file else place)
        file = name
    return "; ".join([*words, *(["..."] if len(different) > PLACES else [])])
