"""Real processes that are killed or told to stop, and resumed: each ends as the run that nothing happened to."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.training.checkpoint import DOOMED, REPLACED, SAVING, checkpoints, last_checkpoint
from tests.forks import Forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills as on POSIX")
RESUME = "training.resume_from_checkpoint=true"
SEED = 0


@dataclass
class Whole:
    """The run that nothing happens to: its end, how long it took, and its operations on files in its folder."""

    end: dict[str, Any]
    seconds: float
    operations: int


@pytest.fixture(scope="module")
def config_file(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both streams, dropout, forwards that are accumulated, and cached gradients that replay the random state."""
    raw = {
        "model": {"name_or_path": str(model_dir)},
        "adapter": {"r": 4, "alpha": 8.0, "dropout": 0.1},
        "task": {"data": str(data_dir / "task.jsonl"), "eval_share": 0.2},
        "alignment": {
            "data": str(data_dir / "pairs.jsonl"),
            "batch_size": 8,
            "micro_batch_size": 3,
            "eval_share": 0.2,
        },
        "training": {
            "max_steps": 14,
            "save_steps": 2,
            "save_total_limit": 2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "use_cpu": True,
        },
    }
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def whole(forks: Forks, config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    out = folder / "out"
    trace = folder / "trace"
    started = time.monotonic()
    code, output = forks.run(command(config_file, out), trace=str(trace))
    assert code == 0, output
    return Whole(end_of(out), time.monotonic() - started, trace.read_text(encoding="utf-8").count(f"{out}/"))


def command(config_file: Path, out: Path, *more: str) -> list[str]:
    return ["train", str(config_file), f"training.output_dir={out}", *more]


def end_of(out: Path) -> dict[str, Any]:
    """What a run has learnt, the loss of every step, and what it says of its streams but for the time they took."""
    streams = json.loads((out / "summary.json").read_text(encoding="utf-8"))["streams"]
    state = json.loads((out / "checkpoint-14" / "trainer_state.json").read_text(encoding="utf-8"))
    return {
        "adapter": (out / "adapter_model.safetensors").read_bytes(),
        "losses": state["stateful_callbacks"]["StreamMeter"]["attributes"]["losses"],
        "streams": {name: {**row, "seconds": None} for name, row in streams.items()},
    }


def resume(forks: Forks, config_file: Path, out: Path, whole: Whole) -> tuple[str, list[int]]:
    """Resumes to the end, which must be that of the whole run. Returns what it prints, and where it was resumed."""
    code, output = forks.run(command(config_file, out, RESUME))
    assert code == 0, output
    assert end_of(out) == whole.end
    left = [path.name for path in out.iterdir() if path.name.startswith((SAVING, DOOMED, REPLACED))]
    assert not left and len(checkpoints(out)) <= 2
    return output, json.loads((out / "summary.json").read_text(encoding="utf-8"))["resumed_at"]


# Where it is killed, and from which checkpoint it goes on: before the operation on files that matches.
AIMED: dict[str, tuple[str, list[int]]] = {
    "before its config is written": (r"os\.rename .*/config\.yaml", []),
    "in the first checkpoint": (r"open .*/\.saving/checkpoint-2/trainer_state\.json", []),
    "with a checkpoint that has weights only": (r"open .*/\.saving/checkpoint-6/adapter_config\.json", [4]),
    "with all but the state of the trainer": (r"open .*/\.saving/checkpoint-6/trainer_state\.json", [4]),
    "with all but the record of the run": (r"os\.rename .*/\.saving/checkpoint-6/run\.json", [4]),
    "before a checkpoint is moved": (r"os\.rename .*/\.saving/checkpoint-6 ", [4]),
    "after a checkpoint is moved": (r"shutil\.rmtree .*/\.replaced-checkpoint-6", [6]),
    "before an old checkpoint is renamed": (r"os\.rename .*/\.deleting-checkpoint-2", [6]),
    "with an old checkpoint half deleted": (r"os\.remove .*rng_state", [6]),
    "while the final adapter is written": (r"open .*/\.saving/final/adapter_config\.json", [14]),
    "with half of the final files in place": (r"os\.rename .*/\.saving/final/adapter_model\.safetensors ", [14]),
    "before the summary": (r"os\.rename .*/summary\.json", [14]),
}


@pytest.mark.parametrize(
    "name",
    [name if name == "before a checkpoint is moved" else pytest.param(name, marks=pytest.mark.slow) for name in AIMED],
)
def test_killed_at_the_worst_moment(name: str, forks: Forks, config_file: Path, whole: Whole, tmp_path: Path) -> None:
    at, resumed_at = AIMED[name]
    out = tmp_path / "out"
    code, output = forks.run(command(config_file, out), at=at)
    assert code == -signal.SIGKILL, output
    assert not (out / "summary.json").exists()
    output, found = resume(forks, config_file, out, whole)
    assert found == resumed_at
    assert ("starting from the beginning" in output) == (not resumed_at)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(3))
def test_killed_before_an_operation_on_files_and_again(
    number: int, forks: Forks, config_file: Path, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    draw = random.Random(f"{SEED} {number}")
    moments = [draw.randint(1, whole.operations), draw.randint(1, 40)]
    for nth, more in zip(moments, [[], [RESUME]], strict=True):
        code, output = forks.run(command(config_file, out, *more), at=re.escape(f"{out}/"), nth=nth)
        assert code == -signal.SIGKILL, (moments, output)
    resume(forks, config_file, out, whole)


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6))])
def test_killed_at_any_time(number: int, forks: Forks, config_file: Path, whole: Whole, tmp_path: Path) -> None:
    share = random.Random(f"{SEED} {number}").uniform(0.2, 1)
    while True:
        out = tmp_path / f"{share}"
        running = forks.start(command(config_file, out))
        time.sleep(share * whole.seconds)
        running.signal(signal.SIGKILL)
        if (code := running.wait()) != 0:
            break
        share *= 0.9  # it was faster than the whole run
    assert code == -signal.SIGKILL, (share, running.output)
    resume(forks, config_file, out, whole)


@pytest.mark.slow
def test_killed_while_it_clears_up_after_a_kill(forks: Forks, config_file: Path, whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert forks.run(command(config_file, out), at=r"os\.remove .*rng_state")[0] == -signal.SIGKILL
    assert forks.run(command(config_file, out, RESUME), at=r"os\.remove .*optimizer")[0] == -signal.SIGKILL
    assert resume(forks, config_file, out, whole)[1] == [6]


@pytest.mark.slow
def test_killed_after_going_on_from_an_older_checkpoint(
    forks: Forks, config_file: Path, whole: Whole, tmp_path: Path
) -> None:
    """The newer one is gone from the start, so it cannot be taken for one of this run."""
    out = tmp_path / "out"
    assert forks.run(command(config_file, out), at=r"os\.mkdir .*/\.saving/checkpoint-10")[0] == -signal.SIGKILL
    assert [path.name for path in checkpoints(out)] == ["checkpoint-8", "checkpoint-6"]
    again = command(config_file, out, f"training.resume_from_checkpoint={out / 'checkpoint-6'}", "--overwrite")
    assert forks.run(again, at=r"os\.rename .*/\.saving/checkpoint-8 ")[0] == -signal.SIGKILL
    assert not (out / "checkpoint-8").exists()
    assert resume(forks, config_file, out, whole)[1] == [6]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_machine_that_is_taken_away(
    number: int, forks: Forks, config_file: Path, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    running = forks.start(command(config_file, out))
    running.wait_for("task_loss")
    running.signal(number)
    running.signal(number)  # a terminal that closes does so
    assert running.wait() == 1
    assert f"{signal.Signals(number).name}: finishing this step" in running.output
    assert "continue with training.resume_from_checkpoint=true" in running.output
    last = last_checkpoint(out)
    assert last is not None
    assert resume(forks, config_file, out, whole)[1] == [int(last.name.removeprefix("checkpoint-"))]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_whoever_reads_its_output_is_gone_too(
    number: int, forks: Forks, config_file: Path, whole: Whole, tmp_path: Path
) -> None:
    """As with ``fastalign train ... 2>&1 | tee log``, where Ctrl-C ends tee as well."""
    out = tmp_path / "out"
    running = forks.start(command(config_file, out))
    running.wait_for("task_loss")
    running.signal(signal.SIGSTOP)
    running.stop_reading()
    running.signal(number)
    running.signal(signal.SIGCONT)
    assert running.wait() == 1
    last = last_checkpoint(out)
    assert last is not None and json.loads((out / "summary.json").read_text(encoding="utf-8"))["interrupted"]
    assert resume(forks, config_file, out, whole)[1] == [int(last.name.removeprefix("checkpoint-"))]


@pytest.mark.slow
def test_a_second_ctrl_c_stops_at_once_and_loses_no_checkpoint(
    forks: Forks, config_file: Path, whole: Whole, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    running = forks.start(command(config_file, out), at=r"open .*/\.saving/checkpoint-4/adapter_config", pause=30)
    running.wait_for("paused")
    running.signal(signal.SIGINT)
    running.wait_for("SIGINT: finishing this step")
    time.sleep(1.1)  # sooner it is not meant so
    running.signal(signal.SIGINT)
    assert running.wait(timeout=20) == 1 and "fastalign: interrupted" in running.output
    assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
    assert resume(forks, config_file, out, whole)[1] == [2]
