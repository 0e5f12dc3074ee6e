"""`transformers.TrainingArguments` from the config's ``training:`` section."""

from __future__ import annotations

import dataclasses
import os
import sys
from typing import TYPE_CHECKING, Any

import torch

from fastalign.config import TRAINING_DEFAULTS, Config, nearest
from fastalign.errors import ConfigError

if TYPE_CHECKING:
    from transformers import TrainingArguments


# TrainingArguments itself takes anything here, and fails in the midst of the run.
NUMBERS = {
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "num_train_epochs",
    "max_steps", "warmup_steps", "logging_steps", "eval_steps", "save_steps", "seed", "gradient_accumulation_steps",
    "per_device_train_batch_size", "per_device_eval_batch_size",
}  # fmt: skip


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
    values: dict[str, Any] = {**TRAINING_DEFAULTS, **_hardware_defaults(user), **user}
    if not can_evaluate:
        for key in ("eval_strategy", "load_best_model_at_end", "eval_on_start"):
            if user.get(key) not in (None, False, "no"):
                raise ConfigError(f"training.{key}: nothing is held out; give eval_data, or an eval_share above 0")
        values["eval_strategy"] = "no"
    for key in NUMBERS & user.keys():
        if isinstance(user[key], bool) or not isinstance(user[key], (int, float)):
            raise ConfigError(f"training.{key} must be a number, not {user[key]!r}")
    if user.get("max_steps") == 0:
        raise ConfigError("training.max_steps must be above 0, or left out to train for num_train_epochs")
    return values


def training_arguments(values: dict[str, Any]) -> TrainingArguments:
    """`transformers.TrainingArguments` of these values. ConfigError with its reason where it refuses them."""
    from transformers import TrainingArguments

    try:
        arguments = TrainingArguments(**values)
    except (ValueError, TypeError, KeyError, ImportError, OSError) as error:
        raise ConfigError(f"training: {error}") from None
    arguments.remove_unused_columns = False
    return arguments


def _hardware_defaults(user: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"disable_tqdm": not sys.stderr.isatty()}
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not user.get("fp16"):
        values["bf16"] = True
    if not torch.cuda.is_available():
        values["dataloader_pin_memory"] = False
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed guesses otherwise, with a warning
    return values
