"""Which settings keep a run within a memory: as little as possible is given up for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from fastalign.config import config_from_dict
from fastalign.errors import ConfigError
from fastalign.training.memory import gigabytes
from fastalign.training.needs import Shape, Target, memory, memory_for, needs_of, usable

STEP = 16  # rows of the task in an optimizer step
ENOUGH = (4, 16)  # rows and pairs of a forward: to get more, nothing is given up
# (quantization, gradient checkpointing), in the order of what they cost.
RUNGS = (("none", False), ("none", True), ("nf4", False), ("nf4", True))


@dataclass(frozen=True)
class Fit:
    """Settings: `rows` of the task and `pairs` of a forward. `peak`: predicted bytes, None if nothing is known."""

    quantization: str
    checkpointing: bool
    rows: int
    pairs: int
    peak: int | None


@dataclass(frozen=True)
class Needs:
    """What there is to run.

    Attributes:
        name: of the model. hf_config: from transformers. dtype: number format of the base.
        widths: stream to the tokens of its widest rows.
        blocks: that an alignment batch runs. batch: pairs of an optimizer step.
    """

    name: str
    hf_config: Any
    dtype: torch.dtype
    widths: dict[str, int]
    blocks: int
    batch: int


def unknown_model(on_gpu: bool) -> Fit:
    """Careful settings for a model that nothing is known of."""
    return Fit("nf4" if on_gpu else "none", on_gpu, 1, 8, None)


def fit(needs: Needs, room: int, on_gpu: bool) -> Fit:
    """The settings that cost least and keep the predicted peak below what of the memory is usable.

    More memory never gives a smaller forward: one beyond `ENOUGH` is only taken where nothing was given up for it.

    Args:
        room: bytes of the memory. on_gpu: whether it is a GPU's.

    Raises:
        ConfigError: nothing helps; says what is needed, and what would fit.
    """
    limit = usable(room, on_gpu)
    half = needs.dtype if needs.dtype.itemsize == 2 else None
    computes = Target(needs.dtype, half if on_gpu else None, on_gpu)
    weights: dict[str, int] = {}

    def peak(quantization: str, checkpointing: bool, rows: int, pairs: int) -> int:
        raw = {"model": {"quantization": quantization}, "training": {"gradient_checkpointing": checkpointing}}
        config = config_from_dict(raw)
        found = needs_of(config, needs.hf_config, computes)
        weights[quantization] = found.skeleton.weights
        shapes = {
            "task": Shape(STEP, rows, needs.widths.get("task", 0)),
            "alignment": Shape(2 * needs.batch, 2 * pairs, needs.widths.get("alignment", 0), needs.blocks),
        }
        wanted = {name: shape for name, shape in shapes.items() if shape.width and shape.rows_per_forward}
        return int(memory(config, found, wanted)["peak"])

    enough = (ENOUGH[0], min(ENOUGH[1], needs.batch))
    most = (STEP, needs.batch) if on_gpu else enough
    rungs = [rung for rung in RUNGS if on_gpu or rung[0] == "none"]
    for rung in rungs:
        last = rung == rungs[-1]
        if not last and peak(*rung, *enough) > limit:
            continue
        best = most if rung == rungs[0] else enough
        rows = _largest(best[0], lambda n, rung=rung: peak(*rung, n, 0) <= limit)
        pairs = _largest(best[1], lambda n, rung=rung: peak(*rung, 0, n) <= limit)
        if rows and pairs:
            return Fit(*rung, rows, pairs, peak(*rung, rows, pairs))
    least = peak(*rungs[-1], 1, 1)
    raise ConfigError(_too_large(needs, room, on_gpu, least, weights[rungs[-1][0]]))


def _largest(most: int, fits: Callable[[int], bool]) -> int | None:
    halves: Iterable[int] = (most >> i for i in range(most.bit_length()))
    return next((count for count in halves if fits(count)), None)


def _too_large(needs: Needs, room: int, on_gpu: bool, least: int, weights: int) -> str:
    """What to say of a model that cannot fit."""
    wanted = gigabytes(memory_for(least, on_gpu))
    spared = "model.quantization: nf4, gradient checkpointing and" if on_gpu else "gradient checkpointing and"
    lengths = " and ".join(f"{name}.max_length {width:,}" for name, width in needs.widths.items())
    beside = least - weights
    words = f"{needs.name!r} does not fit into {gigabytes(room)}: even with {spared} one row a forward "
    words += f"({lengths}) it needs about {gigabytes(least)}, so take {'a GPU' if on_gpu else 'a machine'} of {wanted}"
    left = usable(room, on_gpu) - beside
    if left > beside / 2:
        return f"{words}, or a model of at most {left / weights:.0%} of its size"
    return f"{words}, a smaller model, or shorter rows"
