"""The output folder: what may be written there, what is in the way, and that only one run writes there."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fastalign.config import SAVED
from fastalign.errors import ConfigError

# What a run leaves, and a later one would replace; stopped.json says why one ended early.
RESULTS = ("adapter_config.json", "adapter_model.safetensors", "summary.json", "stopped.json")
# Of a model or adapter that somebody else has put there.
FOREIGN = ("config.json", "model*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf")
LOCK = ".fastalign.lock"


def require_free_folder(folder: Path, allowed: bool, base: str = "") -> None:
    """ConfigError where an output folder holds what may not be replaced, or cannot be written to.

    Args:
        folder: that will be written to.
        allowed: results of an earlier run may be replaced.
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
        found = _results(folder) + ([folder / "config.yaml"] if _is_users(folder / "config.yaml") else [])
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{where} cannot be used ({getattr(error, 'strerror', None) or error})") from None
    if found and not allowed:
        raise ConfigError(
            f"{where} holds results ({found[0].name}); choose another folder, add --overwrite, or continue with "
            "training.resume_from_checkpoint=true"
        )
    if os.environ.get("RANK", "0") != "0":
        return  # the first rank tries for all
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


def _is_users(path: Path) -> bool:
    """Whether somebody has written this config.yaml by hand."""
    return path.is_file() and not path.read_bytes().startswith(SAVED.encode())


def _results(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [*folder.glob("checkpoint-*"), *(folder / name for name in RESULTS if (folder / name).exists())]


def clear(folder: Path, keep_checkpoints: bool) -> None:
    """Remove the results of an earlier run, and nothing else."""
    for path in _results(folder):
        if path.is_dir():
            if not keep_checkpoints:
                shutil.rmtree(path)
        else:
            path.unlink()


class Lock:
    """Keeps a second run out of an output folder; ends with the process that holds it, however that ends."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock, once there is a folder. ConfigError where another process has it."""
        if self._file is not None or not self.folder.is_dir() or os.environ.get("RANK", "0") != "0":
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
        self._file = file

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
