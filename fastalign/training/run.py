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
from transformers import TrainerCallback, set_seed

from fastalign.config import Config, config_text
from fastalign.config.hub import offline_run
from fastalign.data.parallel import Pair
from fastalign.data.text import listed
from fastalign.data.tokenization import SentenceTokenizer
from fastalign.errors import ConfigError, FastalignError, RunError
from fastalign.model.early_exit import hidden_at
from fastalign.model.encode import resolve_layer
from fastalign.model.loading import add_adapter, load_model, load_model_config, load_tokenizer
from fastalign.probing.retrieval import choose_pairs, retrieval
from fastalign.streams.base import gather_over_ranks, is_first_rank, say
from fastalign.training.arguments import effective_training, training_arguments
from fastalign.training.checkpoint import (
    checkpoint_to_resume,
    checkpoints,
    disk_errors,
    restore,
    save_final,
    step_of,
    write_text,
)
from fastalign.training.inputs import Inputs, build_streams, read_inputs, sentence_tokenizer
from fastalign.training.interrupt import SaveOnInterrupt
from fastalign.training.memory import free_bytes, gigabytes, is_out_of_memory, told_out_of_memory
from fastalign.training.output import clear, is_unfinished, locked, require_free_folder
from fastalign.training.plan import plan, plan_lines, total_steps
from fastalign.training.record import device_name, kernels, versions
from fastalign.training.resume import require_same_run, run_record
from fastalign.training.schedule import Schedule
from fastalign.training.trainer import AlignTrainer

Probe = Callable[[Any], dict[str, Any]]
# What the Trainer raises for a setting that it cannot work with.
REFUSALS = (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@offline_run
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
        RunError: memory or disk ran out, or a loss is no longer finite.
    """
    started = time.perf_counter()
    schedule = Schedule(config.schedule.mode, config.schedule.ratio)
    _require_data(config, schedule)
    with locked(config.output_dir) as lock:
        checkpoint, resumes = _begin(config, overwrite) if is_first_rank() else (None, False)
        text_config = load_model_config(config.model).get_text_config()
        layers = _layers(config, text_config.num_hidden_layers)
        tokenizer = load_tokenizer(config.model)
        inputs = read_inputs(config)
        config = replace(config, training=effective_training(config, inputs.can_evaluate))
        args = training_arguments(config.training)
        found = gather_over_ranks([str(checkpoint or "")])[0]
        checkpoint = Path(found) if found else None
        if config.alignment.negatives == "world" and args.world_size > 1:
            raise ConfigError("alignment.negatives: world is not supported on several ranks yet; use rank")
        sentences = sentence_tokenizer(config, inputs, tokenizer, text_config)
        streams = build_streams(config, inputs, tokenizer, sentences, text_config, layers, args)
        steps = total_steps(schedule, streams, args)
        record = run_record(config, inputs.tally.as_dict()["files"], args.world_size)
        changes = require_same_run(checkpoint, record) if checkpoint else []
        if checkpoint and step_of(checkpoint) >= steps:
            changes.append(f"{checkpoint} has all of the {steps} steps: there is nothing left to train")
        if args.save_only_model:
            changes.append("training.save_only_model: no checkpoint of this run can be continued from")

        set_seed(args.seed)
        model = _load(config, args.device)
        probe = _probe(sentences, inputs.pairs[1], layers[-1], config.alignment.eval_pairs) if inputs.pairs else None
        interrupt = SaveOnInterrupt()
        trainer = _trainer(
            model,
            args,
            streams=streams,
            schedule=schedule,
            retrieval=probe,
            record=record,
            processing_class=tokenizer,
            callbacks=[interrupt, *callbacks],
        )
        _try_early_exit(model, layers)
        planned = plan(schedule, streams, steps, args.world_size)
        say(*_unused_gpus(args), *changes, *inputs.tally.lines(), *plan_lines(planned, streams))
        with disk_errors(config.output_dir):
            config.output_dir.mkdir(parents=True, exist_ok=True)
            if is_first_rank():
                lock.acquire()
                require_free_folder(config.output_dir, overwrite, resumes=resumes)  # still
                clear(config.output_dir, step_of(checkpoint) if resumes and checkpoint else None)
                write_text(config.output_dir / "config.yaml", config_text(config))
            if probe is not None and checkpoint is None:
                trainer.add_callback(_MeasureBefore(trainer, probe))
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                interrupt.release()
            trainer.require_finite_adapter()
            save_final(trainer.save_model, config.output_dir)
            summary: dict[str, Any] = {
                "output_dir": str(config.output_dir),
                "interrupted": interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps,
                "steps": trainer.state.global_step,
                "seconds": time.perf_counter() - started,
                **_peak_memory(args.device),
                "layer": layers[0] if len(layers) == 1 else layers,
                "streams": trainer.meter.summary(),
                **_measured(trainer, probe),
                **_record(config, trainer, inputs, planned),
            }
            if is_first_rank():
                write_text(config.output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _begin(config: Config, overwrite: bool) -> tuple[Path | None, bool]:
    """The checkpoint to go on from, and whether it is one of this output folder, which is tidied up and checked."""
    restore(config.output_dir)
    checkpoint = checkpoint_to_resume(config)
    if checkpoint is None:  # killed before the first one: what it left is not finished
        wanted = config.training.get("resume_from_checkpoint") is True
        resumes = wanted and is_unfinished(config.output_dir)
    else:
        resumes = checkpoint.resolve().parent == config.output_dir.resolve()
        newer = [path.name for path in checkpoints(checkpoint.parent) if step_of(path) > step_of(checkpoint)]
        if resumes and newer and config.training.get("resume_from_checkpoint") is not True and not overwrite:
            raise ConfigError(
                f"training.resume_from_checkpoint: {str(checkpoint)!r} is not the newest; to go on from it add "
                f"--overwrite, which removes {listed(newer)}, or set it to true"
            )
    require_free_folder(config.output_dir, overwrite, resumes=resumes, base=config.model.name_or_path)
    return checkpoint, resumes


def _trainer(model: torch.nn.Module, args: Any, **kwargs: Any) -> AlignTrainer:
    """The trainer, tried out: ConfigError where a reporter or an optimizer is not installed, and such."""
    try:
        trainer = AlignTrainer(model, args, **kwargs)
        if not args.deepspeed:
            trainer.create_optimizer_and_scheduler(args.max_steps)
            trainer.optimizer = trainer.lr_scheduler = None
    except REFUSALS as error:
        if isinstance(error, FastalignError) or is_out_of_memory(error):
            raise
        raise ConfigError(f"training: {error}") from error
    return trainer


def _unused_gpus(args: Any) -> list[str]:
    count = torch.cuda.device_count() if args.device.type == "cuda" and args.world_size == 1 else 1
    return (
        [f"using 1 of {count} GPUs; for all: torchrun --nproc_per_node {count} -m fastalign ..."] if count > 1 else []
    )


def _load(config: Config, device: torch.device) -> torch.nn.Module:
    """The base in its adapter. RunError where it does not fit into memory."""
    free = free_bytes(device)

    def tell(why: str) -> RunError:
        return RunError(
            f"out of memory while loading the base model ({why}); {gigabytes(free)} were free; set "
            "model.quantization: nf4 or model.dtype: bfloat16, or take a smaller model"
        )

    with told_out_of_memory(tell):
        return add_adapter(load_model(config.model, device), config.adapter)


def _measured(trainer: AlignTrainer, probe: Probe | None) -> dict[str, Any]:
    """Retrieval before and after, and the last evaluation: of the step whose adapter is saved."""
    results: dict[str, Any] = {}
    if probe is not None:

        def tell(why: str) -> RunError:
            return RunError(
                f"out of memory while retrieval was measured after the training ({why}); the adapter is saved in "
                f"{str(trainer.args.output_dir)!r}, only summary.json is missing"
            )

        with told_out_of_memory(tell):
            after = probe(trainer.model_wrapped)
        results["retrieval"] = {**trainer.meter.notes.get("retrieval", {}), "after": after}
    evaluated = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    if trainer.args.load_best_model_at_end:
        evaluated = [entry for entry in evaluated if entry["step"] == trainer.state.best_global_step]
    if evaluated:
        results["evaluation"] = {name: value for name, value in evaluated[-1].items() if name.startswith("eval_")}
    return results


def _record(config: Config, trainer: AlignTrainer, inputs: Inputs, planned: dict[str, Any]) -> dict[str, Any]:
    """What was run, and with what: for whoever asks later where the numbers come from."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model().config
    trainable, total = model.get_nb_trainable_parameters()
    return {
        "model": {
            "name": config.model.name_or_path,
            "commit": getattr(base, "_commit_hash", None),
            "type": base.model_type,
            "quantization": config.model.quantization,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": total,
            "trainable": trainable,
        },
        "plan": planned,
        "data": inputs.tally.as_dict(),
        "seed": trainer.args.seed,
        "ranks": trainer.args.world_size,
        "resumed_at": trainer.meter.notes.get("resumed_at", []),
        "device": device_name(trainer.args.device),
        "kernels": kernels(trainer.args.device),
        "versions": versions(),
    }


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


def _probe(tokenizer: SentenceTokenizer, pairs: list[Pair], layer: int, limit: int) -> Probe | None:
    """Retrieval at a layer on held-out pairs; None, said once, where there are too few of them."""
    chosen = choose_pairs(pairs, limit)
    left_out = sorted({pair.direction for pair in pairs} - {pair.direction for pair in chosen})
    if left_out:
        say(f"retrieval is not measured for {listed(left_out)}: fewer than two held-out pairs")
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
