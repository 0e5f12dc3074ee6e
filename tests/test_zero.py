"""DeepSpeed's settings: presets, the user's own, and what is refused; runs with them are in test_zero_runs.py."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fastalign.config import config_from_dict
from fastalign.errors import ConfigError
from fastalign.training.run import train
from fastalign.training.zero import (
    PRESETS,
    deepspeed_settings,
    preset,
    refuse_contradictions,
    refuse_other_format,
    zero_stage,
)
from tests.configs import load


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_name_says_and_deepspeed_reads_it(name: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    settings = deepspeed_settings({"deepspeed": name})
    assert settings is not None and zero_stage({"deepspeed": name}) == int(name[4])
    read = DeepSpeedZeroConfig(**settings["zero_optimization"])  # which refuses keys that it does not know
    offload = name.endswith("-offload")
    assert (read.offload_optimizer is not None) == offload
    assert (read.offload_param is not None) == (offload and name.startswith("zero3"))
    assert settings["gradient_clipping"] == settings["train_batch_size"] == "auto"


def test_own_settings_win_and_are_left_as_they_are(tmp_path: Path) -> None:
    own = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7}, "gradient_clipping": 0.5}
    path = tmp_path / "own.json"
    path.write_text(json.dumps(own))
    for given in (own, str(path)):
        settings = deepspeed_settings({"deepspeed": given})
        assert settings is not None and settings.items() >= own.items()
        assert settings["gradient_accumulation_steps"] == "auto"
    assert own == json.loads(path.read_text())
    assert deepspeed_settings({}) is None and zero_stage({}) is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("zero4", ["'zero4' is neither a preset (did you mean 'zero", "zero3-offload"]),
        ("nowhere.json", ["neither a preset nor a JSON file", "zero1, zero1-offload"]),
        ({"zero_optimization": {"stage": 4}}, ["stage must be 0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": True}}, ["stage must be 0, 1, 2 or 3, not True"]),
        ({"zero_optimization": 2}, ["zero_optimization must hold keys and values, not 2"]),
        ({"bf16": True}, ["bf16 must hold keys and values, not True"]),
        ({"zero_optimization": {"stage": 2, "reduce_buckets": 5}}, ["reduce_buckets"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}, ["reduce_bucket_size"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": True}}, ["offload_optimizer must be {device: cpu}"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}, ["offload_param must be"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["nvme_path must be a folder"]),
        ({"optimizer": {"type": "Adam"}}, ["optimizer is DeepSpeed's own", "training.optim"]),
    ],
)
def test_what_there_is_not_is_refused(given: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        deepspeed_settings({"deepspeed": given})
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_file_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=r"own\.json"):
        deepspeed_settings({"deepspeed": str(path)})


FIGHTS: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (
        {"train_micro_batch_size_per_gpu": 3},
        {"per_device_train_batch_size": 4},
        ["train_micro_batch_size_per_gpu is 3, but training.per_device_train_batch_size is 4"],
    ),
    (
        {"train_batch_size": 8, "gradient_clipping": 0.5},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        [
            "train_batch_size is 8, but per_device_train_batch_size 4 x gradient_accumulation_steps 2 x 2 ranks is 16",
            "gradient_clipping is 0.5, but training.max_grad_norm is 1.0",
        ],
    ),
    ({"bf16": {"enabled": True}}, {}, ["bf16.enabled is True, but training.bf16 is False"]),
    ({"fp16": {"enabled": False}}, {"fp16": True}, ["fp16.enabled is False, but training.fp16 is True"]),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3}}},
        {"learning_rate": 5e-4, "lr_scheduler_type": "linear"},
        ["warmup_max_lr is 0.001, but", "scheduler.type is 'WarmupLR', but training.lr_scheduler_type is 'linear'"],
    ),
]


@pytest.mark.parametrize(("own", "training", "words"), FIGHTS)
def test_settings_that_fight_the_config_are_named_with_both_values(
    own: dict[str, Any], training: dict[str, Any], words: list[str]
) -> None:
    settings = deepspeed_settings({"deepspeed": own})
    assert settings is not None
    with pytest.raises(ConfigError) as caught:
        refuse_contradictions(settings, training, world_size=2)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_settings_that_agree_or_say_nothing_pass() -> None:
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "bf16": True, "learning_rate": 1e-3}
    same = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}
    same |= {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": "auto"}}}
    for own in (same, preset("zero3")):
        settings = deepspeed_settings({"deepspeed": own})
        assert settings is not None
        refuse_contradictions(settings, training, world_size=2)


def test_a_preset_may_stand_in_the_config(tmp_path: Path) -> None:
    assert load(tmp_path, "training: {deepspeed: zero2}").training["deepspeed"] == "zero2"


def test_without_a_launcher_it_is_refused_before_anything_is_read(raw_config: dict, tmp_path: Path) -> None:
    raw_config["training"]["deepspeed"] = "zero3-offload"
    raw_config["model"]["name_or_path"] = "nowhere"
    with pytest.raises(ConfigError, match="needs a launcher, for one GPU, too: deepspeed --num_accelerators 1"):
        train(config_from_dict(raw_config))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("dtype", "training", "words"),
    [
        (
            torch.bfloat16,
            {},
            "in float32 with neither training.bf16 nor fp16; set training.bf16: true, or model.dtype: float32",
        ),
        (torch.float32, {"bf16": True}, "loads the base in bfloat16 with training.bf16: true; set both"),
        (torch.bfloat16, {"bf16": True}, None),
        (torch.float32, {}, None),
    ],
)
def test_zero_3_loads_in_no_other_format_than_was_asked_for(
    dtype: torch.dtype, training: dict[str, Any], words: str | None
) -> None:
    config = config_from_dict({"training": {"deepspeed": "zero3", **training}})
    with pytest.raises(ConfigError, match=words) if words else nullcontext():
        refuse_other_format(config, dtype, "none")
    refuse_other_format(config, dtype, "nf4")
    refuse_other_format(config_from_dict({"training": {"deepspeed": "zero2", **training}}), dtype, "none")
