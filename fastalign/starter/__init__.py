"""`fastalign init`: a starter config for the user's model and data that runs as it is written.

It asks nothing. It looks at the rows for the template and the lengths, and at the model's own config for what fits
into the memory; what it cannot know says `FILL IN`, which `fastalign train` refuses by name.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastalign.config import TRAINING_DEFAULTS
from fastalign.config.checks import BLANK
from fastalign.config.hub import offline
from fastalign.data.text import listed
from fastalign.data.tokenization import PromptTokenizer
from fastalign.errors import ConfigError, ModelError
from fastalign.model.encode import resolve_layer
from fastalign.starter.fit import STEP, Fit, Needs, fit, unknown_model
from fastalign.starter.known import Machine, Model, find_machine, find_model
from fastalign.starter.rows import Found, counted, find_pairs, find_task, pair_length, task_length
from fastalign.starter.text import Entries, config_text
from fastalign.training.checkpoint import write_text
from fastalign.training.memory import gigabytes

WIDTHS = {"task": 1024, "alignment": 256}  # where there are no rows to measure
BATCH = {True: 128, False: 32}  # pairs of a step, on a GPU or not


@dataclass(frozen=True)
class Proposal:
    """A config as text, and in a few lines what was found and what was chosen for it."""

    text: str
    lines: list[str]


def starter(
    *,
    model: str = "",
    task_data: Sequence[str] = (),
    parallel: Sequence[str] = (),
    gpu_memory: str | None = None,
    out: str = "config.yaml",
) -> str:
    """The YAML of a starter config.

    Args:
        model: folder or hub id. task_data, parallel: files, patterns or hub ids. gpu_memory: such as ``8GB``; not
            given: that of the GPU here, and without one the run is on the CPU.
        out: where the text will be written to, so that the run writes elsewhere.

    Raises:
        ConfigError, DataError, ModelError: a size that is none; files that cannot be read or understood; a model that
            is no decoder, or does not fit.
    """
    return propose(model=model, task_data=task_data, parallel=parallel, gpu_memory=gpu_memory, out=out).text


def write_starter(out: str, *, overwrite: bool = False, **options: Any) -> dict[str, Any]:
    """Writes what `starter` makes of the options to a file.

    Returns:
        ``{"out", "lines": what was found and chosen, "next": commands}``.

    Raises:
        ConfigError: the file is there already, or cannot be written; and all that `starter` raises.
    """
    path = Path(out).expanduser()
    if path.is_dir():
        raise ConfigError(f"--out: {out!r} is a folder; name a file in it, e.g. {str(path / 'config.yaml')!r}")
    if path.exists() and not overwrite:
        raise ConfigError(f"--out: {out!r} exists; choose another name, or add --overwrite to replace it")
    proposal = propose(out=out, **options)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, proposal.text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out: {out!r} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    command = f"fastalign train {shlex.quote(out)}"
    return {"out": out, "lines": proposal.lines, "next": [f"{command} --dry-run", command]}


def propose(
    *, model: str, task_data: Sequence[str], parallel: Sequence[str], gpu_memory: str | None, out: str
) -> Proposal:
    """As `starter`, with what there is to tell."""
    with offline():
        machine = find_machine(gpu_memory)
        known = find_model(model)
        task = find_task(task_data, "--task-data") if task_data else None
        pairs = find_pairs(parallel, "--parallel") if parallel else None
        lines = [_told_model(known, machine)]
        sections: dict[str, Entries] = {"model": {"name_or_path": (model or BLANK, "")}}
        if model == "":
            sections["model"]["name_or_path"] = (
                BLANK,
                "folder or hub id of a decoder, e.g. Qwen/Qwen2.5-0.5B-Instruct",
            )
        sections["adapter"] = {"r": (8, ""), "alpha": (16, "")}
        alone = _alone(task, pairs)
        widths: dict[str, int] = {}
        if alone != "align_only":
            sections["task"], widths["task"] = _task_section(task, known, lines)
        batch = BATCH[machine.on_gpu]
        if alone != "task_only":
            sections["alignment"], widths["alignment"] = _pairs_section(pairs, known, lines)
            batch = _batch(pairs, batch)
    fitted = _fit(known, machine, widths, batch, lines)
    if fitted.quantization != "none":
        sections["model"]["quantization"] = (fitted.quantization, "the base in 4 bits, to save memory")
    if "alignment" in sections:
        sections["alignment"] |= {
            "layer": ("middle", "or an index, a fraction of the depth, several"),
            "batch_size": (batch, "pairs of a step, each a negative of the others"),
            "micro_batch_size": (min(fitted.pairs, batch), "pairs of a forward: memory and time, not the gradient"),
        }
    sections["schedule"] = _schedule(alone)
    sections["training"] = _training(fitted, out)
    blanks = [f"{name}.{key}" for name, keys in sections.items() for key, (value, _) in keys.items() if value == BLANK]
    if blanks:
        lines.append(f"fill in before you train: {listed(blanks)}")
    return Proposal(config_text(_head(fitted, machine), sections), lines)


def _told_model(known: Model, machine: Machine) -> str:
    if known.hf_config is None:
        why = f"{known.name!r} cannot be reached: its hub is away" if known.name else "no --model"
        return f"model: {why}, so careful settings were taken; give it and run this again with --overwrite"
    text = known.hf_config.get_text_config()
    return f"model: {known.hf_config.model_type} of {text.num_hidden_layers} layers, for {machine.where}"


def _alone(task: Found | None, pairs: Found | None) -> str | None:
    if (task is None) == (pairs is None):
        return None
    return "align_only" if task is None else "task_only"


def _task_section(found: Found | None, known: Model, lines: list[str]) -> tuple[Entries, int]:
    if found is None:
        rows = "rows with prompt and response, messages, or tokens and tags"
        return {"data": (BLANK, rows), "max_length": _unread("task", known)}, _unread("task", known)[0]
    width, why = task_length(found, known.tokenizer, known.context)
    if known.tokenizer is not None:
        _refuse_long_prompts(found, known, width)
    template = found.keys.get("template", ("chat", ""))[0]
    rows = f"{len(found.rows):,} rows ({counted(found.languages)})"
    unused = f"; not used: {listed(found.left_out, 6)}" if found.left_out else ""
    lines.append(f"task: {rows}, template {template}{unused}; max_length {width:,}: {why}")
    return {"data": (found.data, rows), **found.keys, "max_length": (width, why)}, width


def _pairs_section(found: Found | None, known: Model, lines: list[str]) -> tuple[Entries, int]:
    if found is None:
        rows = 'sentence pairs, e.g. {"de": ..., "en": ...} a line'
        return {"data": (BLANK, rows), "max_length": _unread("alignment", known)}, _unread("alignment", known)[0]
    width, why = pair_length(found, known.tokenizer, known.context)
    rows = f"{len(found.rows):,} pairs ({counted(found.languages)})"
    wanted = "with English" if "pairs" not in found.keys else "as pairs says, since there is no English"
    lines.append(f"alignment: {rows}, {wanted}; max_length {width:,}: {why}")
    return {"data": (found.data, rows), **found.keys, "max_length": (width, why)}, width


def _unread(name: str, known: Model) -> tuple[int, str]:
    return min(WIDTHS[name], known.context or WIDTHS[name]), "tokens; no rows were read"


def _refuse_long_prompts(found: Found, known: Model, width: int) -> None:
    rows: list[Any] = list(found.rows)
    PromptTokenizer(known.tokenizer, max_length=width).check(rows, "--task-data", context=known.context)


def _batch(found: Found | None, most: int) -> int:
    """Pairs of a step: a power of two, no more than there are without those held out."""
    there = most if found is None else max(2, int(0.9 * len(found.rows)))
    return min(most, 1 << (there.bit_length() - 1))


def _fit(known: Model, machine: Machine, widths: dict[str, int], batch: int, lines: list[str]) -> Fit:
    if known.hf_config is None:
        return unknown_model(machine.on_gpu)
    blocks = resolve_layer("middle", known.hf_config.get_text_config().num_hidden_layers)
    needs = Needs(known.name, known.hf_config, machine.dtype, widths, blocks, batch)
    try:
        fitted = fit(needs, machine.memory, machine.on_gpu)
    except ModelError as error:
        lines.append(f"{error}, so careful settings were taken")
        return unknown_model(machine.on_gpu)
    kept = [
        *(["the base in 4 bits"] if fitted.quantization == "nf4" else []),
        *(["gradient checkpointing"] if fitted.checkpointing else []),
        *([f"task rows a forward: {fitted.rows}"] if "task" in widths else []),
        *([f"pairs a forward: {fitted.pairs}"] if "alignment" in widths else []),
    ]
    lines.append(f"memory: about {gigabytes(fitted.peak or 0)} on {machine.where}, with {listed(kept)}")
    return fitted


def _schedule(alone: str | None) -> Entries:
    if alone == "task_only":
        return {"mode": (alone, "no --parallel; alternate, once alignment.data names sentence pairs")}
    if alone == "align_only":
        return {"mode": (alone, "no --task-data; alternate, once task.data names rows")}
    return {"mode": ("alternate", ""), "ratio": (1.0, "alignment steps for each step of the task")}


def _training(fitted: Fit, out: str) -> Entries:
    folder = TRAINING_DEFAULTS["output_dir"]
    if Path(out).expanduser().parent.resolve() == Path(folder).resolve():
        folder = f"{folder}/run"  # a run may not replace a config of the user's
    values: Entries = {
        "output_dir": (folder, "the adapter and summary.json"),
        "num_train_epochs": (3, ""),
        "per_device_train_batch_size": (fitted.rows, "rows of a forward"),
        "per_device_eval_batch_size": (fitted.rows, "no more in evaluation"),
        "gradient_accumulation_steps": (STEP // fitted.rows, f"so that a step has {STEP} rows"),
    }
    if fitted.checkpointing:
        values["gradient_checkpointing"] = (True, "less memory, more time")
    return values


def _head(fitted: Fit, machine: Machine) -> list[str]:
    if fitted.peak is None:
        return ["Written by `fastalign init`, with careful settings: the model could not be looked at."]
    return [f"Written by `fastalign init` for {machine.where}; predicted peak: {gigabytes(fitted.peak)}."]
