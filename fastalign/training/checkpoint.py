"""Checkpoints that are whole or not there, whatever kills the process that writes them.

A checkpoint is written into a folder of a hidden name, flushed to the disk, and only then renamed to ``checkpoint-N``.
One that is deleted is renamed first. So whoever finds a ``checkpoint-N`` finds all of it. The results of a finished
run are written aside and moved in the same way, file by file, summary.json last.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastalign.config import Config
from fastalign.errors import ConfigError, FastalignError, RunError
from fastalign.streams.base import is_first_rank, say
from fastalign.training.memory import gigabytes

SAVING = ".saving"  # what is being written
DOOMED = ".deleting-"  # begins the name of what is being deleted
REPLACED = ".replaced-"  # and of what is there until its replacement is
NAME = re.compile(r"checkpoint-(\d+)")
STATE, WEIGHTS, RECORD = "trainer_state.json", "adapter_model.safetensors", "run.json"
PLACES = "streamed.json"  # how far each stream has been read
# Full, or not to be written to any more; the last two are not on Windows.
DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM}
DISK_ERRORS |= {getattr(errno, name) for name in ("EDQUOT", "ESTALE") if hasattr(errno, name)}
OS_ERROR = re.compile(r"\(os error (\d+)\)")  # how Rust ends its messages: tokenizers raises a bare Exception
# What torch's writer says when a disk is full; its errors carry no number.
DISK_SIGNS = ("pytorchstreamwriter", "unexpected pos", "file write failed", "iostream error", "no space left")


def checkpoints(folder: Path) -> list[Path]:
    """All folders ``checkpoint-N``, the highest N first."""
    found = [path for path in folder.glob("checkpoint-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """N of ``checkpoint-N``."""
    return int(checkpoint.name.rpartition("-")[2])


def last_checkpoint(folder: Path, below: int | None = None) -> Path | None:
    """The newest whole checkpoint in an output folder, of a step below `below` where that is given."""
    steps = (path for path in checkpoints(folder) if below is None or step_of(path) < below)
    return next((path for path in steps if why_not_whole(path) is None), None)


def how_to_continue(folder: Path) -> str:
    """A clause for a message: from where a stopped run can go on."""
    last = last_checkpoint(folder)
    if last is None:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {last}; continue with training.resume_from_checkpoint=true"


def why_not_whole(checkpoint: Path) -> str | None:
    """What a checkpoint lacks to be continued from, or None. Every file is read through once."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
            return f"{STATE} is not that of a run"
        if not (checkpoint / WEIGHTS).exists() and any(checkpoint.glob("adapter_model.*")):
            return "its weights are not safetensors, and others could run code"
        with safe_open(checkpoint / WEIGHTS, framework="pt") as weights:
            weights.keys()
        json.loads((checkpoint / "adapter_config.json").read_text(encoding="utf-8"))
        pickled = [*checkpoint.rglob("*.pt"), *checkpoint.rglob("*.pth")]
        for path in pickled:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return f"{path.name} is damaged"
        ranks = _ranks(checkpoint)
        deepspeed = checkpoint / "latest"
        if deepspeed.exists() and not (checkpoint / deepspeed.read_text(encoding="utf-8").strip()).is_dir():
            return "the folder of DeepSpeed's states is missing"
        states = len([*checkpoint.glob("global_step*/*_optim_states.pt")])
        if deepspeed.exists() and states < ranks:
            return f"it has DeepSpeed's states of {states} ranks, not {ranks}; do all hosts write to the same folder?"
    except Exception as error:  # what is damaged makes the readers raise anything at all
        return f"it is damaged or cut off ({type(error).__name__}: {str(error)[:150]})"
    names = {path.name for path in pickled}
    if not deepspeed.exists() and not {"optimizer.pt", "scheduler.pt"} <= names:
        return "it has no optimizer and scheduler, so the run cannot go on exactly (training.save_only_model)"
    if "rng_state.pth" not in names and not {f"rng_state_{rank}.pth" for rank in range(ranks)} <= names:
        return "it lacks random states"
    return None


def _ranks(checkpoint: Path) -> int:
    """Of the run that wrote it; 1 where it does not say."""
    record = checkpoint / RECORD
    return int(json.loads(record.read_text(encoding="utf-8"))["ranks"]) if record.exists() else 1


def checkpoint_to_resume(config: Config) -> Path | None:
    """The checkpoint that ``training.resume_from_checkpoint`` asks for, whole.

    Raises:
        ConfigError: it names a folder that is no whole checkpoint; or asks for the last, and none of them is whole.
    """
    wanted = config.training.get("resume_from_checkpoint")
    if wanted in (None, False):
        return None
    if wanted is True:
        found = checkpoints(config.output_dir)
        for path in found:
            why = why_not_whole(path)
            if why is None:
                return path
            say(f"{path} is left out: {why}")
        if found:
            raise ConfigError(
                f"training.resume_from_checkpoint: no checkpoint in {str(config.output_dir)!r} is whole; remove them "
                "to start over"
            )
        say(f"no checkpoint in {config.output_dir}: starting from the beginning")
        return None
    if not isinstance(wanted, str) or "\0" in wanted or not (Path(wanted) / STATE).is_file():
        raise ConfigError(f"training.resume_from_checkpoint: {wanted!r} is not a checkpoint folder, true or false")
    why = why_not_whole(Path(wanted))
    if why is not None:
        others = [path for path in checkpoints(Path(wanted).parent) if path != Path(wanted)]
        other = next((path for path in others if why_not_whole(path) is None), None)
        hint = f"; {other} is whole" if other else ""
        raise ConfigError(f"training.resume_from_checkpoint: {wanted!r} cannot be used: {why}{hint}")
    return Path(wanted)


def restore(folder: Path) -> None:
    """Undo what a killed process has left half done: what it wrote or deleted goes, what it replaced comes back."""
    if not folder.is_dir() or not is_first_rank():
        return
    for path in folder.glob(f"{REPLACED}*"):
        original = folder / path.name.removeprefix(REPLACED)
        if not original.exists():
            path.rename(original)
    for path in [folder / SAVING, *folder.glob(f"{DOOMED}*"), *folder.glob(f"{REPLACED}*")]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def staged(folder: Path, name: str) -> Iterator[Path]:
    """A folder to write ``folder/name`` under; it is moved to its place when all ranks leave the `with`.

    Raises:
        RunError: the disk is full, or something else forbids to write; what was written is removed.
    """
    staging = folder / SAVING
    with disk_errors(folder):
        try:
            staging.mkdir(parents=True, exist_ok=True)
            yield staging
            _barrier()
            if is_first_rank():
                _flush(staging / name)
                _move(staging / name, folder / name)
                shutil.rmtree(staging)
            _barrier()
        except Exception:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def rotate(folder: Path, limit: int | None, newest: str, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, but not the newest and not the best; as transformers does."""
    if not limit or limit < 0 or not is_first_rank():
        return
    found = sorted(checkpoints(folder), key=lambda path: (path.stat().st_mtime, step_of(path)))
    kept = {path for path in found if path.name in (newest, Path(best or "").name)}
    for path in [path for path in found if path not in kept][: max(0, len(found) - max(limit, len(kept)))]:
        try:
            delete(path)
        except OSError as error:  # it only takes room
            say(f"{path} cannot be deleted ({error.strerror})")


def delete(checkpoint: Path) -> None:
    """Delete a checkpoint in such a way that it is none any more from the first moment on."""
    doomed = checkpoint.with_name(f"{DOOMED}{checkpoint.name}")
    checkpoint.rename(doomed)
    if doomed.is_symlink():
        doomed.unlink()
    shutil.rmtree(doomed, ignore_errors=True)


def save_final(save_model: Callable[[str], None], folder: Path) -> None:
    """Write the adapter and its tokenizer into the output folder, each file whole; called on all ranks."""
    staging = folder / SAVING / "final"
    try:
        save_model(str(staging))
        _barrier()
        if is_first_rank():
            _flush(staging)
            for path in sorted(staging.iterdir()):
                target = folder / path.name
                if path.name == "README.md" and target.exists():
                    continue  # a model card, perhaps one that was written by hand
                if target.is_dir():
                    shutil.rmtree(target)
                path.replace(target)
            _flush_folder(folder)
            shutil.rmtree(folder / SAVING)
    except Exception:
        shutil.rmtree(folder / SAVING, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file of UTF-8 that is old or new, never half of it."""
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns a disk that is full, or gone, into a RunError with the last checkpoint."""
    try:
        yield
    except Exception as error:
        if not _is_disk_error(error):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
        if isinstance(error, RuntimeError):  # torch's words for it are about positions
            reason = f"the disk did not take all of a file ({reason})"
        free = gigabytes(shutil.disk_usage(folder).free)
        place = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else str(folder)
        raise RunError(
            f"cannot write to {place!r}: {reason[:150]} ({free} free in {str(folder)!r}); make room; "
            f"{how_to_continue(folder)}"
        ) from error


def _is_disk_error(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_ERRORS
    if isinstance(error, FastalignError):
        return False
    number = OS_ERROR.search(str(error))
    if number and int(number[1]) in DISK_ERRORS:
        return True
    signs = isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in DISK_SIGNS)
    return isinstance(error, SafetensorError) or signs


def _move(source: Path, target: Path) -> None:
    replaced = target.with_name(f"{REPLACED}{target.name}")
    if target.exists():
        target.rename(replaced)
    source.rename(target)
    _flush_folder(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Wait until the files of a folder are on the disk: a rename must not be there before them."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            _flush_folder(path)
        else:
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if os.name == "nt":  # there a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
