"""`transformers.TrainingArguments` from the config's ``training:`` section."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import sys
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fastalign.config import TRAINING_DEFAULTS, Config, nearest
from fastalign.config.checks import type_name
from fastalign.errors import ConfigError
from fastalign.model.loading import has_bf16
from fastalign.streams.base import say
from fastalign.training.joining import make_group
from fastalign.training.zero import deepspeed_settings, refuse_contradictions

if TYPE_CHECKING:
    from transformers import TrainingArguments


# (least, most): TrainingArguments itself takes anything, and fails in the midst of the run.
COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(COUNTS, (1, 2**20)),
    **dict.fromkeys(("learning_rate", "weight_decay", "adam_epsilon"), (0, 1e30)),  # PyTorch fails beyond fp32
    **dict.fromkeys(("max_grad_norm", "warmup_steps"), (0, math.inf)),
    **dict.fromkeys(("eval_accumulation_steps", "ddp_bucket_cap_mb", "ddp_timeout"), (1, 2**31)),
    "save_total_limit": (0, 2**31),
    "neftune_noise_alpha": (0, 1e6),
    "seed": (0, 2**32 - 1),
}
LOG_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")
# These act in parts of the Trainer that we replace: refused where neglect would change what is learnt, or lose it, ...
REFUSED = {
    "label_smoothing_factor": "the task's loss is plain cross-entropy",
    "group_by_length": "streams choose their own rows",
    "train_sampling_strategy": "streams choose their own rows",
    "fsdp": "use DDP, or DeepSpeed: training.deepspeed: zero3",
    "save_on_each_node": "all ranks write into one folder, which all hosts share",
}
# ... and otherwise said, since configurations are copied.
UNUSED = {
    "torch_empty_cache_steps": "use an allocator setting such as PYTORCH_ALLOC_CONF=expandable_segments:True",
    "dataloader_num_workers": "streams make their own batches",
    "data_seed": "training.seed decides the order of the rows",
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

    hints = typing.get_type_hints(TrainingArguments)
    known = {field.name: field.default for field in dataclasses.fields(TrainingArguments) if field.init}
    user = {key: value for key, value in config.training.items() if key != "resume_from_checkpoint"}
    for key in user:
        if key not in known:
            raise ConfigError(
                f"unknown key training.{key}{nearest(key, known)}; the keys are those of transformers.TrainingArguments"
            )
    _check(user, hints)
    _check_effect({key: value for key, value in user.items() if value and value != known[key]})
    if "report_to" in user and user["report_to"] is None:
        user["report_to"] = "none"
    values: dict[str, Any] = {**TRAINING_DEFAULTS, **hardware_defaults(user), **user}
    if not can_evaluate:
        for key in ("eval_strategy", "load_best_model_at_end", "eval_on_start"):
            if user.get(key) not in (None, False, "no"):
                raise ConfigError(f"training.{key}: nothing is held out; give eval_data, or an eval_share above 0")
        values["eval_strategy"] = "no"
    return values


def _check(user: dict[str, Any], hints: dict[str, Any]) -> None:
    if user.get("hub_token") is not None:
        raise ConfigError(
            "training.hub_token would be written to config.yaml and to every checkpoint; leave it out, and set the "
            "environment variable HF_TOKEN or run: hf auth login"
        )
    for key, value in sorted(user.items()):
        if not _fits(hints[key], value):
            raise ConfigError(f"training.{key} must be {_words(hints[key])}, not {value!r}")
        if isinstance(value, (int, float)) and not abs(value) < (math.inf if isinstance(value, float) else 2**53):
            raise ConfigError(f"training.{key} must be a number that is not that large, not {value!r}")
        least, most = RANGES.get(key, (-math.inf, math.inf))
        if isinstance(value, (int, float)) and not least <= value <= most:
            rule = f"at least {least}" if value < least else f"at most {most}"
            raise ConfigError(f"training.{key} must be {rule}, not {value}")
    if user.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("training.use_liger_kernel: liger-kernel is not installed; pip install liger-kernel")
    for key in ("log_level", "log_level_replica"):
        if user.get(key) is not None and user[key] not in LOG_LEVELS:
            raise ConfigError(f"training.{key} must be {' or '.join(LOG_LEVELS)}, not {user[key]!r}")
    if user.get("max_steps") == 0:
        raise ConfigError("training.max_steps must be above 0, or left out to train for num_train_epochs")
    if user.get("num_train_epochs", 1) <= 0 and user.get("max_steps", -1) <= 0:
        raise ConfigError("training.num_train_epochs must be above 0")


def _check_effect(chosen: dict[str, Any]) -> None:
    """Refuses or says, of the settings that differ from their defaults, those without an effect."""
    for key in REFUSED.keys() & chosen.keys():
        raise ConfigError(f"training.{key} has no effect here: {REFUSED[key]}; leave it out")
    for key in UNUSED:
        if key in chosen:
            say(f"training.{key} has no effect here: {UNUSED[key]}")


def _fits(hint: Any, value: Any) -> bool:
    """Whether a value is of an annotated type: an integer is also a number, true and false are neither."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(option, value) for option in arguments)
    if origin is typing.Literal:
        return any(value is option for option in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(arguments[0], item) for item in value)
    if origin is dict or hint is dict:
        return isinstance(value, dict) and all(
            _fits(arguments[1], item) for item in (value.values() if arguments else ())
        )
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """An annotation in words; the classes of the libraries are left out, since YAML cannot hold them."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    parts = [typing.get_args(option) if typing.get_origin(option) is list else (option,) for option in options]
    plain = [
        option
        for option, inner in zip(options, parts, strict=True)
        if all(typing.get_origin(part) or part.__module__ == "builtins" for part in inner)
    ]
    names = {dict: "keys and values", Any: "anything"}
    return " or ".join(
        "keys and values" if typing.get_origin(option) is dict else names.get(option) or type_name(option)
        for option in plain or options
    )


def checkpointing(training: Mapping[str, Any]) -> bool:
    """Whether blocks are recomputed in the backward, by the newer name of transformers or the older one."""
    return bool(training.get("activation_checkpointing") or training.get("gradient_checkpointing"))


def training_arguments(values: dict[str, Any]) -> TrainingArguments:
    """`transformers.TrainingArguments` of these values. ConfigError where it, or DeepSpeed, cannot work with them."""
    from transformers import TrainingArguments

    settings = deepspeed_settings(values)
    if settings is not None:
        refuse_contradictions(settings, values, int(os.environ.get("WORLD_SIZE", "1")))
    make_group(values)
    try:
        arguments = TrainingArguments(**{**values, "deepspeed": settings})
    except Exception as error:  # its checks raise anything at all
        choice = [key for key, value in values.items() if f"{error}".startswith(f"{value} is not a valid")]
        raise ConfigError(f"training{''.join(f'.{key}' for key in choice[:1])}: {error}") from None
    if settings is not None and torch.distributed.is_initialized():
        import deepspeed

        deepspeed.init_distributed()  # of the group that is there; without, ZeRO-3 would load as if on one rank
    arguments.remove_unused_columns = False
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # the old name and the new one
        given = getattr(arguments, name, None)
        if isinstance(given, dict):  # else PyTorch's own default is the reentrant kind; transformers' is not
            setattr(arguments, name, {"use_reentrant": False, **given})
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
