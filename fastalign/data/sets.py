"""Data sets through `datasets`: on a hub, or a local folder of the same make."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from typing import Any

from fastalign.config import DataSource
from fastalign.config.hub import asking_hub, may_ask_hub
from fastalign.data.files import NAME, Row, Source, quiet
from fastalign.data.labels import decoder
from fastalign.data.text import listed, quoted, shown
from fastalign.errors import DataError

DOWNLOAD = "hf download {} --repo-type dataset --local-dir FOLDER"


def read_set(path: str, source: DataSource, key: str) -> Source:
    """All rows of a data set's split, labels as their names.

    Args:
        path: hub id, or folder. source: its configuration, split and revision. key: for messages.

    Raises:
        DataError: it is not there, cannot be reached, or asks for a configuration or split; says which there are.
    """
    name = named(path, source)
    with told(path, source, key), tempfile.TemporaryDirectory() as cache:
        # A folder may have changed since it was last read, and the cache would not see it.
        table: Any = load(path, source, **({"cache_dir": cache} if os.path.isdir(path) else {}))
        rows = table.with_format("arrow")[:].to_pylist() if len(table) else []
        decode = decoder(table.features)
        rows = [decode(row) for row in rows]
    of_hub = getattr(table, "_fingerprint", None)
    fingerprint = digest(rows) if os.path.isdir(path) else of_hub and f"fingerprint {of_hub}"
    return Source(name, rows, lambda i: f"{name}, row {i + 1}", fingerprint)


def named(path: str, source: DataSource) -> str:
    """The data set for messages, with its configuration and split where they are given."""
    options = ", ".join(filter(None, (source.name, source.split)))
    return shown(path, NAME) + (f" ({shown(options)})" if options else "")


def load(path: str, source: DataSource, **options: Any) -> Any:
    """What `datasets.load_dataset` gives for the split; where none is asked for: train, or the only one."""
    import datasets

    options |= {"name": source.name} if source.name else {}
    options |= {"revision": source.revision} if source.revision else {}
    with quiet(), contextlib.nullcontext() if os.path.isdir(path) else asking_hub():
        try:
            return datasets.load_dataset(path, split=source.split or "train", **options)
        except ValueError:
            splits = _splits(path, source) if source.split is None else []
            if len(splits) != 1 or splits == ["train"]:
                raise
            return datasets.load_dataset(path, split=splits[0], **options)


def data_files(path: str, source: DataSource, split: str) -> list[str]:
    """Where the rows of a split come from: files, or addresses that hold the commit."""
    import datasets

    builder: Any = datasets.load_dataset_builder(path, source.name, revision=source.revision)
    return [*map(str, (builder.config.data_files or {}).get(split, ()))]


def digest(rows: list[Row]) -> str:
    """SHA-256 of the rows."""
    hashed = hashlib.sha256()
    for row in rows:
        hashed.update(json.dumps(row, default=str).encode() + b"\n")
    return hashed.hexdigest()


@contextlib.contextmanager
def told(path: str, source: DataSource, key: str) -> Iterator[None]:
    """Turns what `datasets` and its hub raise, which share no base class, into a DataError."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:
        with quiet(), contextlib.nullcontext() if os.path.isdir(path) else asking_hub():
            why = _why(error, path, source)
        raise DataError(f"{key}: {why}") from None


def _why(error: Exception, path: str, source: DataSource) -> str:
    place, said = quoted(path, NAME), shown(" ".join(str(error).split()) or type(error).__name__, 200)
    if "scripts are no longer supported" in str(error):
        return (
            f"{place} has a loading script, which `datasets` does not run any more; give revision: "
            "refs/convert/parquet if the hub has converted it, or files that were made with the script"
        )
    if isinstance(error, ValueError) and (words := _of_names(path, source)):
        return f"{place} {words}"
    if os.path.isdir(path):
        files = f"{shown(path.rstrip('/'), NAME)}/*.jsonl"
        return f"{place} is a folder without a data set that can be loaded ({said}); name its files, e.g. {files}"
    if "gated" in str(error):
        return f"{place} is gated: ask for access on its page on the hub, then run: hf auth login, or set HF_TOKEN"
    if type(error).__name__ == "DatasetNotFoundError" and "Revision" not in str(error):
        return (
            f"{place} is not a file here, and the hub gave no data set of that name; check the spelling, or, if it is "
            "private, run: hf auth login, or set HF_TOKEN"
        )
    if isinstance(error, (ConnectionError, TimeoutError)) or "offline" in str(error).lower():
        why = "the hub cannot be reached" if may_ask_hub() else "HF_HUB_OFFLINE forbids to ask the hub"
        how = DOWNLOAD.format(shown(path, NAME))
        return (
            f"{place} is not a file here, and {why}; check the path or the connection, or download it where there is "
            f"one ({how}) and give path: FOLDER"
        )
    what = f"{type(error).__name__}: {said}"
    return f"{place} is not a file here, and the hub gave no data set that can be loaded ({what})"


def _of_names(path: str, source: DataSource) -> str:
    """What is wrong with configuration or split, and which there are; empty where they are right."""
    import datasets

    try:
        names = datasets.get_dataset_config_names(path, revision=source.revision)
        try:
            splits = _splits(path, source)
        except ValueError:
            if source.name is None:
                return f"has several configurations; give one as name: {listed(names, 30)}"
            return f"has no configuration {quoted(source.name)}; there are: {listed(names, 30)}"
    except Exception:  # as much as can be said
        return ""
    wanted = [re.split(r"\[", part.strip())[0] for part in (source.split or "train").split("+")]
    if any(split not in splits for split in wanted):
        missing = next(split for split in wanted if split not in splits)
        return f"has no split {quoted(missing)}; there are: {listed(splits, 30)}; give one as split"
    return ""


def _splits(path: str, source: DataSource) -> list[str]:
    """Names of the splits. Raises ValueError where the configuration is not there, or has to be named."""
    import datasets

    builder: Any = datasets.load_dataset_builder(path, source.name, revision=source.revision)
    return [*map(str, builder.config.data_files or builder.info.splits or ())]
