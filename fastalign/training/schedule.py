"""Which streams run at an optimizer step: a pure function of the step, the same on all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """The order of task and alignment steps.

    Args:
        mode: ``alternate`` (one stream per step, task first), ``joint`` (both in every step), ``task_only``,
            ``align_only``.
        ratio: alignment steps per task step under ``alternate``; 0.5 is one alignment step for two of the task.
    """

    mode: Literal["alternate", "joint", "task_only", "align_only"] = "alternate"
    ratio: float = 1.0

    def at(self, step: int) -> list[tuple[str, int]]:
        """(stream, how many steps of that stream came before) for optimizer step `step`, counted from 0.

        The last stream of a step goes through all blocks: with its optimizer on the CPU, ZeRO-3 takes the gradients
        of those parameters only that the last backward has reached.
        """
        if self.mode == "joint":
            return [("alignment", step), ("task", step)]
        if self.mode == "align_only":
            return [("alignment", step)]
        before = self.task_steps(step)
        if self.task_steps(step + 1) > before:
            return [("task", before)]
        return [("alignment", step - before)]

    def task_steps(self, steps: int) -> int:
        """Task steps among the first `steps` optimizer steps."""
        if self.mode == "align_only":
            return 0
        return math.ceil(steps / self._period)

    def steps(self, task_steps: int) -> int:
        """Optimizer steps that hold so many task steps and the alignment steps that belong to them."""
        return math.floor(task_steps * self._period)

    def counts(self, steps: int) -> dict[str, int]:
        """Steps of each stream among the first `steps` optimizer steps."""
        if self.mode != "alternate":
            return dict.fromkeys(self.streams, steps)
        task = self.task_steps(steps)
        return {"task": task, "alignment": steps - task}

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams this schedule trains on."""
        if self.mode in ("alternate", "joint"):
            return ("task", "alignment")
        return ("task",) if self.mode == "task_only" else ("alignment",)

    @property
    def _period(self) -> Fraction:
        """Optimizer steps per task step."""
        return 1 + Fraction(self.ratio).limit_denominator(10_000) if self.mode == "alternate" else Fraction(1)
