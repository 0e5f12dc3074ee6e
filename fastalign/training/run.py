"""The main job: from a configuration to an adapter in a folder."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed

from fastalign.config import Config, config_text
from fastalign.config.hub import offline_run
from fastalign.data.text import listed
from fastalign.errors import ConfigError, FastalignError, RunError
from fastalign.model.device import device_name, kernels
from fastalign.model.early_exit import hidden_at
from fastalign.model.loading import add_adapter, load_model
from fastalign.model.quantization import effective_quantization
from fastalign.model.sharding import has_shards
from fastalign.probing.retrieval import choose_pairs, retrieval
from fastalign.streams.base import is_first_rank, say
from fastalign.training.checkpoint import (
    checkpoint_to_resume,
    checkpoints,
    disk_errors,
    restore,
    save_final,
    step_of,
    write_text,
)
from fastalign.training.interrupt import SaveOnInterrupt
from fastalign.training.joining import SameTimeout, meet, together, what_was_read
from fastalign.training.memory import free_bytes, gigabytes, is_out_of_memory, told_out_of_memory
from fastalign.training.output import clear, is_unfinished, locked, require_free_folder, require_one_folder
from fastalign.training.plan import plan, plan_lines
from fastalign.training.prepare import Prepared, prepare, require_data
from fastalign.training.record import versions
from fastalign.training.resume import require_same_run, run_record
from fastalign.training.trainer import AlignTrainer
from fastalign.training.zero import require_launcher

Probe = Callable[[Any], dict[str, Any]]
# What the Trainer raises for a setting that it cannot work with.
REFUSALS = (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)


@offline_run
@together
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
    require_data(config)
    require_launcher(config.training)
    with locked(config.output_dir) as lock:
        checkpoint, resumes = _begin(config, overwrite) if is_first_rank() else (None, False)
        run = prepare(config, checkpoint)
        config, args, inputs, steps, checkpoint = run.config, run.args, run.inputs, run.steps, run.checkpoint
        files = inputs.tally.as_dict()["files"]
        record = run_record(config, files, args.world_size, run.blocks)
        meet(what_was_read(config, files))
        if args.save_strategy != "no":
            require_one_folder(config.output_dir)
        changes = require_same_run(checkpoint, record) if checkpoint else []
        if checkpoint and step_of(checkpoint) >= steps:
            changes.append(f"{checkpoint} has all of the {steps} steps: there is nothing left to train")
        if args.save_only_model:
            changes.append("training.save_only_model: no checkpoint of this run can be continued from")

        set_seed(args.seed)
        model = _load(config, args.device, run.blocks)
        probe = _probe(run, config.alignment.eval_pairs) if inputs.pairs else None
        interrupt = SaveOnInterrupt()
        trainer = _trainer(
            model,
            args,
            streams=run.streams,
            schedule=run.schedule,
            retrieval=probe,
            record=record,
            processing_class=run.tokenizer,
            callbacks=[interrupt, SameTimeout(), *callbacks],
        )
        _try_early_exit(model, run.layers)
        planned = plan(run.schedule, run.streams, steps, args.world_size)
        counted = inputs.tally.lines()
        say(*_unused_gpus(args), *changes, *run.notes, *counted, *plan_lines(planned, run.streams))
        meet()  # nothing is overwritten before all ranks are ready
        with disk_errors(config.output_dir):
            config.output_dir.mkdir(parents=True, exist_ok=True)
            if is_first_rank():
                lock.acquire()
                require_free_folder(config.output_dir, overwrite, resumes=resumes)  # still
                clear(config.output_dir, step_of(checkpoint) if resumes and checkpoint else None)
                write_text(config.output_dir / "config.yaml", config_text(config))
            if probe is not None and checkpoint is None:
                trainer.add_callback(_MeasureBefore(trainer, probe))
            meet()  # from here on ranks wait for each other in collectives
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                interrupt.release()
            say(*(line for line in inputs.tally.lines() if line not in counted))  # of rows that were streamed
            trainer.require_finite_adapter()
            save_final(trainer.save_model, config.output_dir)
            summary: dict[str, Any] = {
                "output_dir": str(config.output_dir),
                "interrupted": interrupt.interrupted and trainer.state.global_step < trainer.state.max_steps,
                "steps": trainer.state.global_step,
                "seconds": time.perf_counter() - started,
                **_peak_memory(args.device),
                "layer": run.layer,
                "streams": trainer.meter.summary(),
                **_measured(trainer, probe),
                **_record(run, trainer, planned),
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


def _load(config: Config, device: torch.device, blocks: int | None) -> torch.nn.Module:
    """The base, or its first blocks, in its adapter. RunError where it does not fit into memory."""
    free = free_bytes(device)

    def tell(why: str) -> RunError:
        return RunError(
            f"out of memory while loading the base model ({why}); {gigabytes(free)} were free; set "
            "model.quantization: nf4 or model.dtype: bfloat16, or take a smaller model"
        )

    with told_out_of_memory(tell):
        return add_adapter(load_model(config.model, device, blocks), config.adapter)


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


def _record(run: Prepared, trainer: AlignTrainer, planned: dict[str, Any]) -> dict[str, Any]:
    """What was run, and with what: for whoever asks later where the numbers come from."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    base = model.get_base_model().config
    trainable, total = model.get_nb_trainable_parameters()
    depth = run.hf_config.get_text_config().num_hidden_layers
    parts = "the model" if run.blocks is None else f"the embeddings, blocks 1 to {run.blocks} of {depth}"
    return {
        "model": {
            "name": run.config.model.name_or_path,
            "commit": getattr(base, "_commit_hash", None),
            "type": base.model_type,
            "quantization": effective_quantization(run.config.model, run.hf_config),
            "dtype": str(model.dtype).removeprefix("torch."),
            "layers": depth,
            "layers_loaded": run.blocks or depth,
            "parameters": total,
            "parameters_of": f"{parts} and the adapter",
            "trainable": trainable,
        },
        "plan": planned,
        "data": run.inputs.tally.as_dict(),
        "seed": trainer.args.seed,
        "ranks": trainer.args.world_size,
        "resumed_at": trainer.meter.notes.get("resumed_at", []),
        "device": device_name(trainer.args.device),
        "kernels": kernels(trainer.args.device),
        "versions": versions(),
    }


def _probe(run: Prepared, limit: int) -> Probe | None:
    """Retrieval at the last layer on held-out pairs; None, said once, where there are too few of them."""
    pairs = run.inputs.pairs[1] if run.inputs.pairs else []
    chosen = choose_pairs(pairs, limit)
    left_out = sorted({pair.direction for pair in pairs} - {pair.direction for pair in chosen})
    if left_out:
        say(f"retrieval is not measured for {listed(left_out)}: fewer than two held-out pairs")
    return (lambda model: retrieval(model, run.sentences, chosen, run.layers[-1])) if chosen else None


class _MeasureBefore(TrainerCallback):
    """Retrieval before the first step, once the model is on its device and in its wrapper."""

    def __init__(self, trainer: AlignTrainer, probe: Probe):
        self.trainer, self.probe = trainer, probe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meter.notes["retrieval"] = {"before": self.probe(self.trainer.model_wrapped)}


@torch.no_grad()
def _try_early_exit(model: torch.nn.Module, layers: list[int]) -> None:
    """ModelError now, before anything is overwritten, if this model cannot be left early.

    One in shards cannot run before it is in DeepSpeed's engine: there it is seen at the first use.
    """
    if has_shards(model):
        return
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
