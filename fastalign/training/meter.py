"""What every stream did: loss, gradient norm, tokens and seconds, per stream and never mixed.

The meter lives in the trainer's callbacks, so that checkpoints carry it and a resumed run reports the whole run.
Losses stay on the device until they are logged, and times on a GPU are those of the GPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from fastalign.streams.base import MicroBatch, rank_and_world_size, sum_over_ranks
from fastalign.training.failures import NotFinite

COUNTERS = ("tokens", "items", "seconds")


class StreamMeter(TrainerCallback, ExportableState):
    """Per-stream history and the sums since the last log.

    Args:
        device: that is timed.
        scaled: the loss is scaled (fp16); its gradient may overflow, then a step is skipped and the scale lowered.

    Attributes:
        losses: of every optimizer step of a stream, mean over ranks, in order.
        totals: ``{stream: {tokens, items, seconds}}`` of the whole run, tokens and items summed over ranks.
        unlogged: what was booked since the last log.
        notes: anything else that a resumed run must still know, such as the retrieval before training.
    """

    def __init__(self, device: torch.device | None = None, *, scaled: bool = False) -> None:
        self._scaled = scaled
        self._cuda = device is not None and device.type == "cuda"
        self.losses: dict[str, list[float]] = {}
        self.totals: dict[str, dict[str, float]] = {}
        self.unlogged: dict[str, dict[str, Any]] = {}
        self.notes: dict[str, Any] = {}
        self._steps: dict[str, list[_Step]] = {}  # not booked yet

    @contextmanager
    def timing(self, stream: str, step: int, opens_step: bool) -> Iterator[_Step]:
        """Time a forward and backward of optimizer step number `step`; the caller `add`s to the yielded step."""
        steps = self._steps.setdefault(stream, [])
        if opens_step:
            steps.append(_Step(step))
        span = _Span(self._cuda)
        yield steps[-1]
        span.stop()
        steps[-1].spans.append(span)

    def grad_norm(self, stream: str, norm: torch.Tensor | float) -> None:
        """Note the gradient norm of the stream's present step."""
        self._steps[stream][-1].grad_norm = norm

    def settle(self, device: torch.device) -> NotFinite | None:
        """Book the steps since the last call; on all ranks at the same steps, before a log and before a checkpoint.

        Returns:
            The first step whose loss, mean over the ranks, or gradient norm is not finite; the same on all ranks.
        """
        world_size = rank_and_world_size()[1]
        bad: list[NotFinite] = []
        for stream, steps in self._steps.items():  # in the order in which they run
            if not steps:
                continue
            local = [step.loss_value() for step in steps]
            sums = sum_over_ranks([*local, sum(s.tokens for s in steps), sum(s.items for s in steps)], device)
            losses, (tokens, items) = [loss / world_size for loss in sums[:-2]], sums[-2:]
            seconds = sum(step.seconds() for step in steps)
            norms = [float(step.grad_norm) for step in steps if step.grad_norm is not None]
            found = [
                step.not_finite(stream, loss, check_norm=not self._scaled)
                for step, loss in zip(steps, losses, strict=True)
            ]
            bad += [one for one in found if one is not None]
            self.losses.setdefault(stream, []).extend(losses)
            totals = self.totals.setdefault(stream, dict.fromkeys(COUNTERS, 0.0))
            for name, value in zip(COUNTERS, (tokens, items, seconds), strict=True):
                totals[name] += value
            fresh = self.unlogged.setdefault(stream, {"losses": [], "grad_norms": [], **dict.fromkeys(COUNTERS, 0.0)})
            fresh["losses"] += losses
            fresh["grad_norms"] += norms
            for name, value in zip(COUNTERS, (tokens, items, seconds), strict=True):
                fresh[name] = fresh.get(name, 0.0) + value
            steps.clear()
        return min(bad, key=lambda found: (found.step, found.what != "loss"), default=None)

    def report(self) -> dict[str, float]:
        """Metrics for the log, of what was settled since the last report."""
        logs: dict[str, float] = {}
        for stream, fresh in sorted(self.unlogged.items()):
            logs[f"{stream}_loss"] = sum(fresh["losses"]) / len(fresh["losses"])
            if fresh["grad_norms"]:
                logs[f"{stream}_grad_norm"] = sum(fresh["grad_norms"]) / len(fresh["grad_norms"])
            logs[f"{stream}_tokens"] = int(fresh["tokens"])
            if stream == "alignment":
                logs["alignment_pairs"] = int(fresh["items"])
            logs[f"{stream}_seconds"] = fresh["seconds"]
        self.unlogged = {}
        return logs

    def summary(self) -> dict[str, dict[str, float]]:
        """The `streams` part of summary.json; loss_first and loss_last: means over a tenth of the steps, at least 3."""
        result = {}
        for stream, losses in self.losses.items():
            tenth = min(len(losses), max(3, len(losses) // 10))
            totals = self.totals[stream]
            result[stream] = {
                "steps": len(losses),
                "loss_first": sum(losses[:tenth]) / tenth,
                "loss_last": sum(losses[-tenth:]) / tenth,
                "tokens": int(totals["tokens"]),
                "seconds": totals["seconds"],
            }
            if stream == "alignment":
                result[stream]["pairs"] = int(totals["items"])
        return result

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the meter."""
        names = ("losses", "totals", "unlogged", "notes")
        return {"args": {}, "attributes": {name: getattr(self, name) for name in names}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A resumed run takes up the history of its checkpoint; another one begins with none."""
        self._steps, self.losses, self.totals, self.unlogged, self.notes = {}, {}, {}, {}, {}
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved and state.global_step > 0:
            for name, value in saved["attributes"].items():
                setattr(self, name, value)
            self.notes.setdefault("resumed_at", []).append(state.global_step)


class _Step:
    """One optimizer step of one stream."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens = self.items = 0
        self.grad_norm: torch.Tensor | float | None = None
        self.spans: list[_Span] = []
        self._losses: list[torch.Tensor] = []
        self._rows: list[Sequence[int]] = []

    def add(self, loss: torch.Tensor, micro_batch: MicroBatch) -> None:
        """Note a micro-batch and its share of the step's loss, which may still be under way on the GPU."""
        self._losses.append(loss.detach().float())
        self._rows.append(micro_batch.rows)
        self.tokens += micro_batch.tokens
        self.items += micro_batch.items

    def loss_value(self) -> float:
        return torch.stack(self._losses).sum().item()

    def not_finite(self, stream: str, loss: float, check_norm: bool) -> NotFinite | None:
        """What is wrong with the step, given its loss on all ranks; the rows are those of this rank's micro-batches."""
        if not math.isfinite(loss):
            parts = zip(self._losses, self._rows, strict=True)
            rows = [row for part, rows in parts if not bool(part.isfinite()) for row in rows]
            return NotFinite(stream, self.number, "loss", str(loss), rows)
        if check_norm and self.grad_norm is not None and not math.isfinite(float(self.grad_norm)):
            rows = [row for rows in self._rows for row in rows]
            return NotFinite(stream, self.number, "gradient norm", str(float(self.grad_norm)), rows)
        return None

    def seconds(self) -> float:
        return sum(span.seconds() for span in self.spans)


class _Span:
    """A stretch of time, of the GPU's where there is one."""

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._start = self._now()
        self._stop = self._start

    def stop(self) -> None:
        self._stop = self._now()

    def seconds(self) -> float:
        if not self._cuda:
            return self._stop - self._start
        self._stop.synchronize()
        return self._start.elapsed_time(self._stop) / 1000

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
