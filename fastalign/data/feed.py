"""Rows one after the other, from a place that can be saved: what `streaming` reads its blocks from."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from fastalign.config import DataSource
from fastalign.config.hub import asking_hub
from fastalign.data.files import NAME, SUFFIXES, Lines, Row, plain_suffix, quiet, require_readable, text_rows
from fastalign.data.labels import decoder
from fastalign.data.sets import data_files, load, named, told
from fastalign.data.sources import found_paths, is_set, refuse_options
from fastalign.data.text import quoted, shown
from fastalign.errors import DataError

HEAD = 1 << 20  # bytes of a file that tell it from another one of the same size


class Feed:
    """The rows of a source in their order, as often as asked for.

    Attributes:
        name: for messages. has_columns: as of a `Source`.
        identity: a hash that differs where the rows do; of files their sizes and beginnings.

    Raises:
        DataError: as `read_sources`, from here on and while the rows are read.
    """

    def __init__(self, source: DataSource, key: str):
        paths = found_paths(source, key)
        self._parts = [_part(path, source, key) for path in paths]
        self.name = self._parts[0].name if len(paths) == 1 else f"{key} ({len(paths)} files)"
        self.has_columns = all(plain_suffix(path) == ".tsv" for path in paths)
        self.identity = "streamed " + _hash(part.identity() for part in self._parts)
        self._close: Callable[[], Any] = lambda: None
        self.seek(None)

    def seek(self, state: Mapping[str, Any] | None) -> None:
        """Go to a place that `state` gave; None: the beginning."""
        self._number, inner = (0, None) if state is None else (int(state["part"]), state["place"])
        self._open(inner)

    def state(self) -> dict[str, Any]:
        """Where the next row begins, as JSON can hold it."""
        return {"part": self._number, "place": self._parts[self._number].state()}

    def take(self, count: int) -> list[tuple[str, Row]]:
        """(place, row) of the next rows; fewer at the end."""
        taken: list[tuple[str, Row]] = []
        while len(taken) < count:
            entry = next(self._rows, None)
            if entry is not None:
                taken.append(entry)
            elif self._number + 1 < len(self._parts):
                self._number += 1
                self._open(None)
            else:
                break
        return taken

    def _open(self, place: Any) -> None:
        self._close()
        self._rows = self._parts[self._number].rows(place)
        self._close = weakref.finalize(self, self._rows.close)  # at exit too: before the interpreter falls apart


class _Part(Protocol):
    name: str

    def identity(self) -> str: ...

    def rows(self, place: Any) -> Any:
        """A generator of (place for messages, row), beginning at a `state`, or with None at the first row."""
        ...

    def state(self) -> Any: ...


def _part(path: str, source: DataSource, key: str) -> _Part:
    if is_set(path, source, key):
        return _Set(path, source, key)
    refuse_options(path, source, key)
    require_readable(path, key)
    if SUFFIXES.get(plain_suffix(path)) is None:
        raise DataError(
            f"{key}: {quoted(path, NAME)} cannot be streamed; known endings: {', '.join(SUFFIXES)}; two aligned text "
            "files can once they are one TSV: paste corpus.de corpus.en, under a line that names the languages"
        )
    return _Parquet(path, source, key) if SUFFIXES[plain_suffix(path)] == "parquet" else _Text(path)


class _Text:
    """JSONL or TSV: a place is a line and the byte where it begins."""

    def __init__(self, path: str):
        self.name, self._path = shown(path, NAME), path
        self._lines = Lines(path)

    def identity(self) -> str:
        return _of_file(self._path)

    def rows(self, place: Any) -> Iterator[tuple[str, Row]]:
        number, offset = place or (0, 0)
        self._lines = Lines(self._path, number, offset)
        return ((self._lines.where, row) for row in text_rows(self._lines, self._path))

    def state(self) -> list[int]:
        return [self._lines.place.number, self._lines.place.offset]


class _Set:
    """A data set through `datasets`: a place is its own state, and the number of the row for messages."""

    def __init__(self, path: str, source: DataSource, key: str):
        self.name, self._path, self._source, self._key = named(path, source), path, source, key
        self._place: dict[str, Any] | None = None  # at which it was opened
        self._row = 0
        self._moved = False
        with self._told():
            self._data = self._load()

    def identity(self) -> str:
        with self._told():
            files = data_files(self._path, self._source, str(self._data.split))
        return _hash(_of_file(file) if os.path.isfile(file) else file for file in files)

    def rows(self, place: Any) -> Iterator[tuple[str, Row]]:
        self._place, self._row = place, 0 if place is None else int(place["row"])
        return self._read()

    def state(self) -> dict[str, Any] | None:
        if self._row == (self._place or {"row": 0})["row"]:
            return self._place
        return {"row": self._row, "set": self._data.state_dict()}

    def _read(self) -> Iterator[tuple[str, Row]]:
        with self._told():
            if self._moved:  # a data set stays where it was told to begin
                self._data, self._moved = self._load(), False
            if self._place is not None:
                self._data.load_state_dict(self._place["set"])
                self._moved = True
            rows, decode = iter(self._data), decoder(self._data.features)
        while True:
            with self._told():
                row = next(rows, None)
            if row is None:
                return
            self._row += 1
            yield f"{self.name}, row {self._row}", decode(row)

    def _load(self) -> Any:
        return load(self._path, self._source, streaming=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        reach = contextlib.nullcontext() if os.path.exists(self._path) else asking_hub()
        with told(self._path, self._source, self._key), quiet(), reach:
            yield


class _Parquet(_Set):
    """A parquet file."""

    def identity(self) -> str:
        return _of_file(self._path)

    def _load(self) -> Any:
        import datasets

        return datasets.load_dataset("parquet", data_files=glob.escape(self._path), split="train", streaming=True)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            with quiet():
                yield
        except Exception as error:  # of pyarrow, datasets and fsspec, whose errors share no base class
            why = shown(" ".join(str(error).split()) or type(error).__name__, 160)
            raise DataError(
                f"{self.name}, row {self._row + 1}: cannot be read as parquet, perhaps damaged or cut off ({why})"
            ) from None


def _of_file(path: str) -> str:
    with open(path, "rb") as file:
        return _hash([str(os.path.getsize(path)), hashlib.sha256(file.read(HEAD)).hexdigest()])


def _hash(words: Any) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()
