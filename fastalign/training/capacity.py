"""What `fastalign memory CONFIG.yaml` shows: the peak on each GPU, item by item, and the batches that would fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastalign.config import Config, parse_memory
from fastalign.config.hub import offline_run
from fastalign.errors import ConfigError, DataError
from fastalign.model.loading import load_model_config
from fastalign.model.quantization import effective_quantization, require_quantization, stored_quantization
from fastalign.training.arguments import effective_training, training_arguments
from fastalign.training.joining import together
from fastalign.training.memory import gigabytes
from fastalign.training.needs import (
    CONTEXT,
    SIDES,
    SPARE,
    Needs,
    Shape,
    Target,
    gpu_target,
    memory,
    memory_for,
    needs_of,
    target,
    usable,
)
from fastalign.training.plan import plan
from fastalign.training.prepare import aligned_layers, loaded_blocks, prepare, require_data
from fastalign.training.preview import first_batches, shape_of
from fastalign.training.schedule import Schedule

SIZES = tuple(2**i for i in range(8))  # micro-batches of the table
MOST = 2**16  # that is looked for
WAYS = (("none", True), ("nf4", False), ("nf4", True))  # (quantization, checkpointing) that may help, cheapest first
WORDS = {"buckets": "buckets of gradients", "gathered": "gathered by ZeRO-3"}  # for items whose name says too little
OF_STREAMS = ("activations", "logits", "workspace")  # items that each stream has lines of its own for


@offline_run
@together
def memory_report(config: Config, *, gpu_memory: str | None = None, gpus: int | None = None) -> dict[str, Any]:
    """The predicted peak of a run. No weights are read: the model's config, the tokenizer, and the data if they can be.

    Args:
        gpu_memory: such as ``8GB``; not given: that of the GPU here, if there is one.
        gpus: ranks of the run; not given: those of the launch.

    Returns:
        ``{"peak_bytes", "items": {item: bytes}, "largest_micro_batch": {stream: count, 0 if none fits}, "streams":
        {name: bytes, rows, width and where they are from}, "table": [{"micro_batch", stream: peak}], "context_bytes",
        "gpu_memory_bytes", "fits", "gpus", "zero", "lines"}``. The items add up to the peak, without the context.
        What is compared with a GPU's memory is None where none is known.

    Raises:
        ConfigError: a size that is none, or a GPU that cannot hold the model with one row a forward: says what would.
        ModelError, DataError: as `train`.
    """
    room = None if gpu_memory is None else parse_memory(gpu_memory, "--gpu-memory")
    run = _described(config)
    config, shapes, here, ranks = run.config, run.shapes, run.device, gpus or run.ranks
    computes = gpu_target(config) if gpu_memory is not None else target(config, here)
    if room is None and here.type == "cuda":
        room = torch.cuda.get_device_properties(here).total_memory
    needs = needs_of(config, run.hf_config, computes, run.blocks)
    limit = None if room is None else usable(room, on_gpu=True)

    def peak(needs: Needs, config: Config, counts: Mapping[str, int]) -> int:
        sized = {name: _sized(shapes[name], name, count) for name, count in counts.items()}
        return int(memory(config, needs, sized, ranks)["peak"])

    if room is not None and limit is not None and peak(needs, config, dict.fromkeys(shapes, 1)) > limit:
        raise ConfigError(_too_small(run, computes, room, dict.fromkeys(shapes, 1), peak))
    found = memory(config, needs, shapes, ranks)
    largest = {}
    for name in shapes if limit is not None else ():
        largest[name] = _largest(lambda n, name=name: peak(needs, config, {name: n}) <= (limit or 0))
    result = {
        "peak_bytes": found["peak"],
        "items": found["items"],
        "largest_micro_batch": largest,
        "streams": {
            name: {
                **part,
                "micro_batch": shapes[name].rows_per_forward // SIDES.get(name, 1),
                "rows": shapes[name].rows_per_forward,
                "width": shapes[name].width,
                "width_from": run.widths_from,
            }
            for name, part in found["streams"].items()
        },
        "table": [{"micro_batch": n, **{name: peak(needs, config, {name: n}) for name in shapes}} for n in SIZES],
        "context_bytes": CONTEXT if computes.on_gpu else 0,
        "gpu_memory_bytes": room,
        "fits": None if limit is None else found["peak"] <= limit,
        "gpus": ranks,
        "zero": found["zero"],
        "notes": run.notes,
    }
    return {**result, "lines": _lines(config, result, limit)}


@dataclass(frozen=True)
class _Run:
    """What is known of a run without its weights.

    Attributes:
        config: with the effective ``training`` section.
        hf_config: of the whole model, from transformers.
        shapes: of each stream. widths_from: where the widths of their rows are from, in words.
        device: that is here. ranks: of the launch. blocks: that are loaded; None: all, and the head.
        notes: what has to be said of how the model is loaded.
    """

    config: Config
    hf_config: Any
    shapes: dict[str, Shape]
    widths_from: str
    device: torch.device
    ranks: int
    blocks: int | None
    notes: list[str]


def _described(config: Config) -> _Run:
    """From the data, as the dry run reads them, or where they cannot be read from the longest rows that are allowed."""
    try:
        require_data(config)
        run = prepare(config)
    except (ConfigError, DataError) as error:
        if isinstance(error, ConfigError) and "data is missing" not in str(error):
            raise
        return _undescribed(config, str(error))
    planned = plan(run.schedule, run.streams, run.steps, run.args.world_size)
    shapes = {}
    for name in planned:
        batches = list(first_batches(run.streams[name], planned[name]["rows"] or 1, run.args.world_size))
        shapes[name] = shape_of(run.streams[name], batches)
    args = run.args
    return _Run(run.config, run.hf_config, shapes, "data", args.device, args.world_size, run.blocks, run.notes)


def _undescribed(config: Config, why: str) -> _Run:
    hf_config = load_model_config(config.model)
    config = replace(config, training=effective_training(replace(config, training={**config.training}), True))
    args = training_arguments(config.training)
    text = hf_config.get_text_config()
    notes = require_quantization(config.model, hf_config, args.device)
    blocks = max(aligned_layers(config, text.num_hidden_layers))
    context = getattr(text, "max_position_embeddings", None) or 2**30
    rows = args.per_device_train_batch_size
    pairs = config.alignment.batch_size
    micro = config.alignment.micro_batch_size or -(-pairs // args.gradient_accumulation_steps)
    known = {
        "task": Shape(rows * args.gradient_accumulation_steps, rows, min(config.task.max_length, context)),
        "alignment": Shape(2 * pairs, 2 * min(micro, pairs), min(config.alignment.max_length, context), blocks),
    }
    names = Schedule(config.schedule.mode, config.schedule.ratio).streams
    return _Run(
        config,
        hf_config,
        {name: known[name] for name in names},
        f"max_length, because {why}",
        args.device,
        args.world_size,
        loaded_blocks(config, hf_config, blocks, task_evaluated=False, notes=notes),
        notes,
    )


def _sized(shape: Shape, name: str, count: int) -> Shape:
    """The same with another micro-batch; its rows have as many labels as before."""
    rows = SIDES.get(name, 1) * count
    labels = None if shape.labels is None else -(-shape.labels * rows // shape.rows_per_forward)
    return replace(shape, rows_per_forward=rows, rows_per_step=max(rows, shape.rows_per_step), labels=labels)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest count that fits, 0 if none does."""
    low, high = 0, MOST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _too_small(
    run: _Run,
    computes: Target,
    room: int,
    ones: Mapping[str, int],
    peak: Callable[[Needs, Config, Mapping[str, int]], int],
) -> str:
    """What to say of a GPU that cannot hold the model, and what would fit."""
    config = run.config
    held, stored = effective_quantization(config.model, run.hf_config), stored_quantization(run.hf_config)
    needs = needs_of(config, run.hf_config, computes, run.blocks)
    least = peak(needs, config, ones)
    words = (
        f"--gpu-memory: {gigabytes(room)} is too small for {config.model.name_or_path!r}: its weights take "
        f"{gigabytes(needs.skeleton.weights)}, and with one row a forward it needs {gigabytes(least)} and "
        f"{gigabytes(CONTEXT)} for the driver"
    )
    for quantization, checkpointing in WAYS:
        settings = {
            **({} if quantization == held or stored else {"model.quantization": quantization}),
            **({"training.gradient_checkpointing": "true"} if checkpointing and not needs.checkpointing else {}),
        }
        if not settings or "none" in settings.values():
            continue
        changed = replace(
            config,
            model=replace(config.model, quantization=quantization),
            training={**config.training, "gradient_checkpointing": checkpointing or needs.checkpointing},
        )
        wanted = peak(needs_of(changed, run.hf_config, computes, run.blocks), changed, ones)
        if wanted <= usable(room, on_gpu=True):
            said = " and ".join(f"{key}: {value}" for key, value in settings.items())
            return f"{words}; with {said} it would fit: {gigabytes(wanted)}"
        least = min(least, wanted)
    helps = ["model.quantization: nf4"] if held == "none" else []
    helps += [] if needs.checkpointing else ["training.gradient_checkpointing: true"]
    spared = f" (with {' and '.join(helps)})" if helps else ""
    wanted = gigabytes(memory_for(least, on_gpu=True))
    return f"{words}; take a GPU of {wanted}{spared}, a smaller model, or shorter rows"


def _lines(config: Config, found: Mapping[str, Any], limit: int | None) -> list[str]:
    """The report in words."""
    where = "on the GPU" if found["context_bytes"] else "on the CPU"
    where = where if found["gpus"] == 1 else f"on each of {found['gpus']} ranks"
    lines = [f"{config.model.name_or_path}: what is needed {where}; no weights are read", *found["notes"], ""]
    items = {name: count for name, count in found["items"].items() if name not in OF_STREAMS}
    lines += [f"{WORDS.get(name, name):<26}{gigabytes(count):>10}" for name, count in items.items()]
    for name, part in found["streams"].items():
        unit = "pairs" if name == "alignment" else "rows"
        size = f"{part['micro_batch']:,} {unit}, {part['rows']:,} x {part['width']:,} tokens"
        lines.append(f"{'activations, ' + name:<26}{gigabytes(part['activations']):>10}   {size}")
        if part["logits"]:
            lines.append(f"{'logits, ' + name:<26}{gigabytes(part['logits']):>10}   gone before the workspace comes")
        lines.append(f"{'workspace, ' + name:<26}{gigabytes(part['workspace']):>10}")
    lines.append(f"{'peak':<26}{gigabytes(found['peak_bytes']):>10}   the streams take turns: the larger one counts")
    if found["zero"]:
        stage, saved = found["zero"]["stage"], gigabytes(found["zero"]["saved"])
        lines.append(f"ZeRO-{stage} over {found['gpus']} GPUs: {saved} lie on the others, or in the CPU's memory")
    if found["context_bytes"]:
        lines.append(f"{'driver and libraries':<26}{gigabytes(CONTEXT):>10}   assumed, beside the peak")
    names = list(found["streams"])
    lines += ["", f"widths of the rows: {found['streams'][names[0]]['width_from']}", ""]
    lines.append(f"{'micro-batch':<12}" + "".join(f"{name:>16}" for name in names) + "   peak by its size, GB")
    for row in found["table"]:
        cells = [f"{row[name] / 1e9:.2f}" + ("  " if limit is None or row[name] <= limit else " *") for name in names]
        lines.append(f"{row['micro_batch']:<12,}" + "".join(f"{cell:>16}" for cell in cells))
    if limit is None:
        return [*lines, "", "give --gpu-memory 8GB to see what fits a GPU of that size"]
    spare = f"{SPARE[True]:.0%} kept free for what the allocator cannot use"
    largest = ", ".join(f"{name} {count:,}" for name, count in found["largest_micro_batch"].items())
    lines += ["", f"into {gigabytes(found['gpu_memory_bytes'])} ({spare}; *: does not fit): at most {largest}"]
    if not found["fits"]:
        lines.append("this config does not fit: lower training.per_device_train_batch_size (rows of the task) or")
        lines.append("alignment.micro_batch_size (pairs) to these, or set training.gradient_checkpointing: true")
    return lines
