"""The forecast against time that is measured, and which way it moves with every setting; bytes: test_needs.py."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastalign.config import Config, config_from_dict
from fastalign.model.early_exit import hidden_at
from fastalign.model.loading import add_adapter, load_model_config
from fastalign.training.forecast import forecast, step_flops
from fastalign.training.needs import Shape, Target, memory, needs_of

CPU = torch.device("cpu")
SHAPES = {"task": Shape(16, 4, 64), "alignment": Shape(64, 64, 32, blocks=2)}
FULL, HALF = (Target(dtype, None, on_gpu=False) for dtype in (torch.float32, torch.bfloat16))


def needs(raw: dict, shapes: dict[str, Shape] | None = None, computes: Target = FULL) -> dict[str, Any]:
    config = config_from_dict(raw)
    found = memory(config, needs_of(config, load_model_config(config.model), computes), shapes or SHAPES)
    return {**found["items"], **found}


def test_forecast_has_memory_and_time(raw_config: dict) -> None:
    config = config_from_dict(raw_config)
    found = forecast(config, load_model_config(config.model), SHAPES, {"task": 2, "alignment": 2}, CPU)
    assert found["trainable"] * 4 == found["memory"]["items"]["adapter"] and found["seconds"] > 0


@pytest.mark.parametrize(
    ("section", "key", "value", "part", "sign"),
    [
        ("model", "quantization", "nf4", "base", -1),
        ("adapter", "r", 16, "adapter", 1),
        ("adapter", "target_modules", ["q_proj"], "adapter", -1),
        ("adapter", "r", 16, "gradients", 1),
        ("adapter", "r", 16, "optimizer", 1),
        ("training", "optim", "adamw_bnb_8bit", "optimizer", -1),
        ("training", "gradient_checkpointing", True, "peak", -1),
    ],
)
def test_memory_moves_with_the_settings(
    section: str, key: str, value: Any, part: str, sign: int, raw_config: dict
) -> None:
    raw = copy.deepcopy(raw_config)
    raw[section][key] = value
    before, after = needs(raw_config), needs(raw)
    assert (after[part] - before[part]) * sign > 0
    assert (after["peak"] - before["peak"]) * sign > 0


@pytest.mark.parametrize("change", [Shape(16, 8, 64), Shape(16, 4, 128)])
def test_memory_moves_with_the_rows_and_their_width(change: Shape, raw_config: dict) -> None:
    before, after = needs(raw_config), needs(raw_config, {**SHAPES, "task": change})
    held = [found["streams"]["task"]["activations"] for found in (before, after)]
    assert 1.9 < held[1] / held[0] < 2.2  # width: the attention mask grows by its square
    assert after["streams"]["alignment"] == before["streams"]["alignment"]
    for found in (before, after):
        assert sum(found["items"].values()) == found["peak"]
        above = sum(found[part] for part in ("activations", "logits", "workspace"))
        assert above == max(stream["peak"] for stream in found["streams"].values())


def test_memory_moves_with_the_blocks_and_the_number_format(raw_config: dict) -> None:
    whole = {"alignment": Shape(64, 64, 32, blocks=4)}
    half = {"alignment": Shape(64, 64, 32, blocks=2)}
    assert needs(raw_config, whole)["peak"] > needs(raw_config, half)["peak"]
    full, short = needs(raw_config, half), needs(raw_config, half, HALF)
    assert short["base"] * 2 == full["base"] and short["adapter"] == full["adapter"]
    assert 0.5 < short["activations"] / full["activations"] < 1


def test_a_model_that_does_not_run_without_weights_is_forecast_without_memory(
    raw_config: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: forward(self, x) * x.sum().item())
    config = config_from_dict({**raw_config, "adapter": {"r": 3}})
    found = forecast(config, load_model_config(config.model), SHAPES, {"task": 2, "alignment": 2}, CPU)
    assert found["memory"] is None and "cannot be predicted" in found["unknown"] and found["seconds"] > 0


def test_flops_are_those_of_the_formula(raw_config: dict) -> None:
    raw = copy.deepcopy(raw_config)
    config = config_from_dict(raw)
    size = needs_of(config, load_model_config(config.model), FULL).skeleton
    base, adapter, attention = 4 * size.block + size.head_weights, size.trainable, 4 * 10 * 64 * 4
    task = step_flops(config, size, Shape(8, 4, 10), contrastive=False)
    assert task == 80 * (4 * base + 6 * adapter + 3 * attention)
    raw["training"]["gradient_checkpointing"] = True
    again = step_flops(config_from_dict(raw), size, Shape(8, 4, 10), contrastive=False)
    assert again == task + 80 * (2 * base + 2 * adapter + attention)

    whole = step_flops(config, size, Shape(8, 8, 10, blocks=2), contrastive=True)
    cached = step_flops(config, size, Shape(8, 4, 10, blocks=2), contrastive=True)
    assert whole == 80 * (8 * size.block + 3 * adapter + 1.5 * attention)
    assert cached == whole + 80 * (4 * size.block + adapter + attention / 2)
    narrow = Shape(8, 8, 10, blocks=2, usual_width=5)
    assert 0.4 < step_flops(config, size, narrow, contrastive=True) / whole < 0.5


def test_of_a_mixture_only_the_experts_that_run_count() -> None:
    from transformers import MixtralConfig

    shape: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 8}
    few, all_of_them = (MixtralConfig(**shape, num_experts_per_tok=count) for count in (2, 8))
    config = config_from_dict({"adapter": {"target_modules": ["q_proj"]}})
    sizes = [needs_of(config, mixture, FULL).skeleton for mixture in (few, all_of_them)]
    assert sizes[0].base == sizes[1].base
    assert sizes[1].block - sizes[0].block == 6 * 3 * 32 * 64


def llama(checkpointing: bool) -> tuple[Any, Any, Config]:
    from transformers import LlamaConfig, LlamaForCausalLM

    hf_config = LlamaConfig(
        num_hidden_layers=6,
        hidden_size=256,
        intermediate_size=704,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=2000,
    )
    config = config_from_dict({"training": {"gradient_checkpointing": checkpointing}})
    model: Any = add_adapter(LlamaForCausalLM(hf_config).requires_grad_(False), config.adapter).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, hf_config, config


def steps_of(model: Any, ids: torch.Tensor, dtype: torch.dtype) -> dict[str, tuple[Callable[[], None], int | None]]:
    """Forward and backward of a stream, and the blocks that it runs; under autocast for half precision."""

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def align() -> None:
        with autocast():
            states = hidden_at(model, 3, input_ids=ids, attention_mask=torch.ones_like(ids))
        states.float().mean(1).pow(2).sum().backward()

    def task() -> None:
        with autocast():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        F.cross_entropy(logits.float()[:, -9:-1].flatten(0, 1), ids[:, -8:].flatten()).backward()

    return {"alignment": (align, 3), "task": (task, None)}


@pytest.mark.slow  # needs a machine that does nothing else
@pytest.mark.parametrize("checkpointing", [False, True])
def test_seconds_are_within_a_factor_of_four(checkpointing: bool) -> None:
    model, hf_config, config = llama(checkpointing)
    for name, (step, blocks) in steps_of(model, torch.randint(3, 2000, (16, 32)), torch.float32).items():
        times = []
        for _ in range(4):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        found = forecast(config, hf_config, {name: Shape(16, 16, 32, blocks)}, {name: 5}, CPU)
        assert found["seconds"] == sum(found["streams"].values())
        assert 0.25 < found["seconds"] / (5 * min(times)) < 4, (name, found["seconds"], times)
