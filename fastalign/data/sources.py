"""The rows that a setting names: files, patterns, data sets, with their columns mapped to ours."""

from __future__ import annotations

import glob
import os
from dataclasses import replace

from fastalign.config import Data, DataSource
from fastalign.data.columns import select
from fastalign.data.files import NAME, SUFFIXES, Source, plain_suffix, read_aligned_text, read_file, sha256
from fastalign.data.sets import read_set
from fastalign.data.tally import Tally
from fastalign.data.text import quoted, shown
from fastalign.errors import DataError


def read_sources(spec: Data, key: str, tally: Tally | None = None) -> list[Source]:
    """Read all that `spec` (a path, a pattern, a hub id, a `DataSource`, or a list) names; `key` is for messages.

    Two aligned text files, one after the other, are one source. The files are recorded in `tally`.

    Raises:
        DataError: a file is missing, of an unknown kind, damaged, not UTF-8, not parseable (with its line), or empty;
            a data set cannot be loaded; a mapped column is not there.
    """
    waiting = [(path, item) for item in listed_sources(spec) for path in found_paths(item, key)]
    sources: list[Source] = []
    while waiting:
        path, item = waiting[0]
        alike = [other for other, of in waiting[:2] if replace(of, path="") == replace(item, path="")]
        aligned = read_aligned_text(alike)
        if aligned or os.path.isfile(path):
            refuse_options(path, item, key)
        source = aligned or (read_set(path, item, key) if is_set(path, item, key) else read_file(path, key))
        if not source.rows:
            raise DataError(f"{key}: {source.name} holds no rows")
        if item.columns is not None:
            source = select(source, item.columns, key)
        taken = 2 if aligned else 1
        if tally is not None:
            for name, _ in waiting[:taken]:
                digest = sha256(name) if os.path.isfile(name) else source.fingerprint
                tally.file(key, shown(name, NAME), digest, len(source.rows), item.columns)
        sources.append(source)
        del waiting[:taken]
    return sources


def listed_sources(spec: Data) -> list[DataSource]:
    """What a setting holds as a list of sources."""
    items = spec if isinstance(spec, list) else [] if spec is None else [spec]
    return [DataSource(path=item) if isinstance(item, str) else item for item in items]


def found_paths(item: DataSource, key: str) -> list[str]:
    """The files, folders and hub ids of a source, patterns replaced by what they match. Raises DataError."""
    names = item.path if isinstance(item.path, list) else [item.path]
    return [path for name in names for path in _paths(name, key)]


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


def refuse_options(path: str, item: DataSource, key: str) -> None:
    """DataError where a file is given what only a data set has."""
    for option in ("name", "split", "revision"):
        if getattr(item, option) is not None:
            raise DataError(
                f"{key}.{option}: {quoted(path, NAME)} is a file and has no {option}; leave it out, or name a data set"
            )


def is_set(path: str, item: DataSource, key: str) -> bool:
    """Whether `path` is a data set, in a folder or on a hub, and not a file. DataError where it can be neither."""
    name = quoted(path, NAME)
    if os.path.exists(path):
        return os.path.isdir(path)
    if os.path.islink(path):
        raise DataError(f"{key}: {name} is a link to a file that does not exist")
    if plain_suffix(path) in SUFFIXES or path.startswith((".", "/")) or path.count("/") != 1:
        hint = "; hub ids read owner/name" if item.name or item.split or item.revision else ""
        raise DataError(f"{key}: file {name} does not exist{hint}")
    return True
