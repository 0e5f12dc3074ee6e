"""Signals during training: the first one saves and stops, a hurried second one does no harm."""

from __future__ import annotations

import copy
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerCallback

from fastalign.config import config_from_dict
from fastalign.training import interrupt as module
from fastalign.training.run import train

ROOT = Path(__file__).resolve().parents[1]


class Send(TrainerCallback):
    """Signals to this process in the midst of a step."""

    def __init__(self, step: int, *numbers: int):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step - 1:
            for number in self.numbers:
                os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "numbers",
    [
        [signal.SIGTERM],
        [signal.SIGHUP, signal.SIGHUP],  # a terminal that is closed
        [signal.SIGINT, signal.SIGTERM],  # a launcher that passes Ctrl-C on
        [signal.SIGINT, signal.SIGINT],  # a finger that trembles
    ],
)
def test_the_step_is_finished_and_saved(numbers: list[int], raw_config: dict, tmp_path: Path) -> None:
    handlers = [signal.getsignal(number) for number in module.SIGNALS]
    summary = train(config_from_dict(raw_config), callbacks=[Send(2, *numbers)])
    assert summary["interrupted"] and summary["steps"] == 2
    assert (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").exists()
    assert [signal.getsignal(number) for number in module.SIGNALS] == handlers


def test_ctrl_c_once_more_stops_at_once(raw_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", -1.0)
    handlers = [signal.getsignal(number) for number in module.SIGNALS]
    with pytest.raises(KeyboardInterrupt):
        train(config_from_dict(raw_config), callbacks=[Send(2, signal.SIGINT, signal.SIGINT)])
    assert not [*(tmp_path / "out").glob("checkpoint-*")]
    assert [signal.getsignal(number) for number in module.SIGNALS] == handlers


def test_an_interrupt_is_saved_where_only_the_best_would_be(raw_config: dict, tmp_path: Path) -> None:
    raw = copy.deepcopy(raw_config)
    raw["training"] |= {
        "max_steps": 8, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best",
        "metric_for_best_model": "eval_task_loss", "greater_is_better": True,  # a falling loss is never better
        "learning_rate": 1e-3,
    }  # fmt: skip
    assert train(config_from_dict(raw), callbacks=[Send(5, signal.SIGTERM)])["interrupted"]
    assert (tmp_path / "out" / "checkpoint-5").is_dir()


def test_a_signal_in_the_last_step_is_no_interruption(raw_config: dict) -> None:
    summary = train(config_from_dict(raw_config), callbacks=[Send(4, signal.SIGTERM)])
    assert summary["steps"] == 4 and not summary["interrupted"]


def test_ignored_signals_stay_ignored(raw_config: dict) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        summary = train(config_from_dict(raw_config), callbacks=[Send(2, signal.SIGHUP)])
        assert summary["steps"] == 4 and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_terminal_that_is_closed_loses_nothing(raw_config: dict, tmp_path: Path) -> None:
    """Nothing can be printed any more, neither the notice nor the log of the step."""
    raw = copy.deepcopy(raw_config)
    raw["training"] |= {"max_steps": 100_000, "disable_tqdm": True, "logging_steps": 10}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "PYTHONUNBUFFERED": "1"}
    run = subprocess.Popen(
        [sys.executable, "-m", "fastalign", "train", str(tmp_path / "config.yaml")],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        preexec_fn=lambda: (os.setsid(), __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0)),
    )
    os.close(theirs)
    said = b""
    deadline = time.monotonic() + 120
    while b"alignment_loss" not in said and time.monotonic() < deadline:
        said += os.read(ours, 4096)
    os.close(ours)  # the kernel sends SIGHUP
    assert run.wait(timeout=60) == 1
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    assert (checkpoint / "trainer_state.json").exists() and (tmp_path / "out" / "summary.json").exists()
