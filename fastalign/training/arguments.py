"""`transformers.TrainingArguments` from the config's ``training:`` section."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from fastalign.config import TRAINING_DEFAULTS, Config, nearest
from fastalign.errors import ConfigError
from fastalign.model.loading import has_bf16

if TYPE_CHECKING:
    from transformers import TrainingArguments


# TrainingArguments itself takes anything here, and fails in the midst of the run.
COUNTS = {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
NUMBERS = {
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs",
    "warmup_steps", "logging_steps", "eval_steps", "save_steps",
}  # fmt: skip
# These act in parts of the Trainer that streams replace.
UNUSED = {
    "label_smoothing_factor": "the task's loss is plain cross-entropy",
    "torch_empty_cache_steps": "use an allocator setting such as PYTORCH_ALLOC_CONF=expandable_segments:True",
    "group_by_length": "streams choose their own rows",
    "train_sampling_strategy": "streams choose their own rows",
    "dataloader_num_workers": "streams make their own batches",
    "data_seed": "training.seed decides the order of the rows",
    "restore_callback_states_from_checkpoint": "the history of a run is restored without it",
    "fsdp": "use DDP, or DeepSpeed ZeRO-2",
}


def effective_training(config: Config, can_evaluate: bool) -> dict[str, Any]:
    """The ``training:`` section as it is in force: the user's settings over our defaults.

    `resume_from_checkpoint` is not among them: it says how a run is started, not what it does.

    Args:
        config: the whole configuration.
        can_evaluate: whether anything is held out to evaluate on.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or an evaluation of nothing.
    """
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    user = {key: value for key, value in config.training.items() if key != "resume_from_checkpoint"}
    for key in user:
        if key not in known:
            raise ConfigError(
                f"unknown key training.{key}{nearest(key, known)}; the keys are those of transformers.TrainingArguments"
            )
    values: dict[str, Any] = {**TRAINING_DEFAULTS, **hardware_defaults(user), **user}
    if not can_evaluate:
        for key in ("eval_strategy", "load_best_model_at_end", "eval_on_start"):
            if user.get(key) not in (None, False, "no"):
                raise ConfigError(f"training.{key}: nothing is held out; give eval_data, or an eval_share above 0")
        values["eval_strategy"] = "no"
    _check(user)
    return values


def _check(user: dict[str, Any]) -> None:
    for key in UNUSED.keys() & user.keys():
        if user[key]:
            raise ConfigError(f"training.{key} has no effect here: {UNUSED[key]}")
    for key in sorted(user.keys() & (COUNTS | NUMBERS | {"seed", "max_steps"})):
        value, whole = user[key], key not in NUMBERS
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            raise ConfigError(f"training.{key} must be {'an integer' if whole else 'a number'}, not {value!r}")
        least = 1 if key in COUNTS else 0 if key == "seed" else None
        if least is not None and value < least:
            raise ConfigError(f"training.{key} must be at least {least}, not {value}")
    if user.get("max_steps") == 0:
        raise ConfigError("training.max_steps must be above 0, or left out to train for num_train_epochs")
    if user.get("num_train_epochs", 1) <= 0 and user.get("max_steps", -1) <= 0:
        raise ConfigError("training.num_train_epochs must be above 0")


def training_arguments(values: dict[str, Any]) -> TrainingArguments:
    """`transformers.TrainingArguments` of these values. ConfigError with its reason where it refuses them."""
    from transformers import TrainingArguments

    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"training: {error}") from None
    arguments.remove_unused_columns = False
    return arguments


def hardware_defaults(user: dict[str, Any]) -> dict[str, Any]:
    """What suits this machine: bf16 where a GPU has it, no pinned memory without one, no progress bar in a file."""
    values: dict[str, Any] = {"disable_tqdm": not sys.stderr.isatty()}
    device = torch.device("cuda" if torch.cuda.is_available() and not user.get("use_cpu") else "cpu")
    if has_bf16(device) and not user.get("fp16"):
        values["bf16"] = True
    if device.type == "cpu":
        values["dataloader_pin_memory"] = False
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed guesses otherwise, with a warning
    return values
