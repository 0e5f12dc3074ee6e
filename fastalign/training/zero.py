"""DeepSpeed's settings: presets by name, or the user's own, completed and compared with the rest of the config."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastalign.config import TRAINING_DEFAULTS, Config, nearest
from fastalign.errors import ConfigError

PRESETS = tuple(f"zero{stage}{offload}" for stage in (1, 2, 3) for offload in ("", "-offload"))
"""ZeRO stages; ``-offload`` keeps the optimizer, and under ZeRO-3 the base too, in the CPU's memory."""

# Elements of a buffer that gradients are exchanged in. DeepSpeed's default of 5e8 takes a gigabyte for an adapter of
# some millions.
BUCKET = 2**24
# Of ZeRO-3, in elements: parameters that are whole at a time, those fetched ahead, and one that is never parted.
LIVE, AHEAD, SMALL = 2**27, 2**24, 10**5

# What is the same in two places: DeepSpeed's key, and ours (of ``training:``).
SAME = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "scheduler.params.warmup_max_lr": "learning_rate",
}
# What settings get that do not say it: the value of ours, instead of a default of DeepSpeed's (such as no clipping).
FROM_OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def preset(name: str) -> dict[str, Any]:
    """The settings of one of `PRESETS`, as DeepSpeed takes them."""
    stage, offload = int(name[len("zero")]), name.endswith("-offload")
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET}
    if stage == 3:
        zero |= {
            "stage3_max_live_parameters": LIVE,
            "stage3_max_reuse_distance": LIVE,
            "stage3_prefetch_bucket_size": AHEAD,
            "stage3_param_persistence_threshold": SMALL,
        }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {"zero_optimization": zero}


def deepspeed_settings(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """What DeepSpeed is told, of ``training.deepspeed``: a preset's name, a JSON file, or the settings; None without.

    Args:
        training: the ``training`` section.

    Raises:
        ConfigError: there is no such preset or file, it cannot be read, or DeepSpeed would not take it.
    """
    given = training.get("deepspeed")
    if not given:
        return None
    found = _settings(given)
    _check(found)
    for key in FROM_OURS:
        found.setdefault(key, "auto")
    # Ours are the optimizers of training.optim, which DeepSpeed does not know; it has no native code to build for them.
    found.setdefault("zero_allow_untested_optimizer", True)
    found.setdefault("zero_force_ds_cpu_optimizer", False)
    found.setdefault("steps_per_print", 2**31)
    return found


def zero_stage(training: Mapping[str, Any]) -> int | None:
    """0 to 3; None without DeepSpeed. Raises ConfigError as `deepspeed_settings`."""
    settings = deepspeed_settings(training)
    return None if settings is None else settings["zero_optimization"]["stage"]


def parted(items: Mapping[str, int], zero: Mapping[str, Any], ranks: int, itemsize: int) -> dict[str, int]:
    """What one of several ranks holds of these bytes under ZeRO, with the buffers that DeepSpeed adds.

    Args:
        items: bytes on one rank alone: base, embedding, head, adapter, gradients, optimizer.
        zero: ``zero_optimization`` of `deepspeed_settings`. itemsize: bytes of a number of the base.

    Returns:
        These items, `buckets` (that gradients are exchanged in), and under ZeRO-3 `gathered`: parameters that are
        whole at a time, at most.
    """
    stage = zero["stage"]
    if not stage:
        return {**items, "buckets": items["gradients"]}
    held = dict(items)
    optimizer = ["optimizer", "gradients"] if stage > 1 else ["optimizer"]
    parameters = ["base", "embedding", "head", "adapter"]
    for names, key in ((optimizer, "offload_optimizer"), (parameters if stage == 3 else [], "offload_param")):
        away = (zero.get(key) or {}).get("device", "none") != "none"
        held |= {name: 0 if away else -(-items[name] // ranks) for name in names}
    held["buckets"] = itemsize * _number(zero, "reduce_bucket_size", 5 * 10**8)
    if stage == 3:
        live = _number(zero, "stage3_max_live_parameters", 10**9)
        ahead = _number(zero, "stage3_prefetch_bucket_size", 5 * 10**7)
        held["gathered"] = min(sum(items[name] for name in parameters), itemsize * (live + ahead))
    return held


def _check(settings: dict[str, Any]) -> None:
    """ConfigError for what DeepSpeed would refuse once a run has begun; sets the stage where it is left out."""
    for key in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler"):
        if not isinstance(settings.get(key, {}), dict):
            raise ConfigError(f"training.deepspeed: {key} must hold keys and values, not {settings[key]!r:.60}")
    zero = settings.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage <= 3:
        raise ConfigError(f"training.deepspeed: zero_optimization.stage must be 0, 1, 2 or 3, not {stage!r:.60}")
    for key in ("offload_optimizer", "offload_param"):
        part = zero.get(key)
        if part is not None and (not isinstance(part, dict) or part.get("device") not in ("none", "cpu", "nvme")):
            raise ConfigError(
                f"training.deepspeed: zero_optimization.{key} must be {{device: cpu}}, {{device: nvme, nvme_path: "
                f"FOLDER}} or {{device: none}}, not {part!r:.60}"
            )
        if part is not None and part["device"] == "nvme" and not os.path.isdir(str(part.get("nvme_path"))):
            raise ConfigError(f"training.deepspeed: zero_optimization.{key}.nvme_path must be a folder that is there")
    if settings.get("optimizer"):
        raise ConfigError(
            "training.deepspeed: optimizer is DeepSpeed's own, native code that it builds on first use; leave it out, "
            "and name one in training.optim, which works under every stage"
        )
    try:
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    except ImportError:  # told when it is needed
        return
    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValueError as error:  # pydantic's, of several lines
        details: Any = getattr(error, "errors", lambda: [])()
        why = "; ".join(f"{'.'.join(map(str, part['loc']))}: {part['msg']}" for part in details[:3]) or str(error)
        raise ConfigError(f"training.deepspeed: zero_optimization is not what DeepSpeed takes ({why})") from None


def _number(zero: Mapping[str, Any], key: str, default: int) -> int:
    given = zero.get(key, default)
    return int(given) if isinstance(given, (int, float)) else default  # "auto" comes of the model's width


def require_launcher(training: Mapping[str, Any]) -> None:
    """ConfigError where DeepSpeed is asked for in a process that no launcher has started, on one GPU, too."""
    if training.get("deepspeed") and "RANK" not in os.environ:
        raise ConfigError(
            "training.deepspeed needs a launcher, for one GPU, too: deepspeed --num_accelerators 1 --module fastalign "
            "train ..., or torchrun --nproc_per_node 1 -m fastalign train ...; or leave the key out"
        )


def refuse_other_format(config: Config, dtype: torch.dtype, quantization: str) -> None:
    """ConfigError where ZeRO-3 would load the base in another number format than the one that is configured.

    Args:
        config: with the effective ``training`` section. dtype: of the base. quantization: how it is held.
    """
    if zero_stage(config.training) != 3 or quantization != "none":
        return
    key = next((key for key in ("bf16", "fp16") if config.training.get(key)), None)
    theirs = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(key or "", torch.float32)
    if theirs != dtype:
        name, other = (f"{part}".removeprefix("torch.") for part in (dtype, theirs))
        mend = {torch.bfloat16: "training.bf16: true", torch.float16: "training.fp16: true"}
        said = f"training.{key}: true" if key else "neither training.bf16 nor fp16"
        raise ConfigError(
            f"model.dtype is {name}, but ZeRO-3 loads the base in {other} with {said}; set "
            f"{mend.get(dtype, 'both training.bf16 and training.fp16 to false')}, or model.dtype: {other}"
        )


def refuse_contradictions(settings: Mapping[str, Any], training: Mapping[str, Any], world_size: int) -> None:
    """ConfigError where DeepSpeed's settings and ours are at odds: names all such keys, with both values.

    Args:
        settings: as `deepspeed_settings` gives them. training: the ``training`` section, with our defaults.
        world_size: number of ranks.
    """
    from transformers import TrainingArguments

    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(TrainingArguments)} | {
        **training
    }
    wanted = {theirs: (f"training.{ours}", known[ours]) for theirs, ours in SAME.items()}
    micro, accumulation = known["per_device_train_batch_size"], known["gradient_accumulation_steps"]
    rows = f"per_device_train_batch_size {micro} x gradient_accumulation_steps {accumulation} x {world_size} ranks"
    wanted["train_batch_size"] = (rows, micro * accumulation * world_size)
    wrong = []
    for key, (name, ours) in wanted.items():
        theirs, ours = _value(settings, key), bool(ours) if key.endswith("enabled") else ours
        if theirs not in (None, "auto") and theirs != ours:
            wrong.append(f"{key} is {theirs!r}, but {name} is {ours!r}")
    kind, ours = _value(settings, "scheduler.type"), training.get("lr_scheduler_type")
    if kind and ours not in (None, TRAINING_DEFAULTS["lr_scheduler_type"]):
        wrong.append(f"scheduler.type is {kind!r}, but training.lr_scheduler_type is {ours!r}")
    if wrong:
        raise ConfigError(
            f"training.deepspeed is at odds with the rest of the config: {'; '.join(wrong)}; leave these keys out of "
            'the DeepSpeed settings, or set them to "auto" there'
        )


def _settings(given: Any) -> dict[str, Any]:
    if isinstance(given, dict):
        return copy.deepcopy(given)
    if given in PRESETS:
        return preset(given)
    if not Path(given).is_file():
        raise ConfigError(
            f"training.deepspeed: {given!r} is neither a preset{nearest(given, PRESETS)} nor a JSON file; the presets "
            f"are {', '.join(PRESETS)}"
        )
    try:
        found = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"training.deepspeed: {given!r} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"training.deepspeed: {given!r} must hold keys and values, not {type(found).__name__}")
    return found


def _value(settings: Mapping[str, Any], key: str) -> Any:
    found: Any = settings
    for name in key.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found
