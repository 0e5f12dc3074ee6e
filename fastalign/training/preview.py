"""What `fastalign train CONFIG.yaml --dry-run` shows: the run as it would be, from real batches, without weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import torch

from fastalign.config import Config
from fastalign.config.hub import offline_run
from fastalign.data.text import shown
from fastalign.data.tokenization import IGNORE_INDEX
from fastalign.errors import ConfigError
from fastalign.streams.base import MicroBatch, Stream
from fastalign.training.checkpoint import checkpoint_to_resume
from fastalign.training.forecast import forecast
from fastalign.training.joining import together
from fastalign.training.memory import free_bytes, gigabytes
from fastalign.training.needs import SIDES, Shape
from fastalign.training.output import require_free_folder
from fastalign.training.plan import plan, plan_lines
from fastalign.training.prepare import Prepared, prepare, require_data

EXAMPLES = 3  # of each stream
MEASURED = 1_000  # rows of each stream whose tokens are counted
STEPS = 50  # whose batches are made for that, at most
QUANTILES = (0.5, 0.9, 0.99, 1.0)
LONGEST = 600  # characters of an example


@offline_run
@together
def dry_run(config: Config, *, overwrite: bool = False) -> dict[str, Any]:
    """What `train` would do, without its weights: reads configuration, data and tokenizer, and writes nothing.

    Args:
        config, overwrite: as for `train`.

    Returns:
        ``{"output_dir", "model", "layer", "layers", "layers_loaded", "steps", "schedule", "plan", "data"}``, what
        `preview` finds, and `lines`, which tell all of it; `refused` says why `train` would not begin.

    Raises:
        ConfigError, DataError, ModelError: as `train`, for what cannot even be shown.
    """
    require_data(config)
    refused = []
    try:
        checkpoint = checkpoint_to_resume(config)
        resumes = checkpoint is not None and checkpoint.resolve().parent == config.output_dir.resolve()
        require_free_folder(config.output_dir, overwrite, resumes=resumes, base=config.model.name_or_path)
    except ConfigError as error:
        refused.append(f"but `train` would stop here: {error}")
    run = prepare(config)
    planned = plan(run.schedule, run.streams, run.steps, run.args.world_size)
    found = preview(run, planned)
    blocks = run.hf_config.get_text_config().num_hidden_layers
    aligned = "" if run.schedule.mode == "task_only" else f"; aligned at layer {run.layer} of {blocks}"
    return {
        "output_dir": str(config.output_dir),
        "model": config.model.name_or_path,
        "layer": run.layer,
        "layers": blocks,
        "layers_loaded": run.blocks or blocks,
        "steps": run.steps,
        "schedule": run.schedule.mode,
        "plan": planned,
        "data": run.inputs.tally.as_dict(),
        **found,
        "refused": refused,
        "lines": [
            f"{config.model.name_or_path}: {run.hf_config.model_type} of {blocks} layers{aligned}",
            *run.notes,
            f"{run.steps:,} steps, {run.schedule.mode}",
            *plan_lines(planned, run.streams),
            *run.inputs.tally.lines(),
            *preview_lines(found),
            *refused,
        ],
    }


def preview(run: Prepared, planned: Mapping[str, Any]) -> dict[str, Any]:
    """Token counts, examples, and what the run will need.

    Args:
        run: up to its model. planned: its streams that are trained on, as `plan` describes them.

    Returns:
        ``{"streams": {name: {"rows_measured", "tokens": {quantile: count}, "marked_share", "examples": [{"where",
        "language", "parts": [[text, whether it is trained on or pooled]]}]}}, "trainable", "seconds", "memory",
        "unknown", "free_bytes"}``; seconds, memory and unknown as `forecast` says.
    """
    looks, shapes = {}, {}
    for name in planned:
        stream = run.streams[name]
        examples: list[dict[str, Any]] = []
        batches = []
        for batch in first_batches(stream, planned[name]["rows"] or MEASURED, run.args.world_size):
            batches.append(batch)
            if len(examples) < EXAMPLES:  # now: a stream forgets the rows it is done with
                examples += islice(_examples(stream, batch, run.tokenizer), EXAMPLES - len(examples))
        looks[name] = {**_look(batches), "examples": examples}
        shapes[name] = shape_of(stream, batches)
    steps = {name: row["steps"] for name, row in planned.items()}
    ranks = run.args.world_size
    needs = forecast(run.config, run.hf_config, shapes, steps, run.args.device, ranks=ranks, blocks=run.blocks)
    return {
        "streams": looks,
        "trainable": needs["trainable"],
        "seconds": needs["seconds"],
        "memory": needs["memory"],
        "unknown": needs["unknown"],
        "free_bytes": free_bytes(run.args.device),
    }


def preview_lines(found: Mapping[str, Any]) -> list[str]:
    """`preview` in words."""
    names = ["50%", "90%", "99%", "longest"]
    lines = ["", f"{'tokens of a row':<18}" + "".join(f"{name:>9}" for name in names) + "   trained on or pooled"]
    for name, look in found["streams"].items():
        counts = "".join(f"{count:>9,}" for count in look["tokens"].values())
        lines.append(f"{name:<18}{counts}   {100 * look['marked_share']:.0f}% (of {look['rows_measured']:,} rows)")
    for name, look in found["streams"].items():
        what = "⟦what is learnt⟧" if name == "task" else "⟦what is pooled⟧"
        lines += ["", f"{name}, as the model sees it: {what}"]
        for example in look["examples"]:
            text = "".join(f"⟦{part}⟧" if marked else part for part, marked in example["parts"])
            lines.append(f"  {example['where']} ({example['language']})")
            lines.append(f"    {shown(text, LONGEST)}")
    memory = found["memory"]
    free = gigabytes(found["free_bytes"])
    lines += ["", f"trainable   {found['trainable']:,} numbers in the adapter"]
    if memory is None:
        lines.append(f"memory      {found['unknown']}; free now {free}")
    else:
        parts = ", ".join(f"{name} {gigabytes(count)}" for name, count in memory["items"].items() if count)
        lines.append(f"memory      about {gigabytes(memory['peak'])} ({parts}); free now {free}")
    lines.append(f"time        about {_duration(found['seconds'])} for the steps; a rough number, without evaluation")
    if memory is not None and memory["peak"] > found["free_bytes"]:
        lines.append(
            "this will not fit: lower alignment.micro_batch_size and training.per_device_train_batch_size, set "
            "training.gradient_checkpointing: true or model.quantization: nf4; fastalign memory shows what would"
        )
    return lines


def shape_of(stream: Stream, batches: Sequence[MicroBatch]) -> Shape:
    """What a stream puts through the model, by the first batches of it."""
    sides = SIDES.get(stream.name, 1)
    widths = [batch.inputs["input_ids"].shape[1] for batch in batches]
    return Shape(
        rows_per_step=sides * stream.rows_per_step,
        rows_per_forward=sides * min(stream.micro_batch_size, stream.rows_per_step),
        width=max(widths),
        usual_width=sum(widths) / len(widths),
        blocks=stream.blocks,
        labels=max(batch.items for batch in batches) if stream.blocks is None else None,
    )


def first_batches(stream: Stream, there: int, world_size: int) -> Iterator[MicroBatch]:
    """Of the run, until they hold `MEASURED` rows or about as many as there are."""
    rows = 0
    for index in range(STEPS):
        for batch in stream.micro_batches(index, 0, world_size):
            yield batch
            rows += len(batch.rows)
            if rows >= min(there, MEASURED):
                return


def _look(batches: list[MicroBatch]) -> dict[str, Any]:
    lengths = torch.cat([batch.inputs["attention_mask"].sum(dim=1) for batch in batches])
    marked = sum(int(_marks(batch).sum()) for batch in batches)
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    counts = torch.quantile(lengths.double(), levels, interpolation="higher").int().tolist()
    return {
        "rows_measured": len({row for batch in batches for row in batch.rows}),
        "tokens": {str(level): count for level, count in zip(QUANTILES, counts, strict=True)},
        "marked_share": marked / int(lengths.sum()),
    }


def _marks(batch: MicroBatch) -> torch.Tensor:
    """Whether a token is learnt, or pooled; (N, T)."""
    labels = batch.inputs.get("labels")
    return batch.inputs["pool_mask"].bool() if labels is None else labels != IGNORE_INDEX


def _examples(stream: Stream, batch: MicroBatch, tokenizer: Any) -> Iterator[dict[str, Any]]:
    marks = _marks(batch)
    for i, row in enumerate(batch.rows):
        parts: list[tuple[str, bool]] = []
        for side in range(i, len(marks), len(batch.rows)):  # the translation stands in the second half
            parts += [("  =  ", False)] if parts else []
            real = int(batch.inputs["attention_mask"][side].sum())
            ids, learnt = batch.inputs["input_ids"][side, :real].tolist(), marks[side, :real].tolist()
            for marked, run in groupby(zip(ids, learnt, strict=True), key=lambda pair: pair[1]):
                parts.append((tokenizer.decode([token for token, _ in run]), marked))
        yield {"where": stream.where(row), "language": stream.language(stream.train[row]), "parts": parts}


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
