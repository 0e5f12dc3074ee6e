"""One live line in a terminal, a few plain ones in a file."""

from __future__ import annotations

import copy
import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from fastalign.config import config_from_dict, save_config
from fastalign.training.run import train

LINE = (
    r"step 2 of 6: alignment_loss [\d.]+, task_loss [\d.]+, [\d,]+ tokens/s, [\d,]+ pairs/s, [\d.]+ [MG]B, "
    r"\d\d:\d\d left"
)


def test_without_a_terminal_a_plain_line_and_every_evaluation(raw_config: dict, capsys: pytest.CaptureFixture) -> None:
    raw = copy.deepcopy(raw_config)
    raw["training"] |= {"max_steps": 6, "logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    train(config_from_dict(raw))
    out, err = capsys.readouterr()
    assert out == ""
    assert "\r" not in err and "it/s" not in err
    steps = [line for line in err.splitlines() if line.startswith("step ")]
    assert re.fullmatch(LINE, steps[0])  # the later logs come within half a minute
    score = r"eval_task_loss [\d.]+, eval_alignment_loss [\d.]+, eval_retrieval [\d.]+"
    assert [re.sub(score, "scores", line) for line in steps[1:]] == ["step 3: scores", "step 6: scores"]


def test_a_long_run_says_something_every_half_minute(
    raw_config: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("fastalign.training.progress.QUIET", 0.0)
    raw = copy.deepcopy(raw_config)
    raw["training"]["max_steps"] = 6
    train(config_from_dict(raw))
    assert len(re.findall(r"^step \d of 6: ", capsys.readouterr().err, flags=re.M)) == 6


def test_in_a_terminal_one_line_that_moves(raw_config: dict, tmp_path: Path) -> None:
    """A real terminal: both ends of a pty."""
    save_config(config_from_dict(raw_config), tmp_path / "config.yaml")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 160, 0, 0))
    arguments = [sys.executable, "-m", "fastalign", "train", str(tmp_path / "config.yaml")]
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            shown += part
        assert process.wait() == 0
    text = shown.decode()
    moved = text.split("\r")
    assert any("4/4" in line and "task_loss" in line and "alignment_loss" in line for line in moved), text
