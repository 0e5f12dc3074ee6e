"""A resumed run is the run that was stopped: the same settings and the same data, or it is refused.

What a checkpoint was made with is in its ``run.json``. Settings that change nothing that is learnt may differ.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from fastalign.config import Config, config_from_dict, config_to_dict
from fastalign.errors import ConfigError
from fastalign.streams.base import say
from fastalign.training.checkpoint import RECORD
from fastalign.training.zero import deepspeed_settings

SHOWN = 3  # differences that a message names

# Where a run writes, how it reports, evaluates and saves, and how it trades memory for time.
FREE = (
    "training.output_dir", "training.overwrite_output_dir", "training.run_name", "training.project",
    "training.logging_*", "training.log_*", "training.report_to", "training.disable_tqdm", "training.eval_*",
    "training.per_device_eval_batch_size", "training.metric_for_best_model", "training.greater_is_better",
    "training.load_best_model_at_end", "training.save_*", "training.push_to_hub", "training.hub_*",
    "training.dataloader_*", "training.gradient_checkpointing*", "training.activation_checkpointing*",
    "training.ddp_timeout", "training.ddp_bucket_cap_mb", "training.ddp_backend", "training.debug",
    "training.prediction_loss_only", "training.batch_eval_metrics", "training.skip_memory_metrics",
    "training.include_*", "training.trackio_*",
    "alignment.micro_batch_size", "alignment.eval_pairs", "alignment.preset", "model.trust_remote_code",
    "task.logits_memory",
)  # fmt: skip
LENGTH = ("training.max_steps", "training.num_train_epochs")  # may differ, and is said
STEP = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")  # their product counts
DATA = ("task.data", "alignment.data")  # counts by content
FLAGS = ("training.bf16", "training.fp16", "training.tf32")  # null is false
# The files themselves may differ; whether there are any decides what is left to train on.
HELD_OUT = ("task.eval_data", "alignment.eval_data")


def run_record(
    config: Config, files: Mapping[str, list[dict[str, Any]]], world_size: int, blocks: int | None = None
) -> dict[str, Any]:
    """What a checkpoint remembers of its run.

    Args:
        config: with the effective ``training`` section.
        files: per setting what was read, ``{"name", "sha256", "rows", "columns"}``, as `Tally.as_dict` gives them.
        world_size: number of ranks.
        blocks: of the model that are loaded; None: all, and the head.
    """
    data = {key: [_content(file) for file in files.get(key, [])] for key in DATA}
    record = {"config": config_to_dict(config), "data": data, "ranks": world_size, "blocks": blocks}
    if config.training.get("deepspeed"):  # by its content: a file may have changed, and a preset may be spelled out
        record["config"]["training"]["deepspeed"] = deepspeed_settings(config.training)
    return json.loads(json.dumps(record, default=str))  # as it is read back


def _content(file: Mapping[str, Any]) -> str:
    """What decides the rows of a file: its bytes, and which columns are taken as what."""
    digest = file["sha256"] or file["name"]
    return f"{digest} columns {json.dumps(file['columns'], sort_keys=True)}" if "columns" in file else digest


def require_same_run(checkpoint: Path, record: Mapping[str, Any]) -> list[str]:
    """What has to be said of going on from this checkpoint with the settings and data of `record`.

    Raises:
        ConfigError: something that decides what is learnt differs.
    """
    try:
        before = _flat(_with_new_keys(json.loads((checkpoint / RECORD).read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return [f"{checkpoint} does not say what it was made with: settings and data are not compared"]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"training.resume_from_checkpoint: {checkpoint / RECORD} cannot be read ({error})") from None
    now = _flat(record)
    differing = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    wrong = [key for key in differing if not _may_differ(key, now)]
    if wrong:
        shown = [f"{key} was {_short(before.get(key))}, now {_short(now.get(key))}" for key in wrong[:SHOWN]]
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise ConfigError(
            f"training.resume_from_checkpoint: {checkpoint} was made with other settings, so that a part of the run "
            f"would be another one ({'; '.join(shown)}{more}); set them back, or start a new run in another folder"
        )
    return [
        f"{key} was {_short(before.get(key))} when the run began, and is {_short(now.get(key))} now"
        for key in differing
        if key in LENGTH
    ]


def _may_differ(key: str, now: Mapping[str, Any]) -> bool:
    if key == "model.name_or_path":
        return os.path.isdir(now[key])  # it was moved
    return key in (*LENGTH, *STEP, *DATA) or any(fnmatch.fnmatchcase(key, pattern) for pattern in FREE)


def _with_new_keys(saved: dict[str, Any]) -> dict[str, Any]:
    """A record with the defaults of keys that have come since."""
    try:
        return {**saved, "config": config_to_dict(config_from_dict(saved["config"]))}
    except ConfigError:  # a key has gone: it differs
        return saved


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as ``section.key``; what counts by its content or as a product is under a name of its own."""
    flat = {f"{section}.{key}": value for section, keys in record["config"].items() for key, value in keys.items()}
    for name, default in _training_defaults().items():
        flat.setdefault(f"training.{name}", default)
    for key in FLAGS:
        flat[key] = flat[key] or False
    for key in HELD_OUT:
        flat[key] = "given" if flat.get(key) else None
    for key, digests in record["data"].items():
        flat[f"content of {key}"] = digests
    flat.update(_leaves(flat.get("training.deepspeed"), "training.deepspeed"))
    flat["rows of the task in a step"] = flat[STEP[0]] * flat[STEP[1]]
    flat["ranks"] = record["ranks"]
    flat["blocks that are loaded (all where the task is evaluated)"] = record.get("blocks") or "all"
    return flat


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """What is in nested settings, each under its own name; the settings themselves as whether there are any."""
    if isinstance(value, dict):
        yield name, "given"
        for key, part in value.items():
            yield from _leaves(part, f"{name}.{key}")
    else:
        yield name, value


@functools.cache
def _training_defaults() -> dict[str, Any]:
    """Of `transformers.TrainingArguments`: spelled out or left out is the same."""
    from transformers import TrainingArguments

    fields = [field for field in dataclasses.fields(TrainingArguments) if field.init]
    values = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in fields
    }
    return json.loads(json.dumps(values, default=str))


class TakeUp(TrainerCallback):
    """What a resumed run takes from its present settings, though its checkpoint has it too: rhythm and place."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Logs, evaluations and checkpoints come as they are asked for now; the best one is where the folder is now."""
        state.compute_steps(args, state.max_steps)
        if state.best_global_step:
            best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            if best.exists():
                state.best_model_checkpoint = str(best)
            elif args.load_best_model_at_end and args.process_index == 0:
                say(f"{best}, the best checkpoint so far, is gone; the best one from here on counts")
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
