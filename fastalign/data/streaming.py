"""Training rows of data that do not fit into memory: read in blocks, forgotten when they are done with.

A block is so many rows of the source, converted like a file's, in the order of a `Sampler` of its own for one epoch.
So the item at a position is a pure function of (seed, content of the source, position), as without streaming, but to
be at a position one has to have read up to it, or to have saved the place of its block. When the source ends, it
begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from fastalign.config import DataSource
from fastalign.data.columns import select
from fastalign.data.feed import Feed
from fastalign.data.files import Source
from fastalign.data.sampling import Sampler
from fastalign.data.tally import Tally
from fastalign.data.text import shown
from fastalign.errors import DataError

BLOCK = 1_000  # rows of the source

Check = Callable[[list[Any], Tally], None]


class Reader(Protocol):
    """Makes items of a block's rows.

    `types`: what the first block has decided for all others; saved with the place.
    """

    types: list[str] | None

    def block(self, source: Source, number: int, first_row: int, key: str, tally: Tally) -> list[Any]:
        """The items of block `number`, whose first row has this number in the source; none of them may be usable."""
        ...


@dataclass
class _Block:
    number: int
    start: int  # position of its first item
    items: list[Any]
    sampler: Sampler
    place: dict[str, Any]  # from which it was read

    @property
    def end(self) -> int:
        return self.start + len(self.items)


class StreamedRows:
    """Stands for the training rows of a `Stream` and for their `Sampler`: a row's number is its position in the run.

    Args:
        source: one source. reader: makes items of rows. language: of an item. key, tally: as for `read_sources`.
        temperature, name: of the `Sampler`s.
    """

    def __init__(
        self,
        source: DataSource,
        reader: Reader,
        language: Callable[[Any], str],
        temperature: float | Literal["uniform"],
        key: str,
        name: str,
        tally: Tally,
    ):
        self._source, self._reader, self._language = source, reader, language
        self._temperature: float | Literal["uniform"] = temperature
        self._key, self._name, self._tally = key, name, tally
        self._feed = Feed(source, key)
        self._file = tally.file(key, self._feed.name, self._feed.identity, 0, source.columns)
        tally.note(key, "streamed, so that nothing is held out of it")
        self._checks: list[Check] = []
        self._counted = 0  # blocks whose skipped rows are in the tally
        self._forget()

    def begin(self, seed: int, kept: int, place: Mapping[str, Any] | None) -> None:
        """Read the first block.

        Args:
            seed: of the run. kept: positions to remember behind those that were asked for last.
            place: from which to go on, as `place` gave it; one that cannot be used is told, and the rows before it
                are read.
        """
        self._seed, self._kept = seed, kept
        if place is not None and place.get("identity") == self._feed.identity:
            try:
                self._go_to(place)
                self._read_block()
                return
            except Exception as error:  # of `datasets`, or because someone has changed the file
                why = shown(" ".join(str(error).split()) or type(error).__name__, 160)
                self._tally.note(self._key, f"the saved place cannot be used ({why}): reading from the beginning")
                self._reader.types = None
                self._forget()
        self._read_block()

    @property
    def sample(self) -> list[Any]:
        """The items of the oldest block that is remembered; before the first step, those it begins with."""
        return self._blocks[0].items

    def add_check(self, check: Check) -> None:
        """Have the items of each block looked at, also of those that are there."""
        self._checks.append(check)
        for block in self._blocks:
            self._look_at(block.items, check)

    def rows(self, start: int, stop: int) -> list[int]:
        """The positions themselves, once the rows up to there are read."""
        self._reach(start, stop)
        return [*range(start, stop)]

    def __getitem__(self, position: int) -> Any:
        block = self._block_of(position)
        if block is None:
            raise IndexError(position)
        [row] = block.sampler.rows(position - block.start, position - block.start + 1)
        return block.items[row]

    def where(self, position: int) -> str:
        """File and line of an item; how far into the stream it was, where that is forgotten."""
        return self[position].where if self._block_of(position) else f"row {position + 1:,} of the stream"

    def place(self, position: int) -> dict[str, Any]:
        """From where to read on to be at a position; to be saved as JSON."""
        if position == self._blocks[-1].end:  # nothing is read that may never be needed
            return self._place()
        self._reach(position, position + 1)
        block = self._block_of(position)
        assert block is not None
        return block.place

    def _block_of(self, position: int) -> _Block | None:
        return next((block for block in self._blocks if block.start <= position < block.end), None)

    def _reach(self, start: int, stop: int) -> None:
        if start < self._blocks[0].start:
            self._forget()
            self._read_block()
        while self._blocks[-1].end < stop:
            self._read_block()
            while len(self._blocks) > 1 and self._blocks[0].end <= start - self._kept:
                del self._blocks[0]

    def _forget(self) -> None:
        """Be at the beginning again."""
        self._blocks: list[_Block] = []
        self._number = self._start = self._pass = self._row = 0
        self._any_in_pass = False
        self._feed.seek(None)

    def _go_to(self, place: Mapping[str, Any]) -> None:
        self._number, self._start, self._pass, self._row = (int(place[k]) for k in ("block", "start", "pass", "row"))
        self._any_in_pass = self._row > 0
        self._feed.seek(place["feed"])
        self._reader.types = place["types"]
        self._tally.restore(self._key, place["tally"])
        self._file["rows"] = int(place["rows"])
        self._counted = self._number

    def _read_block(self) -> None:
        """The next block that holds anything. DataError where the source holds nothing, or a row is damaged."""
        items: list[Any] = []
        place: dict[str, Any] = {}
        while not items:
            place = self._place()
            taken = self._feed.take(BLOCK)
            if not taken:
                if not self._any_in_pass:
                    what = "nothing that can be used" if self._row else "no rows"
                    raise DataError(f"{self._key}: {self._feed.name} holds {what}")
                self._pass, self._row, self._any_in_pass = self._pass + 1, 0, False
                self._feed.seek(None)
                continue
            items = self._items(taken)
            self._row += len(taken)
        self._any_in_pass = True
        languages = [self._language(item) for item in items]
        sampler = Sampler(languages, self._temperature, self._seed, f"{self._name} {self._number}")
        self._blocks.append(_Block(self._number, self._start, items, sampler, place))
        self._start += len(items)
        self._number += 1
        self._counted = max(self._counted, self._number)

    def _items(self, taken: list[tuple[str, Any]]) -> list[Any]:
        places, rows = [where for where, _ in taken], [row for _, row in taken]
        name = f"the first {len(rows):,} rows of {self._feed.name}"  # in messages of what is not in any row
        source = Source(name, rows, places.__getitem__, has_columns=self._feed.has_columns)
        if self._source.columns is not None:
            source = select(source, self._source.columns, self._key, all_there=self._number == 0)
        tally = Tally()
        items = self._reader.block(source, self._number, self._row, self._key, tally)
        if self._is_new:
            self._tally.take(tally)
            self._file["rows"] += len(rows)
        for check in self._checks:
            self._look_at(items, check)
        return items

    def _look_at(self, items: list[Any], check: Check) -> None:
        tally = Tally()
        check(items, tally)
        if self._is_new:
            self._tally.take(tally)

    @property
    def _is_new(self) -> bool:
        """Whether what is read now was not counted before, in an earlier pass or on the way to another place."""
        return self._pass == 0 and self._number >= self._counted

    def _place(self) -> dict[str, Any]:
        return {
            "identity": self._feed.identity,
            "block": self._number,
            "start": self._start,
            "pass": self._pass,
            "row": self._row,
            "feed": self._feed.state(),
            "types": self._reader.types,
            "tally": self._tally.counted(self._key),
            "rows": self._file["rows"],
        }
