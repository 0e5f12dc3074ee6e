"""The output folder: what may be written there, what is in the way, and that only one run writes there."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fastalign.config import SAVED
from fastalign.errors import ConfigError
from fastalign.streams.base import gather_over_ranks, is_first_rank
from fastalign.training.checkpoint import checkpoints, delete, step_of
from fastalign.training.joining import meet

# What a run leaves, and a later one would replace; of these, what tells how it ended.
RESULTS = ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json")
REPORTS = ("summary.json", "stopped.json")
# Of a model or adapter that somebody else has put there.
FOREIGN = ("config.json", "model*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf")
LOCK = ".fastalign.lock"


def require_free_folder(folder: Path, overwrite: bool, *, resumes: bool = False, base: str = "") -> None:
    """ConfigError where an output folder holds what may not be replaced, or cannot be written to.

    Args:
        folder: that will be written to.
        overwrite: what an earlier run has left there may be replaced.
        resumes: a run that has its checkpoints there goes on.
        base: name or folder of the base model.
    """
    where = f"training.output_dir: {str(folder)!r}"
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{where} is a file, not a folder")
        if base and folder.is_dir() and Path(base).is_dir() and folder.samefile(base):
            raise ConfigError(f"{where} is the folder of the base model; choose another one")
        foreign = sorted(path.name for pattern in FOREIGN for path in folder.glob(pattern))
        if foreign:
            raise ConfigError(f"{where} holds a model ({foreign[0]}), which is left alone; choose another folder")
        found = [] if resumes else _results(folder)
        found += [folder / "config.yaml"] if _is_users(folder / "config.yaml") else []
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} cannot be used ({getattr(error, 'strerror', None) or error})") from None
    if found and not overwrite:
        raise ConfigError(
            f"{where} holds results ({found[0].name}); choose another folder, add --overwrite, or continue with "
            "training.resume_from_checkpoint=true"
        )
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".fastalign-{time.time_ns()}"
        probe.touch()
        probe.unlink()
        for path in missing:  # it is made when the run begins
            path.rmdir()
    except OSError as error:
        raise ConfigError(f"training.output_dir: cannot write to {str(folder)!r} ({error.strerror})") from None


def require_one_folder(folder: Path) -> None:
    """ConfigError where a host does not see what rank 0 writes there: a checkpoint has files of every rank."""
    places = [folder.absolute(), *folder.absolute().parents]
    depth = next(i for i, path in enumerate(places) if path.is_dir())  # it may not be there yet
    name = f".fastalign-{os.getpid()}-{time.time_ns()}"
    if is_first_rank():
        (places[depth] / name).touch()
    first_depth, first_name, *_ = gather_over_ranks([str(depth), name])
    seen = int(first_depth) < len(places) and (places[int(first_depth)] / first_name).exists()
    meet()  # all have looked
    if is_first_rank():
        (places[depth] / name).unlink()
    if not seen:
        raise ConfigError(
            f"training.output_dir: {str(folder)!r} is another folder on {socket.gethostname()} than on rank 0's host, "
            "but every rank writes its part of a checkpoint: name one that all hosts share, such as a network disk, or "
            "set training.save_strategy: no, to train without checkpoints"
        )
    meet()


def is_unfinished(folder: Path) -> bool:
    """Whether a run of ours has begun in a folder and not come to its end."""
    settings = folder / "config.yaml"
    return settings.is_file() and not _is_users(settings) and not (folder / "summary.json").exists()


def _is_users(path: Path) -> bool:
    """Whether somebody has written this config.yaml by hand."""
    return path.is_file() and not path.read_bytes().startswith(SAVED.encode())


def _results(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [*checkpoints(folder), *(folder / name for name in (*RESULTS, *REPORTS) if (folder / name).exists())]


def clear(folder: Path, from_step: int | None) -> None:
    """Remove the results of an earlier run, and nothing else.

    Args:
        from_step: of the checkpoint from which it goes on: older ones stay, and so do its other results until there
            are new ones. None: it does not go on.
    """
    for path in _results(folder):
        older = path.is_dir() and from_step is not None and step_of(path) <= from_step
        if older or (from_step is not None and path.name in RESULTS):
            continue
        if path.is_dir():
            delete(path)
        else:
            path.unlink()


class Lock:
    """Keeps a second run out of an output folder; ends with the process that holds it, however that ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, once there is a folder. ConfigError where another process has it."""
        if self._file is not None or not self.folder.is_dir() or not is_first_rank():
            return
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            file = (self.folder / LOCK).open("w")
        except OSError:
            return  # it cannot be written to, and that is told elsewhere
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ConfigError(
                f"training.output_dir: another run is writing to {str(self.folder)!r}; wait for it, or choose another "
                "folder"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"{self.folder} cannot be locked against a second run ({error.strerror})", file=sys.stderr)
        if not self._is_there(file):  # the one before has removed it in the meantime
            file.close()
            return self.acquire()
        self._file = file

    def _is_there(self, file: IO[str]) -> bool:
        try:
            return os.fstat(file.fileno()).st_ino == (self.folder / LOCK).stat().st_ino
        except OSError:
            return False

    def release(self) -> None:
        """Give it back; harmless when it is not held."""
        if self._file is not None:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._file.close()
            self._file = None


@contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """The lock of an output folder that may not be there yet: `acquire` it again when it is."""
    lock = Lock(folder)
    try:
        lock.acquire()
        yield lock
    finally:
        lock.release()
