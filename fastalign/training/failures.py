"""A run that cannot go on: memory has run out, or its numbers are no longer finite. What to say, and what to note down.

Both become a `RunError`: one line with the stream, the step, what to change, and where to continue from.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastalign.errors import RunError
from fastalign.streams.base import MicroBatch, Stream
from fastalign.training.arguments import checkpointing
from fastalign.training.checkpoint import how_to_continue, last_checkpoint
from fastalign.training.memory import free_bytes, gigabytes
from fastalign.training.needs import Shape, needs_of_model

STOPPED = "stopped.json"
SHOWN = 5  # rows that a message names


@dataclass
class Moment:
    """A forward and backward that is going on.

    Attributes:
        step: of the optimizer, counted from 1.
        allocated: bytes on the GPU when it began; 0 on the CPU.
    """

    stream: Stream
    micro_batch: MicroBatch
    step: int
    allocated: int


def out_of_memory(why: str, moment: Moment | None, model: Any, args: Any) -> RunError:
    """What there was too little memory for, how much was predicted and how much was free, and what to lower.

    Args:
        why: first line of the error that was raised.
        moment: what was going on; None between forwards, as in the optimizer and in evaluation.
        model: that is trained, in whatever wraps it.
        args: `transformers.TrainingArguments`.
    """
    go_on = how_to_continue(Path(args.output_dir))
    device = args.device
    if moment is None:
        free = gigabytes(free_bytes(device))
        return RunError(
            f"out of memory outside of a training forward ({why}); {free} is free; lower "
            "training.per_device_eval_batch_size or alignment.micro_batch_size, or set model.quantization: nf4, or "
            f"training.optim: adamw_bnb_8bit; {go_on}"
        )
    stream, micro_batch = moment.stream, moment.micro_batch
    rows, width = micro_batch.inputs["input_ids"].shape
    model_config = model.config.get_text_config()
    blocks = stream.blocks or model_config.num_hidden_layers
    shape = Shape(rows, rows, width, stream.blocks, labels=micro_batch.items if stream.blocks is None else None)
    predicted = _predicted(model, args, shape, getattr(stream, "logits_memory", None))
    free = free_bytes(device)
    if device.type == "cuda":
        free += torch.cuda.memory_allocated(device) - moment.allocated
    keys = [
        *stream.memory_keys,
        *([] if checkpointing(vars(args)) else ["set training.gradient_checkpointing: true"]),
    ]
    return RunError(
        f"out of memory in the {stream.name} stream at step {moment.step} ({why}): a forward of {rows} x "
        f"{width} = {rows * width:,} tokens ({micro_batch.tokens:,} without padding) through {blocks} layers; "
        f"{predicted}free were {free:,} "
        f"({gigabytes(free)}); "
        f"{', or '.join(keys)}; {go_on}"
    )


def _predicted(model: Any, args: Any, shape: Shape, logits_limit: int | None) -> str:
    """What there is to say of a forward's needs; nothing where the model's code cannot be looked at."""
    try:
        count = needs_of_model(model, args).above(shape, logits_limit)["peak"]
    except Exception:  # whatever goes wrong here must not hide that memory ran out
        return ""
    return f"predicted {count:,} bytes above the weights ({gigabytes(count)}), "


@dataclass
class NotFinite:
    """A step whose loss or gradient is NaN or infinite.

    Attributes:
        stream: its name.
        step: of the optimizer, counted from 1.
        what: `loss` or `gradient norm`. value: of it, as text.
        rows: numbers of the training rows that this rank blames.
    """

    stream: str
    step: int
    what: str
    value: str
    rows: Sequence[int]


def stop_not_finite(found: NotFinite, places: Sequence[str], folder: Path) -> RunError:
    """The error for a step that is not finite; all its rows are written to ``stopped.json`` in the output folder.

    Args:
        places: file and line of the rows, of all ranks.
    """
    report = {"step": found.step, "stream": found.stream, found.what: found.value, "rows": list(places)}
    try:
        (folder / STOPPED).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        listed = f"all {len(places)} in {folder / STOPPED}"
    except OSError:
        listed = f"{len(places)} in all"
    return RunError(
        f"the {found.what} of the {found.stream} stream at step {found.step} is {found.value}; rows of that batch: "
        f"{'; '.join(places[:SHOWN])} ({listed}); look at these rows, or start again with a lower "
        f"training.learning_rate; {_last_good(folder, found.step)}",
        on_all_ranks=True,
    )


def stop_ruined_adapter(streams: str, step: int, folder: Path) -> RunError:
    """The error for weights that an update has ruined, though loss and gradient before it were finite."""
    return RunError(
        f"the adapter's weights are no longer finite after step {step} ({streams}), though its loss was; start again "
        f"with a lower training.learning_rate; {_last_good(folder, step)}",
        on_all_ranks=True,
    )


def _last_good(folder: Path, step: int) -> str:
    """The newest checkpoint whose weights gave a finite loss in a later step than its own, but before `step`."""
    good = last_checkpoint(folder, below=step - 1)
    return f"the last good checkpoint is {good}" if good else "there is no checkpoint from before that"
