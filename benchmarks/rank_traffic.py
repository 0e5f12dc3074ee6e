"""What a rank gives to collectives and gets from them in an optimizer step, by formula: for bench_ranks.py.

Bytes, with W ranks; T are those of the adapter, and small figures (a norm, a count, a flag) are 4 or 8 bytes each:

- every step: 8 in an all-reduce (was a rank interrupted); a task step: 8 more (answer tokens of all ranks).
- DDP: all-reduce of T; a broadcast of the model's buffers.
- ZeRO-1: all-reduce of T and of a norm; all-gather of T, of which every rank has updated its W-th part.
- ZeRO-2: as ZeRO-1, but with an all-reduce of T in every backward.
- ZeRO-3 where all is parted, nothing fetched ahead and nothing kept: all-gather of the embedding and of every block
  that runs (the task: and of the final norm and the head) in every forward, and again in every backward, but for the
  embedding and what comes before the first adapter; reduce-scatter of the gradients that a backward reaches; a norm.
- negatives of all ranks: all-gathers of the vectors (layers x 2 x n x D x 4), of the meanings (8 n), and of n, twice.

The offload variants send the same. A parameter that W does not divide is padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Traffic = dict[str, tuple[int, int]]  # operation: bytes in, bytes out
Weight = Mapping[str, Any]  # name, numel, itemsize, trained
REDUCE, GATHER, GATHER_LISTS = "allreduce_", "_allgather_base_", "allgather_"
SCATTER, BROADCAST = "_reduce_scatter_base_", "broadcast_"


@dataclass(frozen=True)
class Step:
    """An optimizer step of `streams`; of the alignment: pairs on a rank, forwards with a gradient, blocks that run."""

    streams: Sequence[str]
    ranks: int
    pairs: int
    forwards: int
    blocks: int
    width: int
    world: bool


def expected(wrapper: str, step: Step, weights: Sequence[Weight], buffers: int) -> Traffic:
    """Bytes of a step, by operation. `wrapper`: ddp, or a preset of ZeRO; `buffers`: bytes of the model's."""
    given, taken = Counter(), Counter()

    def add(operation: str, bytes_in: int, bytes_out: int) -> None:
        given[operation] += bytes_in
        taken[operation] += bytes_out

    ranks, stage = step.ranks, 0 if wrapper == "ddp" else int(wrapper[len("zero")])
    trained = [weight for weight in weights if weight["trained"]]
    whole = sum(_bytes(weight) for weight in trained)
    small = 8 + 8 * ("task" in step.streams) + (0, 4, 4, 8)[stage]
    backwards = sum(step.forwards if name == "alignment" else 1 for name in step.streams)
    if stage < 3:
        reduced = whole * (backwards if stage == 2 else 1) + small
        add(REDUCE, reduced, reduced)
    if stage == 0:
        add(BROADCAST, buffers, buffers)
    elif stage < 3:
        size = trained[0]["itemsize"]
        padded = _up(whole // size, 2 * ranks) * size
        add(GATHER, padded // ranks, padded)
    else:
        add(REDUCE, small, small)
        for name in step.streams:
            for part, times in _passes(name, step, weights):
                size = sum(_padded(weight, ranks) for weight in part)
                add(GATHER, times * size // ranks, times * size)
            times = step.forwards if name == "alignment" else 1
            size = sum(_padded(weight, ranks) for weight in trained if _runs(name, step, weight))
            add(SCATTER, times * size, times * size // ranks)
    if step.world and "alignment" in step.streams:
        own = 8 + 2 * step.pairs * step.width * 4 + 8 + 8 * step.pairs
        add(GATHER_LISTS, own, own * ranks)
    return {operation: (given[operation], taken[operation]) for operation in given}


def _passes(stream: str, step: Step, weights: Sequence[Weight]) -> Iterable[tuple[list[Weight], int]]:
    """(weights, how often a step goes through them), forwards and backwards."""
    forward = [weight for weight in weights if _runs(stream, step, weight)]
    backward = [weight for weight in forward if not _before_the_adapter(weight)]
    if stream == "task":
        return [(forward, 1), (backward, 1)]
    again = step.forwards if step.forwards > 1 else 0  # cached gradients: all are embedded first, without a graph
    return [(forward, again + step.forwards), (backward, step.forwards)]


def _runs(stream: str, step: Step, weight: Weight) -> bool:
    _, in_block, rest = weight["name"].partition(".layers.")
    if in_block:
        return stream == "task" or int(rest.partition(".")[0]) < step.blocks
    return stream == "task" or "embed_tokens" in weight["name"]


def _before_the_adapter(weight: Weight) -> bool:
    """Whether no gradient comes to it: of a Llama the embedding, and in the first block what it goes through alone."""
    _, in_block, rest = weight["name"].partition(".layers.0.")
    if not in_block:
        return "embed_tokens" in weight["name"]
    first = ("q_proj", "k_proj", "v_proj")
    return "input_layernorm" in rest or ("base_layer" in rest and any(name in rest for name in first))


def _bytes(weight: Weight) -> int:
    return weight["numel"] * weight["itemsize"]


def _padded(weight: Weight, ranks: int) -> int:
    return _up(weight["numel"], ranks) * weight["itemsize"]


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
