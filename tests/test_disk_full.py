"""Disks that fill up: one clear line, the last good checkpoint as it was, and a resume that ends as if nothing was."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fastalign.config import load_config
from fastalign.errors import RunError
from fastalign.training.checkpoint import last_checkpoint
from fastalign.training.run import train
from tests.forks import Forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="limits as on POSIX")
RESUME = "training.resume_from_checkpoint=true"


@pytest.fixture(scope="module")
def config_file(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = {
        "model": {"name_or_path": str(model_dir)},
        "adapter": {"r": 4, "alpha": 8.0, "dropout": 0.1},
        "task": {"data": str(data_dir / "task.jsonl"), "eval_share": 0.2},
        "alignment": {"data": str(data_dir / "pairs.jsonl"), "batch_size": 8, "eval_share": 0.2},
        "training": {"max_steps": 8, "save_steps": 2, "eval_strategy": "no", "use_cpu": True},
    }
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(forks: Forks, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a run whose disk has room."""
    out = tmp_path_factory.mktemp("whole") / "out"
    code, output = forks.run(command(config_file, out))
    assert code == 0, output
    return (out / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def halfway(forks: Forks, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that has saved checkpoints 2 and 4."""
    out = tmp_path_factory.mktemp("halfway") / "out"
    assert forks.run(command(config_file, out), at=r"os\.mkdir .*checkpoint-6")[0] == -signal.SIGKILL
    return out


@pytest.fixture
def out(halfway: Path, tmp_path: Path) -> Path:
    """The same, to go on with."""
    shutil.copytree(halfway, tmp_path / "out")
    return tmp_path / "out"


def command(config_file: Path, out: Path, *more: str) -> list[str]:
    return ["train", str(config_file), f"training.output_dir={out}", *more]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def half_written(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.startswith(".saving") or path.name.endswith(".part")]


# When the disk is full, the bytes that a file may have from then on, and the last checkpoint then.
FULL = {
    "config.yaml": (r"open .*/\.config\.yaml", 100, 4),
    "adapter_model.safetensors": (r"os\.mkdir .*/checkpoint-6", 30_000, 4),
    "tokenizer.json": (r"open .*/checkpoint-6/tokenizer_config\.json", 10_000, 4),
    "training_args.bin": (r"torch\.save .*/checkpoint-6/training_args", 1000, 4),
    "optimizer.pt": (r"os\.mkdir .*/checkpoint-6", 100_000, 4),
    "scheduler.pt": (r"torch\.save .*/checkpoint-6/scheduler", 500, 4),
    "rng_state.pth": (r"torch\.save .*/checkpoint-6/rng_state", 10_000, 4),
    "trainer_state.json": (r"open .*/checkpoint-6/trainer_state", 1000, 4),
    "run.json": (r"open .*/checkpoint-6/\.run\.json", 1000, 4),
    "the final adapter": (r"os\.mkdir .*/\.saving/final", 30_000, 8),
    "summary.json": (r"open .*/\.summary\.json", 500, 8),
}


FAST = ("optimizer.pt", "tokenizer.json", "the final adapter")


@pytest.mark.parametrize(
    "file", [file if file in FAST else pytest.param(file, marks=pytest.mark.slow) for file in FULL]
)
def test_a_disk_that_is_full_at_this_file(file: str, forks: Forks, config_file: Path, whole: bytes, out: Path) -> None:
    at, size, step = FULL[file]
    before = content(out / "checkpoint-4")
    code, output = forks.run(command(config_file, out, RESUME), at=at, file_size=size)
    [line] = [line for line in output.splitlines() if line.startswith("fastalign:")]
    assert code == 1 and "Traceback" not in output, output
    last = out / f"checkpoint-{step}"
    said = ("cannot write to", f"'{out}'", "make room", f"the last checkpoint is {last};")
    assert all(part in line for part in said), line
    assert "File too large" in line or "did not take all" in line, line
    assert not half_written(out)
    assert last_checkpoint(out) == last
    if step == 4:
        assert content(last) == before

    code, output = forks.run(command(config_file, out, RESUME))
    assert code == 0, output
    assert (out / "adapter_model.safetensors").read_bytes() == whole


def test_a_disk_that_is_full_from_the_first_checkpoint_on(forks: Forks, config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, output = forks.run(command(config_file, out), at=r"os\.mkdir .*/checkpoint-2", file_size=30_000)
    [line] = [line for line in output.splitlines() if line.startswith("fastalign:")]
    assert code == 1 and "there is no checkpoint yet" in line and "Traceback" not in output, output
    assert not half_written(out)


@pytest.mark.parametrize(("name", "step"), [("checkpoint-6", 4), ("final", 8)])
def test_a_disk_that_is_full_only_when_it_is_flushed(
    name: str, step: int, config_file: Path, whole: bytes, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        if (out / ".saving" / name).exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    go_on: Callable[[], object] = lambda: train(load_config(config_file, command(config_file, out, RESUME)[2:]))  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(RunError, match=f"No space left on device.*the last checkpoint is {out}/checkpoint-{step};"):
            go_on()
    assert not half_written(out)
    go_on()
    assert (out / "adapter_model.safetensors").read_bytes() == whole
