"""The protocol of a stream.

The trainer asks a stream for the micro-batches of its k-th optimizer step, lets it look at all of them once
(`begin_step`), and then takes the loss of each. A stream scales its losses itself, so that the sum over the
micro-batches, averaged over the ranks, is the loss of the step.
"""

from __future__ import annotations

import abc
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from fastalign.data.sampling import Sampler
from fastalign.data.streaming import StreamedRows


@dataclass
class MicroBatch:
    """What goes through the model at once.

    Attributes:
        inputs: tensors, on the CPU until the trainer moves them.
        tokens: that are not padding, for the log.
        items: what the loss is a mean over: answer tokens, or pairs.
        rows: numbers of the training rows; none in evaluation.
    """

    inputs: dict[str, torch.Tensor]
    tokens: int
    items: int
    rows: Sequence[int] = ()

    def to(self, device: torch.device) -> MicroBatch:
        moved = {name: part.to(device, non_blocking=True) for name, part in self.inputs.items()}
        return replace(self, inputs=moved)


class Stream(abc.ABC):
    """Data, collation and loss of one kind of batch.

    Attributes:
        name: of the stream, the prefix of its metrics.
        train, held_out: its rows.
        sampler: the order of its training rows. `StreamedRows` are rows and order in one.
        weight: factor of the loss in training; the logged loss is without it.
        blocks: of the model that run, from below; None: all, and the head.
        memory_keys: what to change in the configuration where memory runs out, with the present values.
        rows_per_step: rows of an optimizer step on one rank.
        micro_batch_size: rows of a forward, at most; where it does not divide, all are about equally large.
    """

    name: str
    train: Sequence[Any] | StreamedRows
    held_out: Sequence[Any]
    sampler: Sampler | StreamedRows
    rows_per_step: int
    micro_batch_size: int
    weight: float = 1.0
    blocks: int | None = None
    memory_keys: Sequence[str] = ()

    def steps_per_epoch(self, world_size: int) -> float:
        """Optimizer steps that read as many rows as there are; infinite where that is not known."""
        if isinstance(self.sampler, StreamedRows):
            return math.inf
        return len(self.sampler) / (self.rows_per_step * world_size)

    def micro_batches(self, index: int, rank: int, world_size: int) -> list[MicroBatch]:
        """This rank's part of the stream's optimizer step number `index`; a pure function of its arguments."""
        start = (index * world_size + rank) * self.rows_per_step
        rows = self.sampler.rows(start, start + self.rows_per_step)
        count = -(-len(rows) // self.micro_batch_size)
        edges = [i * len(rows) // count for i in range(count + 1)]
        parts = [rows[first:end] for first, end in pairwise(edges)]
        return [replace(self.collate(part), rows=part) for part in parts]

    def collate(self, rows: Sequence[int]) -> MicroBatch:
        """A micro-batch of the training rows with these numbers."""
        return self._collate([self.train[row] for row in rows])

    @abc.abstractmethod
    def _collate(self, rows: Sequence[Any]) -> MicroBatch:
        """A micro-batch of these rows."""

    @staticmethod
    @abc.abstractmethod
    def language(row: Any) -> str:
        """Language of one of its rows, or the direction of a pair."""

    def where(self, row: int) -> str:
        """File and line of the training row with this number, for messages."""
        if isinstance(self.train, StreamedRows):
            return self.train.where(row)
        return self.train[row].where

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


def gather_over_ranks(items: list[str]) -> list[str]:
    """The items of all ranks, in the order of the ranks; on one rank its own."""
    world_size = rank_and_world_size()[1]
    if world_size == 1:
        return items
    parts: list[list[str]] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def with_other_ranks(own: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """The tensors of all ranks, one behind the other along `dim`, in which they may differ in size.

    This rank's part keeps its graph; no gradient goes to those of the others.
    """
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return own
    counts = [torch.zeros(1, dtype=torch.int64, device=own.device) for _ in range(world_size)]
    torch.distributed.all_gather(counts, torch.tensor([own.shape[dim]], device=own.device))
    sizes = [int(count) for count in counts]
    rows = own.detach().movedim(dim, 0)
    padded = rows.new_zeros(max(sizes), *rows.shape[1:])
    padded[: sizes[rank]] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    torch.distributed.all_gather(parts, padded)
    everyone = [part[:size].movedim(0, dim) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat([*everyone[:rank], own, *everyone[rank + 1 :]], dim=dim)


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) without a process group."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def is_first_rank() -> bool:
    """Whether this is rank 0, also before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def say(*lines: str) -> None:
    """Tell the user, on stderr and once, whatever the number of ranks."""
    if is_first_rank():
        for line in lines:
            print(line, file=sys.stderr, flush=True)


def my_share(count: int) -> list[tuple[int, bool]]:
    """(number, counts) of the evaluation batches of this rank: equally many on all ranks, as ZeRO-3 needs.

    A rank that would have one batch fewer runs its first once more and does not count it.
    """
    rank, world_size = rank_and_world_size()
    mine = [(i, True) for i in range(rank, count, world_size)]
    rounds = -(-count // world_size)
    return mine + [(0, False)] * (rounds - len(mine))
