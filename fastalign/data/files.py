"""Rows from files: JSONL, TSV and plain text (also compressed), parquet, or a data set on a hub.

`datasets` opens, decompresses and memory-maps the files; this module turns their content into dictionaries and
says file and line where it cannot. JSONL is read as lines and parsed here, because a schema inferred from the
first ten megabytes rejects a key that first appears later, which N-way files do all the time.
"""

from __future__ import annotations

import contextlib
import glob
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.errors import DataError

COMPRESSIONS = (".gz", ".xz", ".bz2", ".zst", ".lz4")
SUFFIXES = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".tsv": "tsv", ".parquet": "parquet"}
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One file's rows. ``where(i)`` names row i for a message, e.g. ``pairs.jsonl, line 17``."""

    name: str
    rows: list[Row]
    where: Callable[[int], str]


def read_sources(spec: str | Sequence[str], key: str) -> list[Source]:
    """Read every file that `spec` (a path, a glob, a hub id, or a list of them) names; `key` is for messages.

    Raises:
        DataError: a file is missing, of an unknown kind, not UTF-8, not parseable (with its line), or empty.
    """
    names = [spec] if isinstance(spec, str) else list(spec)
    paths: list[str] = []
    for name in names:
        found = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) and not Path(name).exists() else [name]
        if not found:
            raise DataError(f"{key}: no file matches {name!r}")
        paths += found
    aligned = _aligned_text(paths)
    sources = [aligned] if aligned else [_read(path, key) for path in paths]
    for source in sources:
        if not source.rows:
            raise DataError(f"{key}: {source.name} holds no rows")
    return sources


def plain_suffix(path: str) -> str:
    """The suffix that tells the kind of file, without a compression's: ``.jsonl`` for ``x.jsonl.gz``."""
    suffixes = Path(path).suffixes
    if suffixes and suffixes[-1].lower() in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return suffixes[-1].lower() if suffixes else ""


def _read(path: str, key: str) -> Source:
    if not Path(path).exists():
        if plain_suffix(path) in SUFFIXES or path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise DataError(f"{key}: file {path!r} does not exist")
        return _read_hub(path, key)
    if Path(path).is_dir():
        raise DataError(f"{key}: {path!r} is a folder; name its files, e.g. {path.rstrip('/')}/*.jsonl")
    kind = SUFFIXES.get(plain_suffix(path))
    if kind == "jsonl":
        return _read_jsonl(path)
    if kind == "tsv":
        return _read_tsv(path)
    if kind == "parquet":
        rows = _load("parquet", path)
        return Source(path, rows.to_list(), lambda i: f"{path}, row {i + 1}")
    raise DataError(
        f"{key}: cannot tell what {path!r} is; known endings: {', '.join(SUFFIXES)}, each also with "
        f"{', '.join(COMPRESSIONS)}, or two aligned text files such as corpus.de and corpus.en"
    )


def _read_jsonl(path: str) -> Source:
    rows, numbers = [], []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "cannot be parsed"
            raise DataError(f"{path}, line {number}: not JSON ({reason}); each line must be one object") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: must be an object such as {{...}}, not {type(row).__name__}")
        rows.append(row)
        numbers.append(number)
    return Source(path, rows, lambda i: f"{path}, line {numbers[i]}")


def _read_tsv(path: str) -> Source:
    """Tab-separated with a header line; no quoting, as is usual for parallel text."""
    lines = iter(_lines(path))
    header = [name.strip() for name in next(lines, "").split("\t")]
    if len(header) < 2 or len(set(header)) < len(header) or not all(header):
        raise DataError(f"{path}, line 1: a TSV needs a header of two or more different names, e.g. de<TAB>en")
    rows = []
    for number, line in enumerate(lines, start=2):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise DataError(f"{path}, line {number}: {len(cells)} columns where the header has {len(header)}")
        rows.append(dict(zip(header, cells)))
    return Source(path, rows, lambda i: f"{path}, line {i + 2}")


def _aligned_text(paths: list[str]) -> Source | None:
    """``name.de`` and ``name.en``: line i of the one translates line i of the other; the endings are the languages."""
    if len(paths) != 2 or not all(Path(path).is_file() for path in paths):
        return None
    endings = [plain_suffix(path) for path in paths]
    stems = {path[: path.lower().rindex(ending)] for path, ending in zip(paths, endings)}
    if len(stems) != 1 or endings[0] == endings[1] or not all(endings) or any(ending in SUFFIXES for ending in endings):
        return None
    sides = [list(_lines(path)) for path in paths]
    if len(sides[0]) != len(sides[1]):
        raise DataError(f"{paths[0]} has {len(sides[0])} lines and {paths[1]} {len(sides[1])}: they must be aligned")
    languages = [ending[1:] for ending in endings]
    rows = [dict(zip(languages, sentences)) for sentences in zip(*sides)]
    return Source(" + ".join(paths), rows, lambda i: f"{paths[0]}, line {i + 1}")


def _read_hub(name: str, key: str) -> Source:
    import datasets

    try:
        with _quiet():
            rows = datasets.load_dataset(name, split="train")
    except Exception as error:  # the hub's own errors share no base class
        raise DataError(
            f"{key}: {name!r} is not a file here, and the hub gave no data set of that name with a train split "
            f"({type(error).__name__}); check the path, or the connection"
        ) from None
    return Source(name, rows.to_list(), lambda i: f"{name}, row {i + 1}")


def _lines(path: str) -> Iterator[str]:
    for row in _load("text", path, encoding="utf-8"):
        yield row["text"]


def _load(builder: str, path: str, **options: Any) -> Any:
    """A memory-mapped `datasets.Dataset` of one local file."""
    import datasets
    from datasets.exceptions import DatasetGenerationError

    if Path(path).stat().st_size == 0:
        raise DataError(f"{path} is empty")
    try:
        with _quiet():
            return datasets.load_dataset(builder, data_files=glob.escape(path), split="train", **options)
    except (DatasetGenerationError, StopIteration, EOFError, OSError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, UnicodeDecodeError):
            raise DataError(f"{path} is not UTF-8 ({cause.reason} at byte {cause.start} of a block)") from None
        raise DataError(f"{path} cannot be read as {builder}: {type(cause).__name__}: {str(cause)[:200]}") from None


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
