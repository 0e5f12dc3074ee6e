"""What was read, and what became of it: nothing is dropped, skipped or cut without being counted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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

    def file(
        self, key: str, name: str, sha256: str | None, rows: int, columns: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """A file of `rows` rows was read for the setting `key`, which maps its columns if `columns` are given.

        Returns:
            Its entry, in which the number of rows may grow.
        """
        mapped = {} if columns is None else {"columns": dict(columns)}
        entry = {"name": name, "sha256": sha256, "rows": rows, **mapped}
        self._files.setdefault(key, []).append(entry)
        return entry

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

    def take(self, other: Tally) -> None:
        """Add the counts, places and notes of another one, of rows that were not counted here."""
        for (key, reason), count in other._counts.items():
            self.add(key, reason, "", count)
            for where in other._places[key, reason]:
                self.add(key, reason, where, 0)
        for entry, total in other._totals.items():
            self._totals[entry] = self._totals.get(entry, 0) + total
        for key, texts in other._notes.items():
            self._notes.setdefault(key, []).extend(texts)

    def counted(self, key: str) -> dict[str, list[int]]:
        """Of a setting the counts by reason and what they are a part of, 0 if that is not known."""
        reasons = dict.fromkeys(reason for name, reason in [*self._counts, *self._totals] if name == key)
        return {name: [self._counts.get((key, name), 0), self._totals.get((key, name), 0)] for name in reasons}

    def restore(self, key: str, counted: Mapping[str, Sequence[int]]) -> None:
        """The inverse of `counted`, without the places."""
        for reason, (count, total) in counted.items():
            if count:
                self.add(key, reason, "", count)
            if total:
                self.out_of(key, reason, total)

    def lines(self) -> list[str]:
        """A line for the user per setting and reason, in the order of their first appearance, then the notes."""
        counted = [self._line(entry) for entry in self._counts]
        return counted + [f"{key}: {text}" for key, texts in self._notes.items() for text in texts]

    def as_dict(self) -> dict[str, Any]:
        """For ``summary.json``: ``files`` (name, sha256, rows and mapped columns of each), ``rows`` (counts by
        reason) and ``notes``.

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
