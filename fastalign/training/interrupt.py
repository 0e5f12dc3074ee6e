"""Ctrl-C, or a machine that is taken away, during training: finish the step, save a checkpoint, stop."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from typing import Any

from transformers import TrainerCallback

from fastalign.streams.base import sum_over_ranks

# Ctrl-C; what rented machines and launchers send; a terminal that was closed.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
PATIENCE = 1.0  # seconds after which Ctrl-C is meant as a second one


class SaveOnInterrupt(TrainerCallback):
    """The first signal ends the run after the present step, with a checkpoint; Ctrl-C later on ends it at once.

    Only Ctrl-C, and only after a moment: a terminal that closes sends SIGHUP twice, and a launcher that gets Ctrl-C
    sends SIGTERM to workers that have got it themselves.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._first: float | None = None  # when the first signal came
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals, but those that are ignored, as under nohup; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._previous[number] = signal.signal(number, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer to save and stop, on all ranks at the same step if any of them was interrupted."""
        if sum_over_ranks([float(self.interrupted)], args.device)[0] > 0:
            self.interrupted = True
            _leave_dead_outputs()
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the signals back."""
        self.release()

    def release(self) -> None:
        """Give the signals back to whoever had them; harmless when called twice."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: Any) -> None:
        if self._first is not None:
            if number == signal.SIGINT and time.monotonic() - self._first > PATIENCE:
                self.release()
                raise KeyboardInterrupt
            return
        self._first, self.interrupted = time.monotonic(), True
        _leave_dead_outputs()
        name = signal.Signals(number).name
        with contextlib.suppress(OSError):
            print(f"\n{name}: finishing this step, then saving (Ctrl-C once more: stop at once)", file=sys.stderr)


def _leave_dead_outputs() -> None:
    """What is still printed goes nowhere, instead of ending the run, where nobody can read it any more.

    As on a terminal that was closed, which is none then (`isatty`), and in a pipe to a ``tee`` that got Ctrl-C too.
    """
    if not hasattr(select, "poll"):  # Windows
        return
    for number in (1, 2):
        poll = select.poll()
        poll.register(number, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), number)
