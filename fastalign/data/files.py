"""Rows from files: JSONL, TSV and plain text (also compressed), or parquet.

`datasets` reads parquet. Text is split into lines and parsed here, because its readers infer a schema from the
first megabytes, and reject a key that first appears later, as in N-way files; open compressed text in the encoding of
the locale; serve a changed file of the same age from their cache; and cannot say which line is wrong.
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastalign.data.labels import decoder
from fastalign.data.text import quoted, shown
from fastalign.errors import DataError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst", ".lz4")
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".parquet": "parquet"}
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
LONGEST_LINE = 64 << 20  # bytes; a damaged or hostile file shall not fill the memory with one line
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # half a character, as JSON spells it
NAME = 240  # characters of a path in a message
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One file's rows. ``where(i)`` names row i for a message, e.g. ``pairs.jsonl, line 17``.

    `fingerprint`: of a data set, which is no file; may be unknown. `has_columns`: a row cannot leave out a key, only
    leave its cell empty. `unmapped`: where the rows hold only mapped columns, a row of what there is, for messages.
    """

    name: str
    rows: list[Row]
    where: Callable[[int], str]
    fingerprint: str | None = None
    has_columns: bool = False
    unmapped: Row | None = None


def read_file(path: str, key: str) -> Source:
    """The rows of a file that is there. Raises DataError; `key` is for messages."""
    name = quoted(path, NAME)
    require_readable(path, key)
    kind = SUFFIXES.get(plain_suffix(path))
    if kind in ("jsonl", "tsv"):
        lines = Lines(path)
        rows, numbers = [], []
        for row in text_rows(lines, path):
            rows.append(row)
            numbers.append(lines.place.number)
        return Source(
            lines.place.name, rows, lambda i: f"{lines.place.name}, line {numbers[i]}", has_columns=kind == "tsv"
        )
    if kind == "parquet":
        return _read_parquet(path)
    raise DataError(
        f"{key}: cannot tell what {name} is; known endings: {', '.join(SUFFIXES)}, all but parquet also with "
        f"{', '.join(COMPRESSIONS)}, or two aligned text files such as corpus.de and corpus.en"
    )


def require_readable(path: str, key: str) -> None:
    """DataError where what is there is no file that can be read."""
    if not os.path.isfile(path):  # to open a pipe that nobody writes to would wait for ever
        raise DataError(f"{key}: {quoted(path, NAME)} is not a regular file; write the rows to one")
    if not os.access(path, os.R_OK):
        raise DataError(f"{key}: {quoted(path, NAME)} cannot be read (Permission denied); see its permissions")


def plain_suffix(path: str) -> str:
    """The suffix that tells the kind of file, without a compression's: ``.jsonl`` for ``x.jsonl.gz``."""
    return _plain_path(path).suffix.lower()


def _plain_path(path: str) -> Path:
    plain = Path(path)
    return plain.with_suffix("") if plain.suffix.lower() in COMPRESSIONS else plain


def text_rows(lines: Lines, path: str) -> Iterator[Row]:
    """The rows of a JSONL or TSV file, from where `lines` begins."""
    return _jsonl_rows(lines) if SUFFIXES[plain_suffix(path)] == "jsonl" else _tsv_rows(lines, path)


def _jsonl_rows(lines: Lines) -> Iterator[Row]:
    """The object on each line that is not blank; `lines` knows which line it was."""
    for line in lines:
        if not line.strip():
            continue
        where = lines.where
        try:
            row = json.loads(line, object_pairs_hook=_without_duplicates)
            if SURROGATE.search(line):
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            cut = "; it is the last line: is the file cut off?" if _ends_early(line, error) and _at_end(lines) else ""
            raise DataError(f"{where}: {_why_not_json(line, error)}{cut}") from None
        if not isinstance(row, dict):
            what = "an array; write its items on lines of their own" if isinstance(row, list) else quoted(row)
            raise DataError(f"{where}: must be an object such as {{...}}, not {what}")
        yield row


def _ends_early(line: str, error: Exception) -> bool:
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated") or error.pos >= len(line.rstrip())


def _at_end(lines: Iterator[str]) -> bool:
    try:
        return not any(line.strip() for line in lines)
    except DataError:  # there is more, and that cannot be read either
        return False


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"the key {quoted(next(name for name in row if counts[name] > 1))} appears twice")
    return row


def _why_not_json(line: str, error: Exception) -> str:
    if isinstance(error, UnicodeEncodeError):
        return "a text holds half of a surrogate pair (\\ud800 to \\udfff), which is no character"
    if not isinstance(error, json.JSONDecodeError):  # a key twice, a number of 5,000 digits, brackets without end
        return str(error) if "twice" in str(error) else "not JSON that can be parsed"
    if line.strip() in ("[", "{"):
        return "the JSON goes on over several lines; each line must be one object (jq -c writes such lines)"
    return f"not JSON ({error.msg.removesuffix(' at')}, column {error.colno}); each line must be one object"


def _tsv_rows(lines: Lines, path: str) -> Iterator[Row]:
    """The cells of each line that is not blank; the header is the file's first line, wherever `lines` begins.

    Tabs separate, and there is no quoting, as is usual for parallel text.
    """
    first = lines if lines.place.number == 0 else Lines(path)
    header = [column.strip() for column in next(first, "").split("\t")]
    if len(header) < 2 or len(set(header)) < len(header) or not all(header):
        raise DataError(
            f"{lines.place.name}, line 1: a TSV needs a header of two or more different names, e.g. de<TAB>en"
        )
    for line in lines:
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(header):
            raise DataError(f"{lines.where}: {len(cells)} columns where the header has {len(header)}")
        yield dict(zip(header, cells, strict=True))


def read_aligned_text(paths: list[str]) -> Source | None:
    """``name.de`` and ``name.en``: line i of the one translates line i of the other; the endings are the languages.

    None where the paths are anything else.
    """
    if len(paths) != 2 or not all(map(os.path.isfile, paths)):
        return None
    plain = [_plain_path(path) for path in paths]
    languages = [path.suffix[1:] for path in plain]
    if plain[0].with_suffix("") != plain[1].with_suffix("") or languages[0] == languages[1] or not all(languages):
        return None
    if any(path.suffix.lower() in SUFFIXES for path in plain):
        return None
    names = [shown(path, NAME) for path in paths]
    sides = [list(Lines(path)) for path in paths]
    if len(sides[0]) != len(sides[1]):
        raise DataError(f"{names[0]} has {len(sides[0])} lines and {names[1]} {len(sides[1])}: they must be aligned")
    rows = [dict(zip(languages, sentences, strict=True)) for sentences in zip(*sides, strict=True)]
    return Source(" + ".join(names), rows, lambda i: f"{names[0]}, line {i + 1}")


def _read_parquet(path: str) -> Source:
    import datasets

    name = shown(path, NAME)
    rows: list[Row] = []
    try:
        with quiet():
            stream: Any = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train", streaming=True)
            decode = decoder(stream.features)
            for table in stream.with_format("arrow").iter(batch_size=10_000):
                rows += map(decode, table.to_pylist())
    except Exception as error:  # of pyarrow, datasets and fsspec, whose errors share no base class
        why = shown(" ".join(str(error).split()) or type(error).__name__, 160)
        raise DataError(f"{name} cannot be read as parquet, perhaps damaged or cut off ({why})") from None
    return Source(name, rows, lambda i: f"{name}, row {i + 1}")


@dataclass
class Place:
    """In a file: its name for messages, how many lines were read, and the bytes that they take."""

    name: str
    number: int = 0
    offset: int = 0


class Lines:
    """The lines of a file of UTF-8, perhaps compressed, from `place` on, which goes along with them.

    Only a newline ends one, not U+2028 and the like.
    """

    def __init__(self, path: str, number: int = 0, offset: int = 0):
        self.place = Place(shown(path, NAME), number, offset)
        self._lines = _lines(path, self.place)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._lines)

    @property
    def where(self) -> str:
        """File and line of the latest line."""
        return f"{self.place.name}, line {self.place.number}"


def _lines(path: str, place: Place) -> Iterator[str]:
    try:
        with _open(path) as file:
            _skip(file, place.offset)
            for line in iter(lambda: file.readline(LONGEST_LINE), b""):
                place.number += 1
                place.offset += len(line)
                if len(line) == LONGEST_LINE:
                    most = LONGEST_LINE >> 20
                    raise DataError(f"{place.name}, line {place.number}: longer than {most} MB; it must be one row")
                text = line.decode("utf-8-sig" if place.number == 1 else "utf-8")
                yield text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        hints = (hint for magic, hint in MAGIC.items() if place.number == 1 and error.object.startswith(magic))
        raise DataError(f"{place.name}, line {place.number}: not UTF-8 ({error.reason}){next(hints, '')}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = shown(getattr(error, "strerror", None) or str(error), 160)
        line = f"{place.name}, line {place.number + 1}"
        raise DataError(f"{line}: cannot be read, perhaps damaged or cut off ({reason})") from None


def _skip(file: BinaryIO, offset: int) -> None:
    """Go to an offset; what is compressed is unpacked up to there."""
    if file.seekable():
        file.seek(offset)
    else:
        while offset > 0 and (chunk := file.read(min(offset, 1 << 20))):
            offset -= len(chunk)


MAGIC = {
    b"\xff\xfe": "; it looks like UTF-16: save it as UTF-8",
    b"\xfe\xff": "; it looks like UTF-16: save it as UTF-8",
    b"\x1f\x8b": "; it looks compressed: let its name end in .gz",
    b"\xfd7zXZ": "; it looks compressed: let its name end in .xz",
    b"\x28\xb5\x2f\xfd": "; it looks compressed: let its name end in .zst",
}


def _open(path: str) -> BinaryIO:
    ending = Path(path).suffix.lower()
    if ending in OPENERS:
        return OPENERS[ending](path, "rb")
    if ending in COMPRESSIONS:  # the others come with datasets
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(path, compression={".zst": "zstd", ".lz4": "lz4"}[ending]))
    return open(path, "rb")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar of `datasets`, and no log line for every file that it opens."""
    import datasets
    from datasets.utils.logging import get_verbosity, set_verbosity

    shown, verbosity = datasets.is_progress_bar_enabled(), get_verbosity()
    datasets.disable_progress_bars()
    set_verbosity(50)
    try:
        yield
    finally:
        set_verbosity(verbosity)
        if shown:
            datasets.enable_progress_bars()


def sha256(path: str) -> str:
    """Of the bytes of the file as it is stored."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
