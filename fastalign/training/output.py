"""The output folder: what may be written there, what is in the way, what to go on from."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from fastalign.config import Config
from fastalign.errors import ConfigError

RESULTS = ("adapter_config.json", "adapter_model.safetensors", "summary.json")


def checkpoint_to_resume(config: Config) -> str | None:
    """The checkpoint folder that ``training.resume_from_checkpoint`` asks for."""
    from transformers.trainer_utils import get_last_checkpoint

    wanted = config.training.get("resume_from_checkpoint")
    if wanted in (None, False):
        return None
    if wanted is True:
        last = get_last_checkpoint(str(config.output_dir)) if config.output_dir.is_dir() else None
        if last is None:
            print(f"no checkpoint in {config.output_dir}: starting from the beginning", file=sys.stderr)
        return last
    if not isinstance(wanted, str) or not (Path(wanted) / "trainer_state.json").is_file():
        raise ConfigError(f"training.resume_from_checkpoint: {wanted!r} is not a checkpoint folder, true or false")
    return wanted


def require_free_folder(folder: Path, allowed: bool) -> None:
    """ConfigError where the folder holds results that may not be replaced, or cannot be written to."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"training.output_dir: {str(folder)!r} is a file, not a folder")
    found = _results(folder)
    if found and not allowed:
        raise ConfigError(
            f"training.output_dir: {str(folder)!r} holds results ({found[0].name}); choose another folder, add "
            "--overwrite, or continue with training.resume_from_checkpoint=true"
        )
    parent = folder
    while not parent.exists():
        parent = parent.parent
    try:
        probe = parent / f".fastalign-{time.time_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"training.output_dir: cannot write to {str(parent)!r} ({error.strerror})") from None


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
