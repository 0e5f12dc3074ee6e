"""Ctrl-C, or a machine that is taken away, during training: finish the step, save a checkpoint, stop."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from transformers import TrainerCallback

from fastalign.streams.base import sum_over_ranks

# Ctrl-C; what rented machines and launchers send; a terminal that was closed.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class SaveOnInterrupt(TrainerCallback):
    """The first signal ends the run after the present step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the signals, but those that are ignored, as under nohup; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer to save and stop, on all ranks at the same step if any of them was interrupted."""
        if sum_over_ranks([float(self.interrupted)], args.device)[0] > 0:
            self.interrupted = True
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
        if self.interrupted:
            self.release()
            raise KeyboardInterrupt
        self.interrupted = True
        print(
            f"\n{signal.Signals(number).name}: finishing this step, then saving a checkpoint (once more: stop at once)",
            file=sys.stderr,
        )
