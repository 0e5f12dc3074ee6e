"""The main job: from a configuration to an adapter in a folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from fastalign.config import Config, TaskConfig, save_config
from fastalign.data.parallel import Pair, read_pairs
from fastalign.data.sampling import Sampler, held_out, stable_hash
from fastalign.data.templates import TaskExample, TaskReader
from fastalign.data.tokenization import PromptTokenizer, SentenceTokenizer
from fastalign.errors import ConfigError, DataError, FastalignError
from fastalign.model.early_exit import hidden_at
from fastalign.model.encode import resolve_layer
from fastalign.model.loading import add_adapter, load_model, load_model_config, load_tokenizer
from fastalign.probing.retrieval import choose_pairs, retrieval
from fastalign.streams.alignment import AlignmentStream
from fastalign.streams.base import Stream, rank_and_world_size
from fastalign.streams.task import TaskStream
from fastalign.training.arguments import effective_training, training_arguments
from fastalign.training.interrupt import SaveOnInterrupt
from fastalign.training.output import checkpoint_to_resume, clear, require_free_folder
from fastalign.training.schedule import Schedule
from fastalign.training.trainer import AlignTrainer

Probe = Callable[[Any], dict[str, Any]]
MAX_HELD_OUT = {"task": 500, "alignment": 1_000}


def train(config: Config, *, overwrite: bool = False, callbacks: Sequence[Any] = ()) -> dict[str, Any]:
    """Train an adapter and write it, ``config.yaml`` and ``summary.json`` to the configured output folder.

    Args:
        config: of the run.
        overwrite: replace results that the output folder holds.
        callbacks: `transformers.TrainerCallback`s to add, e.g. early stopping.

    Returns:
        The content of ``summary.json``.

    Raises:
        ConfigError, DataError, ModelError: something the user can mend; raised before anything is overwritten.
    """
    started = time.perf_counter()
    schedule = Schedule(config.schedule.mode, config.schedule.ratio)
    _require_data(config, schedule)
    checkpoint = checkpoint_to_resume(config)
    resumes = checkpoint is not None and Path(checkpoint).resolve().parent == config.output_dir.resolve()
    require_free_folder(config.output_dir, overwrite or resumes)
    text_config = load_model_config(config.model).get_text_config()
    layers = _layers(config, text_config.num_hidden_layers)
    tokenizer = load_tokenizer(config.model)
    task = _read_task(config) if config.task.data else None
    pairs = _read_alignment(config) if config.alignment.data or config.alignment.eval_data else None
    config = replace(config, training=effective_training(config, bool((task and task[1]) or (pairs and pairs[1]))))
    args = training_arguments(config.training)
    if config.alignment.negatives == "world" and args.world_size > 1:
        raise ConfigError("alignment.negatives: world is not supported on several ranks yet; use rank")

    if args.device.type == "cuda" and args.world_size == 1 and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        print(f"using 1 of {count} GPUs; for all: torchrun --nproc_per_node {count} -m fastalign ...", file=sys.stderr)
    sentences = SentenceTokenizer(
        tokenizer,
        config.alignment.skip_first_token,
        config.alignment.pooling,
        _room(text_config, config.alignment.max_length),
    )
    streams: dict[str, Stream] = {}
    if task:
        prompts = PromptTokenizer(tokenizer, config.task.chat_template, _room(text_config, config.task.max_length))
        streams["task"] = _task_stream(config, task, prompts, args)
    if pairs and config.alignment.data:
        streams["alignment"] = AlignmentStream(
            pairs[0],
            _some(pairs[1], "alignment", lambda pair: pair.source + pair.target),
            sentences,
            Sampler(
                [pair.direction for pair in pairs[0]], config.alignment.language_temperature, args.seed, "alignment"
            ),
            config.alignment,
            layers,
            accumulation=args.gradient_accumulation_steps,
        )

    from transformers import set_seed

    set_seed(args.seed)
    model = add_adapter(load_model(config.model, args.device), config.adapter)
    probe = _probe(sentences, pairs[1], layers[-1], config.alignment.eval_pairs) if pairs else None
    interrupt = SaveOnInterrupt()
    try:
        trainer = AlignTrainer(
            model,
            args,
            streams=streams,
            schedule=schedule,
            retrieval=probe,
            processing_class=tokenizer,
            callbacks=[interrupt, *callbacks],
        )
        if not args.deepspeed:
            trainer.create_optimizer_and_scheduler(args.max_steps)
            trainer.optimizer = trainer.lr_scheduler = None
    except (ImportError, RuntimeError, ValueError) as error:  # a reporter or optimizer that is not installed, and such
        if isinstance(error, FastalignError) or "out of memory" in str(error):
            raise
        raise ConfigError(f"training: {error}") from error
    _try_early_exit(model, layers)
    if rank_and_world_size()[0] == 0:
        clear(config.output_dir, keep_checkpoints=resumes)
        config.output_dir.mkdir(parents=True, exist_ok=True)
        save_config(config, config.output_dir / "config.yaml")
    if probe is not None and checkpoint is None:
        trainer.add_callback(_MeasureBefore(trainer, probe))
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        interrupt.release()
    trainer.save_model(str(config.output_dir))
    summary: dict[str, Any] = {
        "output_dir": str(config.output_dir),
        "interrupted": interrupt.interrupted,
        "steps": trainer.state.global_step,
        "seconds": time.perf_counter() - started,
        **_peak_memory(args.device),
        "layer": layers[0] if len(layers) == 1 else layers,
        "streams": trainer.meter.summary(),
    }
    if probe is not None:
        summary["retrieval"] = {**trainer.meter.notes.get("retrieval", {}), "after": probe(trainer.model_wrapped)}
    evaluated = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    if args.load_best_model_at_end:  # the adapter that is saved is that step's
        evaluated = [entry for entry in evaluated if entry["step"] == trainer.state.best_global_step]
    if evaluated:
        summary["evaluation"] = {name: value for name, value in evaluated[-1].items() if name.startswith("eval_")}
    if rank_and_world_size()[0] == 0:
        (config.output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _require_data(config: Config, schedule: Schedule) -> None:
    for name in schedule.streams:
        if not getattr(config, name).data:
            other = {"task": "align_only", "alignment": "task_only"}[name]
            raise ConfigError(f"{name}.data is missing; give it, or set schedule.mode: {other}")


def _layers(config: Config, depth: int) -> list[int]:
    specs = config.alignment.layer if isinstance(config.alignment.layer, list) else [config.alignment.layer]
    layers = [resolve_layer(spec, depth) for spec in specs]
    if len(set(layers)) < len(layers):
        raise ConfigError(f"alignment.layer: {specs} names a layer twice ({layers})")
    return layers


def _room(text_config: Any, wanted: int) -> int:
    """Tokens a row may have: as configured, but not beyond the model's context."""
    context = getattr(text_config, "max_position_embeddings", None)
    return min(wanted, context) if isinstance(context, int) and context > 0 else wanted


def _read_task(config: Config) -> tuple[list[TaskExample], list[TaskExample]]:
    """(training, held-out) examples."""
    task: TaskConfig = config.task
    reader = TaskReader(task)
    assert task.data is not None
    examples = reader.read(task.data, "task.data")
    if task.eval_data is not None:
        return examples, _some(reader.read(task.eval_data, "task.eval_data"), "task", _text)
    return _split(examples, _text, task.eval_share, "task")


def _read_alignment(config: Config) -> tuple[list[Pair], list[Pair]]:
    """(training, held-out) pairs; a meaning is on one side only."""
    alignment = config.alignment
    if alignment.data is None:
        assert alignment.eval_data is not None
        return [], read_pairs(alignment.eval_data, alignment.pairs, "alignment.eval_data")
    pairs = read_pairs(alignment.data, alignment.pairs, "alignment.data")
    if alignment.eval_data is not None:
        return pairs, read_pairs(alignment.eval_data, alignment.pairs, "alignment.eval_data")
    names: dict[int, str] = {}
    for pair in pairs:
        names[pair.meaning] = min(names.get(pair.meaning, pair.target), pair.target)
    return _split(pairs, lambda pair: names[pair.meaning], alignment.eval_share, "alignment")


def _split(rows: list, key: Callable[[Any], str], share: float, name: str) -> tuple[list, list]:
    share = min(share, MAX_HELD_OUT[name] / max(len(rows), 1))
    train, kept = [], []
    for row in rows:
        (kept if held_out(key(row), share) else train).append(row)
    if not train:
        raise DataError(f"{name}.data: only {len(rows)} rows, and all are held out; give eval_data or eval_share: 0")
    return train, kept


def _some(rows: list, name: str, key: Callable[[Any], str]) -> list:
    """At most as many rows as are evaluated, drawn and mixed by the hash of their content."""
    return sorted(rows, key=lambda row: stable_hash(key(row)))[: MAX_HELD_OUT[name]]


def _text(example: TaskExample) -> str:
    return "\x1f".join(message["content"] for message in example.messages)


def _task_stream(config: Config, task: tuple[list, list], prompts: PromptTokenizer, args: Any) -> TaskStream:
    prompts.check([*task[0], *task[1]])
    languages = [example.language for example in task[0]]
    return TaskStream(
        *task,
        prompts,
        Sampler(languages, config.task.language_temperature, args.seed, "task"),
        micro_batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        eval_batch_size=args.per_device_eval_batch_size,
    )


def _probe(tokenizer: SentenceTokenizer, pairs: list[Pair], layer: int, limit: int) -> Probe | None:
    """Retrieval at a layer on held-out pairs; None, said once, where there are too few of them."""
    chosen = choose_pairs(pairs, limit)
    left_out = sorted({pair.direction for pair in pairs} - {pair.direction for pair in chosen})
    if left_out and rank_and_world_size()[0] == 0:
        print(f"retrieval is not measured for {', '.join(left_out)}: fewer than two held-out pairs", file=sys.stderr)
    return (lambda model: retrieval(model, tokenizer, chosen, layer)) if chosen else None


class _MeasureBefore(TrainerCallback):
    """Retrieval before the first step, once the model is on its device and in its wrapper."""

    def __init__(self, trainer: AlignTrainer, probe: Probe):
        self.trainer, self.probe = trainer, probe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meter.notes["retrieval"] = {"before": self.probe(self.trainer.model_wrapped)}


@torch.no_grad()
def _try_early_exit(model: torch.nn.Module, layers: list[int]) -> None:
    """ModelError now, before anything is overwritten, if this model cannot be left early."""
    hidden_at(model, layers, input_ids=torch.zeros(1, 2, dtype=torch.int64, device=next(model.parameters()).device))


def _peak_memory(device: torch.device) -> dict[str, int]:
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(),
            "peak_memory_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
