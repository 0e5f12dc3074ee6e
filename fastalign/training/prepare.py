"""A run up to its model: configuration, data, tokenizer and streams, read and checked before any weights are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastalign.config import Config
from fastalign.data.tokenization import SentenceTokenizer
from fastalign.errors import ConfigError
from fastalign.model.encode import resolve_layer
from fastalign.model.loading import compute_dtype, load_model_config, load_tokenizer
from fastalign.model.quantization import effective_quantization, require_quantization
from fastalign.model.shortening import why_whole
from fastalign.streams.base import Stream, gather_over_ranks
from fastalign.training.arguments import effective_training, training_arguments
from fastalign.training.inputs import Inputs, build_streams, read_inputs, sentence_tokenizer
from fastalign.training.plan import total_steps
from fastalign.training.schedule import Schedule
from fastalign.training.zero import refuse_other_format


@dataclass
class Prepared:
    """All of a run but its model.

    Attributes:
        config: with the effective ``training`` section.
        layers: resolved indices to align. steps: of the optimizer, of all streams.
        checkpoint: that the run goes on from, on all ranks.
        blocks: how many blocks of the model are loaded; None: all, with the final norm and the head.
        notes: what has to be said of how the model is loaded.
    """

    config: Config
    args: Any
    schedule: Schedule
    hf_config: Any
    tokenizer: Any
    layers: list[int]
    inputs: Inputs
    sentences: SentenceTokenizer
    streams: dict[str, Stream]
    steps: int
    checkpoint: Path | None
    blocks: int | None
    notes: list[str]

    @property
    def layer(self) -> int | list[int]:
        """The aligned layer, or all of several."""
        return self.layers[0] if len(self.layers) == 1 else self.layers


def prepare(config: Config, checkpoint: Path | None = None) -> Prepared:
    """Read and check everything that needs no weights. Raises ConfigError, DataError, ModelError.

    Args:
        checkpoint: that the run goes on from; the first rank's counts.
    """
    hf_config = load_model_config(config.model)
    text_config = hf_config.get_text_config()
    layers = aligned_layers(config, text_config.num_hidden_layers)
    tokenizer = load_tokenizer(config.model)
    inputs = read_inputs(config)
    config = replace(config, training=effective_training(config, inputs.can_evaluate))
    args = training_arguments(config.training)
    found = gather_over_ranks([str(checkpoint or "")])[0]
    checkpoint = Path(found) if found else None
    inputs.begin(config, args, checkpoint)
    sentences = sentence_tokenizer(config, inputs, tokenizer, text_config)
    streams = build_streams(config, inputs, tokenizer, sentences, text_config, layers, args)
    schedule = Schedule(config.schedule.mode, config.schedule.ratio)
    steps = total_steps(schedule, streams, args)
    notes = require_quantization(config.model, hf_config, args.device)
    held = effective_quantization(config.model, hf_config)
    refuse_other_format(config, compute_dtype(config.model, args.device), held)
    task = streams.get("task")
    evaluated = task is not None and task.can_evaluate and args.eval_strategy != "no"
    blocks = loaded_blocks(config, hf_config, max(layers), task_evaluated=evaluated, notes=notes)
    if blocks is not None:
        streams.pop("task", None)  # it cannot run on these
    return Prepared(
        config=config,
        args=args,
        schedule=schedule,
        hf_config=hf_config,
        tokenizer=tokenizer,
        layers=layers,
        inputs=inputs,
        sentences=sentences,
        streams=streams,
        steps=steps,
        checkpoint=checkpoint,
        blocks=blocks,
        notes=notes,
    )


def require_data(config: Config) -> None:
    """ConfigError where a stream of the schedule has no data."""
    for name in Schedule(config.schedule.mode, config.schedule.ratio).streams:
        if not getattr(config, name).data:
            other = {"task": "align_only", "alignment": "task_only"}[name]
            raise ConfigError(f"{name}.data is missing; give it, or set schedule.mode: {other}")


def loaded_blocks(config: Config, hf_config: Any, blocks: int, *, task_evaluated: bool, notes: list[str]) -> int | None:
    """How many blocks are loaded, of which `blocks` are needed; None: all, and the head. `notes` get the reason."""
    if config.schedule.mode != "align_only":
        return None
    why = why_whole(hf_config, blocks)
    if why is None and task_evaluated:
        why = "the task is evaluated, too; leave task.data out, or set task.eval_share: 0, to load less"
    depth = hf_config.get_text_config().num_hidden_layers
    if why is not None:
        notes.append(f"all {depth} blocks are loaded though {blocks} are needed: {why}")
        return None
    notes.append(f"blocks 1 to {blocks} of {depth} are loaded, without final norm and head: no step goes further")
    return blocks


def aligned_layers(config: Config, depth: int) -> list[int]:
    """Resolved indices of `alignment.layer`. Raises ConfigError where one is outside of the model, or named twice."""
    specs = config.alignment.layer if isinstance(config.alignment.layer, list) else [config.alignment.layer]
    layers = [resolve_layer(spec, depth) for spec in specs]
    if len(set(layers)) < len(layers):
        raise ConfigError(f"alignment.layer: {specs} names a layer twice ({layers})")
    return layers
