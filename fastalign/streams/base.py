"""The protocol of a stream.

The trainer asks a stream for the micro-batches of its k-th optimizer step, lets it look at all of them once
(`begin_step`), and then takes the loss of each. A stream scales its losses itself, so that the sum over the
micro-batches, averaged over the ranks, is the loss of the step.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn

from fastalign.data.sampling import Sampler


@dataclass
class MicroBatch:
    """What goes through the model at once.

    Attributes:
        inputs: tensors, on the CPU until the trainer moves them.
        tokens: that are not padding, for the log.
        items: what the loss is a mean over: answer tokens, or pairs.
    """

    inputs: dict[str, torch.Tensor]
    tokens: int
    items: int

    def to(self, device: torch.device) -> MicroBatch:
        moved = {name: part.to(device, non_blocking=True) for name, part in self.inputs.items()}
        return MicroBatch(moved, self.tokens, self.items)


class Stream(abc.ABC):
    """Data, collation and loss of one kind of batch.

    Attributes:
        name: of the stream, the prefix of its metrics.
        sampler: the order of its training rows.
        weight: factor of the loss in training; the logged loss is without it.
        rows_per_step: rows of an optimizer step on one rank.
        micro_batch_size: rows of a forward, at most; where it does not divide, all are about equally large.
    """

    name: str
    sampler: Sampler
    rows_per_step: int
    micro_batch_size: int
    weight: float = 1.0

    def steps_per_epoch(self, world_size: int) -> float:
        """Optimizer steps that read as many rows as there are."""
        return len(self.sampler) / (self.rows_per_step * world_size)

    def micro_batches(self, index: int, rank: int, world_size: int) -> list[MicroBatch]:
        """This rank's part of the stream's optimizer step number `index`; a pure function of its arguments."""
        start = (index * world_size + rank) * self.rows_per_step
        rows = self.sampler.rows(start, start + self.rows_per_step)
        count = -(-len(rows) // self.micro_batch_size)
        edges = [i * len(rows) // count for i in range(count + 1)]
        return [self.collate(rows[first:end]) for first, end in pairwise(edges)]

    @abc.abstractmethod
    def collate(self, rows: Sequence[int]) -> MicroBatch:
        """A micro-batch of the training rows with these numbers."""

    def begin_step(self, model: nn.Module, micro_batches: Sequence[MicroBatch]) -> None:
        """Called once before the losses of an optimizer step, on all ranks, with all of this rank's micro-batches."""
        return None

    @abc.abstractmethod
    def loss(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """Scalar with gradient: this micro-batch's share of the step's loss. `model` may be wrapped."""

    @property
    @abc.abstractmethod
    def can_evaluate(self) -> bool:
        """Whether enough is held out for `evaluate` to measure anything."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """Metrics on the held-out rows, the same on all ranks; empty where nothing is held out."""


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Element-wise sum over all ranks; on one rank the values themselves."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(values)
    total = torch.tensor(values, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    torch.distributed.all_reduce(total)
    return total.tolist()


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def my_share(count: int) -> list[tuple[int, bool]]:
    """(number, counts) of the evaluation batches of this rank: equally many on all ranks, as ZeRO-3 needs.

    A rank that would have one batch fewer runs its first once more and does not count it.
    """
    rank, world_size = rank_and_world_size()
    mine = [(i, True) for i in range(rank, count, world_size)]
    rounds = -(-count // world_size)
    return mine + [(0, False)] * (rounds - len(mine))
