"""Ctrl-C during training: finish the step, save a checkpoint, stop."""

from __future__ import annotations

import signal
import sys
import threading
from typing import Any

from transformers import TrainerCallback

from fastalign.streams.base import sum_over_ranks


class SaveOnInterrupt(TrainerCallback):
    """The first SIGINT ends the run after the present step, with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._previous: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over SIGINT; only the main thread can."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask the trainer to save and stop, on all ranks at the same step if any of them was interrupted."""
        if sum_over_ranks([float(self.interrupted)], args.device)[0] > 0:
            self.interrupted = True
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give SIGINT back."""
        self.release()

    def release(self) -> None:
        """Give SIGINT back to whoever had it; harmless when called twice."""
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _note(self, number: int, frame: Any) -> None:
        if self.interrupted:
            self.release()
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nfinishing this step, then saving a checkpoint (Ctrl-C again: stop at once)", file=sys.stderr)
