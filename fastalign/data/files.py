"""Rows from files: JSONL, TSV and plain text (also compressed), parquet, or a data set on a hub.

`datasets` reads parquet and hubs. Text is split into lines and parsed here, because its readers infer a schema from the
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from fastalign.config.hub import asking_hub
from fastalign.data.tally import Tally
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

    `fingerprint`: of a data set on a hub, which has no file of its own; may be unknown. `has_columns`: a row cannot
    leave out a key, only leave its cell empty.
    """

    name: str
    rows: list[Row]
    where: Callable[[int], str]
    fingerprint: str | None = None
    has_columns: bool = False


def read_sources(spec: str | Sequence[str], key: str, tally: Tally | None = None) -> list[Source]:
    """Read every file that `spec` (a path, a glob, a hub id, or a list of them) names; `key` is for messages.

    Two aligned text files, one after the other, are one source. The files are recorded in `tally`.

    Raises:
        DataError: a file is missing, of an unknown kind, damaged, not UTF-8, not parseable (with its line), or empty.
    """
    paths = [path for name in ([spec] if isinstance(spec, str) else spec) for path in _paths(name, key)]
    sources: list[Source] = []
    while paths:
        aligned = _aligned_text(paths[:2])
        source = aligned or _read(paths[0], key)
        if not source.rows:
            raise DataError(f"{key}: {source.name} holds no rows")
        if tally is not None:
            for path in paths[: 2 if aligned else 1]:
                tally.file(key, shown(path, NAME), source.fingerprint or _sha256(path), len(source.rows))
        sources.append(source)
        paths = paths[2 if aligned else 1 :]
    return sources


def plain_suffix(path: str) -> str:
    """The suffix that tells the kind of file, without a compression's: ``.jsonl`` for ``x.jsonl.gz``."""
    return _plain_path(path).suffix.lower()


def _plain_path(path: str) -> Path:
    plain = Path(path)
    return plain.with_suffix("") if plain.suffix.lower() in COMPRESSIONS else plain


def _paths(name: str, key: str) -> list[str]:
    if not name.strip():
        raise DataError(f"{key}: a file name is empty")
    if "\0" in name:
        raise DataError(f"{key}: file {quoted(name, NAME)} does not exist; no file name holds a NUL")
    name = os.path.expanduser(name)
    if not glob.has_magic(name) or os.path.exists(name):
        return [name]
    found = sorted(glob.glob(name, recursive=True))
    if not found:
        raise DataError(f"{key}: no file matches {quoted(name, NAME)}")
    return found


def _read(path: str, key: str) -> Source:
    name = quoted(path, NAME)
    if not os.path.exists(path):
        if os.path.islink(path):
            raise DataError(f"{key}: {name} is a link to a file that does not exist")
        if plain_suffix(path) in SUFFIXES or path.startswith((".", "/")) or path.count("/") != 1:
            raise DataError(f"{key}: file {name} does not exist")
        return _read_hub(path, key)
    if os.path.isdir(path):
        raise DataError(f"{key}: {name} is a folder; name its files, e.g. {shown(path.rstrip('/'), NAME)}/*.jsonl")
    if not os.path.isfile(path):  # to open a pipe that nobody writes to would wait for ever
        raise DataError(f"{key}: {name} is not a regular file; write the rows to one")
    if not os.access(path, os.R_OK):
        raise DataError(f"{key}: {name} cannot be read (Permission denied); see its permissions")
    kind = SUFFIXES.get(plain_suffix(path))
    if kind == "jsonl":
        return _read_jsonl(path)
    if kind == "tsv":
        return _read_tsv(path)
    if kind == "parquet":
        return _read_parquet(path)
    raise DataError(
        f"{key}: cannot tell what {name} is; known endings: {', '.join(SUFFIXES)}, all but parquet also with "
        f"{', '.join(COMPRESSIONS)}, or two aligned text files such as corpus.de and corpus.en"
    )


def _read_jsonl(path: str) -> Source:
    rows, numbers = [], []
    name, lines = shown(path, NAME), _lines(path)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_without_duplicates)
            if SURROGATE.search(line):
                json.dumps(row, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            cut = "; it is the last line: is the file cut off?" if _ends_early(line, error) and _at_end(lines) else ""
            raise DataError(f"{name}, line {number}: {_why_not_json(line, error)}{cut}") from None
        if not isinstance(row, dict):
            what = "an array; write its items on lines of their own" if isinstance(row, list) else quoted(row)
            raise DataError(f"{name}, line {number}: must be an object such as {{...}}, not {what}")
        rows.append(row)
        numbers.append(number)
    return Source(name, rows, lambda i: f"{name}, line {numbers[i]}")


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


def _read_tsv(path: str) -> Source:
    """Tab-separated with a header line; no quoting, as is usual for parallel text."""
    name, lines = shown(path, NAME), _lines(path)
    header = [column.strip() for column in next(lines, "").split("\t")]
    if len(header) < 2 or len(set(header)) < len(header) or not all(header):
        raise DataError(f"{name}, line 1: a TSV needs a header of two or more different names, e.g. de<TAB>en")
    rows, numbers = [], []
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(header):
            raise DataError(f"{name}, line {number}: {len(cells)} columns where the header has {len(header)}")
        rows.append(dict(zip(header, cells, strict=True)))
        numbers.append(number)
    return Source(name, rows, lambda i: f"{name}, line {numbers[i]}", has_columns=True)


def _aligned_text(paths: list[str]) -> Source | None:
    """``name.de`` and ``name.en``: line i of the one translates line i of the other; the endings are the languages."""
    if len(paths) != 2 or not all(map(os.path.isfile, paths)):
        return None
    plain = [_plain_path(path) for path in paths]
    languages = [path.suffix[1:] for path in plain]
    if plain[0].with_suffix("") != plain[1].with_suffix("") or languages[0] == languages[1] or not all(languages):
        return None
    if any(path.suffix.lower() in SUFFIXES for path in plain):
        return None
    names = [shown(path, NAME) for path in paths]
    sides = [list(_lines(path)) for path in paths]
    if len(sides[0]) != len(sides[1]):
        raise DataError(f"{names[0]} has {len(sides[0])} lines and {names[1]} {len(sides[1])}: they must be aligned")
    rows = [dict(zip(languages, sentences, strict=True)) for sentences in zip(*sides, strict=True)]
    return Source(" + ".join(names), rows, lambda i: f"{names[0]}, line {i + 1}")


def _read_parquet(path: str) -> Source:
    import datasets

    name = shown(path, NAME)
    rows: list[Row] = []
    try:
        with _quiet():
            stream: Any = datasets.load_dataset("parquet", data_files=glob.escape(path), split="train", streaming=True)
            for table in stream.with_format("arrow").iter(batch_size=10_000):
                rows += table.to_pylist()
    except Exception as error:  # of pyarrow, datasets and fsspec, whose errors share no base class
        why = shown(" ".join(str(error).split()) or type(error).__name__, 160)
        raise DataError(f"{name} cannot be read as parquet, perhaps damaged or cut off ({why})") from None
    return Source(name, rows, lambda i: f"{name}, row {i + 1}")


def _read_hub(name: str, key: str) -> Source:
    import datasets

    try:
        with _quiet(), asking_hub():
            rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's own errors share no base class
        raise DataError(
            f"{key}: {quoted(name, NAME)} is not a file here, and the hub gave no data set of that name with a train "
            f"split ({type(error).__name__}); check the path, or the connection"
        ) from None
    fingerprint = getattr(rows, "_fingerprint", None)
    fingerprint = None if fingerprint is None else f"fingerprint {fingerprint}"
    return Source(shown(name, NAME), rows.to_list(), lambda i: f"{shown(name, NAME)}, row {i + 1}", fingerprint)


def _lines(path: str) -> Iterator[str]:
    """The lines of a file of UTF-8, perhaps compressed. Only a newline ends one, not U+2028 and the like."""
    number, name = 0, shown(path, NAME)
    try:
        with _open(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), start=1):
                if len(line) == LONGEST_LINE:
                    raise DataError(f"{name}, line {number}: longer than {LONGEST_LINE >> 20} MB; it must be one row")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        hint = next((hint for magic, hint in MAGIC.items() if number == 1 and error.object.startswith(magic)), "")
        raise DataError(f"{name}, line {number}: not UTF-8 ({error.reason}){hint}") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = shown(getattr(error, "strerror", None) or str(error), 160)
        raise DataError(f"{name}, line {number + 1}: cannot be read, perhaps damaged or cut off ({reason})") from None


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
def _quiet() -> Iterator[None]:
    """No progress bar and no log line for every file that is opened."""
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


def _sha256(path: str) -> str | None:
    """Of the bytes of the file as it is stored; None where there is no file."""
    if not os.path.isfile(path):
        return None
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
