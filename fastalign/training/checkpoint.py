"""Checkpoints: finding the last whole one."""

from __future__ import annotations

from pathlib import Path


def last_checkpoint(folder: Path, below: int | None = None) -> Path | None:
    """The newest whole checkpoint in an output folder, of a step below `below` where that is given."""
    found = {int(path.name.split("-")[1]): path for path in folder.glob("checkpoint-*") if path.is_dir()}
    steps = [step for step in found if below is None or step < below]
    return found[max(steps)] if steps else None


def how_to_continue(folder: Path) -> str:
    """A clause for a message: from where a stopped run can go on."""
    last = last_checkpoint(folder)
    if last is None:
        return "there is no checkpoint yet"
    return f"the last checkpoint is {last}; continue with training.resume_from_checkpoint=true"
