"""What a user sees while a run goes on: one live line in a terminal, and now and then a plain one in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from fastalign.streams.base import say
from fastalign.training.memory import gigabytes

QUIET = 30.0  # seconds between two plain lines


class Progress(TrainerCallback):
    """Losses of every stream, tokens and pairs per second, memory and the time that is left.

    With a terminal on stderr (`training.disable_tqdm` decides where it is given) that is a bar that moves. Without
    one it is a plain line at the first log, then at most one in half a minute, and one for every evaluation.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._began = 0.0
        self._last: float | None = None  # when a plain line was told
        self._first_step = 0
        self._losses: dict[str, str] = {}  # the latest of each stream

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began, self._last, self._first_step = time.monotonic(), None, state.global_step
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True, file=sys.stderr
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)
        elif state.is_world_process_zero and self._told_long_ago(2 * QUIET):  # logs are far apart, or off
            self._tell(f"step {state.global_step:,} of {state.max_steps:,}{self._left(state)}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        scores = {name: f"{name} {value:.4g}" for name, value in logs.items() if _is_score(name, value)}
        if len(scores) > 1:
            scores.pop("loss", None)  # that of the only stream, which is there by its name
        if any(name.startswith("eval_") for name in logs):
            self._tell(f"step {state.global_step:,}: {', '.join(scores.values())}")
            return
        self._losses |= scores
        words = ", ".join([*self._losses.values(), *_rates(logs), _memory(args.device)])
        if self._bar is not None:
            self._bar.set_postfix_str(words)
        elif self._told_long_ago(QUIET):
            self._tell(f"step {state.global_step:,} of {state.max_steps:,}: {words}{self._left(state)}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _tell(self, line: str) -> None:
        if self._bar is None:
            say(line)
        else:
            self._bar.write(line, file=sys.stderr)

    def _told_long_ago(self, seconds: float) -> bool:
        """Whether that long ago or never; then it counts as told now."""
        now = time.monotonic()
        if now - (self._last if self._last is not None else self._began - QUIET) < seconds:
            return False
        self._last = now
        return True

    def _left(self, state: Any) -> str:
        done = state.global_step - self._first_step
        if done == 0:
            return ""
        seconds = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
        return f", {tqdm.format_interval(seconds)} left"


def show_progress(trainer: Trainer) -> None:
    """Let `Progress` stand for the callbacks by which transformers tells the same."""
    for told_twice in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(told_twice)
    trainer.add_callback(Progress())


def _is_score(name: str, value: object) -> bool:
    return isinstance(value, (int, float)) and name.endswith(("loss", "retrieval")) and name != "eval_loss"


def _rates(logs: Mapping[str, Any]) -> list[str]:
    """Tokens per second of all streams, and pairs per second of the alignment."""
    tokens = sum(value for name, value in logs.items() if name.endswith("_tokens"))
    seconds = sum(value for name, value in logs.items() if name.endswith("_seconds"))
    rates = [f"{tokens / seconds:,.0f} tokens/s"] if tokens and seconds else []
    if logs.get("alignment_pairs") and logs.get("alignment_seconds"):
        rates.append(f"{logs['alignment_pairs'] / logs['alignment_seconds']:,.0f} pairs/s")
    return rates


def _memory(device: torch.device) -> str:
    """What is in use now: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return gigabytes(torch.cuda.memory_allocated(device))
    import psutil

    return gigabytes(psutil.Process().memory_info().rss)
