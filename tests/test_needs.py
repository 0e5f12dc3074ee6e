"""What a run is predicted to hold, against what real models hold: byte for byte, or counted by autograd and PyTorch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastalign.config import Config, config_from_dict
from fastalign.model.early_exit import blocks_of, hidden_at
from fastalign.model.head import through_head
from fastalign.model.loading import add_adapter, load_model, load_model_config
from fastalign.objectives.cross_entropy import ChunkedCrossEntropy
from fastalign.training.needs import Needs, Shape, Target, logits_at_once, memory, needs_of, needs_of_model, target
from fastalign.training.zero import AHEAD, BUCKET, LIVE, PRESETS, preset

CPU = torch.device("cpu")
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
FULL = Target(torch.float32, None, on_gpu=False)


def storages(*tensors: Any) -> dict[int, int]:
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if t is not None}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("quantization", "dtype"), [("none", "bfloat16"), ("none", "float32"), ("nf4", "bfloat16")])
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_bnb_8bit"])
def test_base_adapter_and_optimizer_are_the_loaded_ones_to_the_byte(
    quantization: str, dtype: str, optim: str, tied: bool, raw_config: dict, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    size: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 300, "num_hidden_layers": 2, "vocab_size": 150}
    LlamaForCausalLM(
        LlamaConfig(**size, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=tied)
    ).save_pretrained(tmp_path)
    chosen = {"name_or_path": str(tmp_path), "quantization": quantization, "dtype": dtype}
    raw = {**raw_config, "model": chosen, "adapter": {"r": 24}, "training": {"optim": optim}}
    config = config_from_dict(raw)
    model = add_adapter(load_model(config.model), config.adapter)
    base, adapter = {}, {}
    for weight in model.parameters():
        (adapter if weight.requires_grad else base).update(storages(weight))
        state = getattr(weight, "quant_state", None)
        if state is not None:
            base |= storages(state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), use_cpu=True, optim=optim))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        weight.grad = torch.ones_like(weight)
    optimizer: Any = kind(trained, **options)
    optimizer.step()
    kept: dict[int, int] = {}
    for state in optimizer.state.values():
        kept |= storages(*(part for part in state.values() if isinstance(part, torch.Tensor)))

    needs = needs_of(config, load_model_config(config.model), target(config, CPU))
    items = memory(config, needs, {})["items"]
    assert items["base"] + items["embedding"] + items["head"] == sum(base.values())
    assert (items["adapter"], items["gradients"]) == (sum(adapter.values()),) * 2
    assert items["optimizer"] == sum(kept.values())
    assert items["embedding"] == 150 * 192 * getattr(torch, dtype).itemsize and bool(items["head"]) != tied
    assert needs_of_model(model, TrainingArguments(str(tmp_path), use_cpu=True)).skeleton.weights == sum(base.values())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("quantization", "adapter", "blocks", "stored"),
    [
        ("none", "float32", 2, False),
        ("nf4", "bfloat16", 2, False),
        ("none", "auto", None, True),
        ("nf4", "auto", 1, True),
    ],
)
def test_shortened_and_stored_bases_to_the_byte(
    quantization: str, adapter: str, blocks: int | None, stored: bool, tied: bool, tmp_path: Path
) -> None:
    """What `align_only` loads, adapters of 16 bits, and checkpoints that are in 4 bits already."""
    from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"hidden_size": 192, "intermediate_size": 300, "num_hidden_layers": 3, "vocab_size": 150}
    LlamaForCausalLM(
        LlamaConfig(**size, num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=tied)
    ).save_pretrained(tmp_path)
    if stored:
        packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")  # scales that are not packed again
        LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=packed).save_pretrained(tmp_path)
    config = config_from_dict(
        {
            "model": {"name_or_path": str(tmp_path), "quantization": quantization, "dtype": "bfloat16"},
            "adapter": {"dtype": adapter},
        }
    )
    model = add_adapter(load_model(config.model, blocks=blocks), config.adapter)
    held: dict[int, int] = {}
    for weight in model.parameters():
        held |= storages(weight)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            held |= storages(state.absmax, state.code, state.offset)
            held |= storages(state.state2.absmax, state.state2.code) if state.nested else {}
    needs = needs_of(config, load_model_config(config.model), target(config, CPU), blocks)
    assert needs.skeleton.weights + needs.skeleton.adapter == sum(held.values())


def family(name: str, hidden: int, inner: int) -> Any:
    import transformers

    heads = hidden // 32
    size: dict[str, Any] = {"num_hidden_layers": 5, "hidden_size": hidden, "intermediate_size": inner}
    size |= {"num_attention_heads": heads, "vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name != "GPTNeoX":
        size |= {"num_key_value_heads": heads // 2, "head_dim": 32}
    if name == "Gemma2":  # every other block sees a window only; eager attention, with soft-capping
        size |= {"sliding_window": 24}
    return getattr(transformers, f"{name}Config")(**size)


FAMILIES = ("Llama", "Qwen3", "GPTNeoX", pytest.param("Gemma2", marks=pytest.mark.slow))
# hidden and inner size; rows, width; blocks of an alignment, or the task
SHAPES = (
    (128, 352, 4, 64, None),
    (128, 352, 8, 16, None),
    (128, 352, 9, 24, 3),
    (128, 352, 3, 100, 3),
    (192, 384, 2, 8, 2),
)


class Real:
    """A model with weights, and a batch whose last row is shorter than the others."""

    def __init__(self, config: Config, hf_config: Any, rows: int, width: int, blocks: int | None, autocast: Any = None):
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        base = AutoModelForCausalLM.from_config(hf_config).requires_grad_(False)
        self.model: Any = add_adapter(base, config.adapter).train()
        if autocast is not None:
            for weight in self.model.parameters():
                weight.data = weight.data if weight.requires_grad else weight.data.to(autocast)
        self.ids = torch.randint(3, 300, (rows, width))
        self.mask = torch.ones_like(self.ids)
        self.mask[-1, width // 2 :] = 0
        self.blocks, self.autocast = blocks, autocast
        self.alive: list[torch.Tensor] = []  # what was counted: else another storage could take its place

    def states(self) -> torch.Tensor:
        inputs = {"input_ids": self.ids, "attention_mask": self.mask}
        with torch.autocast("cpu", dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            if self.blocks is not None:
                return hidden_at(self.model, self.blocks, **inputs)
            causal = self.model.get_base_model()
            return getattr(causal, causal.base_model_prefix)(**inputs, use_cache=False).last_hidden_state

    def step(self) -> None:
        states = self.states()
        states.backward(torch.ones_like(states))

    def kept(self) -> list[dict[int, int]]:
        """Storages by the block that saves them first, as autograd's hooks see them."""
        parts: list[dict[int, int]] = [{}]
        known = storages(*self.model.parameters())

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            known_now = known | {key: size for part in parts for key, size in part.items()}
            parts[-1].update({key: size for key, size in storages(tensor).items() if key not in known_now})
            self.alive.append(tensor)
            return tensor

        hooks = [b.register_forward_pre_hook(lambda *_: parts.append({})) for b in blocks_of(self.model)]
        hooks += [b.register_forward_hook(lambda *_: parts.append({})) for b in blocks_of(self.model)[-1:]]
        if self.blocks is not None:
            hooks[-1].remove()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            states = self.states()
        for hook in hooks:
            hook.remove()
        del states
        return parts

    def inputs_of_blocks(self) -> dict[int, int]:
        """What checkpointing keeps: all that a block is called with."""
        found: dict[int, int] = {}

        def note(_module: Any, args: Any, kwargs: Any) -> None:
            tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, torch.Tensor)]
            self.alive += tensors
            found.update(storages(*tensors))

        hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in blocks_of(self.model)]
        self.states()
        for hook in hooks:
            hook.remove()
        return found


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_activations_are_within_a_tenth_of_what_autograds_hooks_count(name: str, shape: tuple) -> None:
    """Seen: 0.93 to 1.05."""
    hidden, inner, rows, width, blocks = shape
    config, hf_config = config_from_dict({"adapter": {"r": 4}}), family(name, hidden, inner)
    real = Real(config, hf_config, rows, width, blocks)
    parts = real.kept()
    plain = sum(size for part in parts for size in part.values())
    inputs = real.inputs_of_blocks()
    blocks_only = parts[1 : 1 + (blocks or 5)]
    around = inputs.copy()
    for part in (parts[0], *parts[1 + (blocks or 5) :]):
        around |= part
    checkpointed = sum(around.values()) + max(sum(part.values()) for part in blocks_only)
    wanted = Shape(rows, rows, width, blocks, labels=0)
    built = needs_of(config, hf_config, FULL).skeleton
    for checkpointing, counted in ((False, plain), (True, checkpointed)):
        found = Needs(built, FULL, checkpointing).above(wanted)["activations"]
        assert 0.9 < found / counted < 1.1, (checkpointing, found, counted)


@contextmanager
def peaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module("harness").peak_bytes


PEAKS = [
    ("Llama", None, False),
    ("Llama", None, True),
    pytest.param("Llama", torch.bfloat16, True, marks=pytest.mark.slow),
    ("GPTNeoX", None, True),
    pytest.param("Llama", torch.bfloat16, False, marks=pytest.mark.slow),
    pytest.param("GPTNeoX", torch.bfloat16, False, marks=pytest.mark.slow),
    pytest.param("Gemma2", None, True, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "autocast", "checkpointing"), PEAKS)
def test_peak_is_within_a_tenth_of_what_the_allocator_counts(
    name: str, autocast: Any, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen: 0.94 to 1.02."""
    config, hf_config = config_from_dict({"adapter": {"r": 4}}), family(name, 128, 352)
    for blocks in (3, None):
        real = Real(config, hf_config, 6, 40, blocks, autocast)
        if checkpointing:
            real.model.gradient_checkpointing_enable({"use_reentrant": False})
        real.step()  # what is made only once; the gradients stay
        with peaks(monkeypatch) as peak_bytes:
            measured = peak_bytes(real.step, lambda: None)
        computes = Target(autocast or torch.float32, autocast, on_gpu=False)
        built = needs_of(config, hf_config, computes).skeleton
        found = Needs(built, computes, checkpointing).above(Shape(6, 6, 40, blocks, labels=0))["peak"]
        assert 0.9 < found / measured < 1.1, (blocks, found, measured)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_logits_are_what_the_loss_makes_of_its_rows_up_to_the_limit(name: str, dtype: torch.dtype) -> None:
    """A row as `ChunkedCrossEntropy` counts it; the heads with and without soft-capping."""
    from transformers import AutoModelForCausalLM

    hf_config = family(name, 128, 352)
    model: Any = AutoModelForCausalLM.from_config(hf_config, dtype=dtype).requires_grad_(False)
    measured = []
    rows = torch.ones(2, 4, dtype=torch.long)
    through_head(
        model,
        lambda states, head: measured.append(ChunkedCrossEntropy(10**9).row_bytes(states[0], head)) or states.sum(),
        input_ids=rows,
    )
    assert logits_at_once(7, hf_config, dtype.itemsize, 10**9) == 7 * measured[0]
    assert logits_at_once(10**6, hf_config, dtype.itemsize, 10**8) == 10**8
    assert logits_at_once(7, hf_config, dtype.itemsize, None) == 7 * 300 * (2 * dtype.itemsize + 4)


def test_zero_parts_what_it_says_and_ddp_copies_the_gradients(raw_config: dict) -> None:
    def items(ranks: int, **training: Any) -> dict[str, Any]:
        config = config_from_dict({**raw_config, "training": training})
        return memory(config, needs_of(config, load_model_config(config.model), FULL), {}, ranks)

    alone, ddp = items(1), items(2)["items"]
    assert alone["zero"] is None and "buckets" not in alone["items"] and ddp["buckets"] == ddp["adapter"]
    held = ("base", "embedding", "head", "adapter", "gradients", "optimizer")
    parts = {1: held[5:], 2: held[4:], 3: held}
    away = {"offload_optimizer": held[4:], "offload_param": held[:4]}
    for name in PRESETS:
        stage, offloads = int(name[4]), preset(name)["zero_optimization"].keys() & away.keys()
        gone = [item for key in offloads for item in away[key] if item in parts[stage]]
        found = items(4, deepspeed=name)
        for item in held:
            whole = alone["items"][item]
            assert found["items"][item] == (0 if item in gone else -(-whole // 4) if item in parts[stage] else whole)
        assert found["items"]["buckets"] == 4 * BUCKET
        saved = sum(alone["items"][item] - found["items"][item] for item in held)
        assert found["zero"] == {"stage": stage, "saved": saved}
        whole = sum(alone["items"][item] for item in held[:4])
        assert found["items"].get("gathered") == (min(whole, 4 * (LIVE + AHEAD)) if stage == 3 else None)


def test_negatives_of_all_ranks_bring_their_vectors(raw_config: dict) -> None:
    shapes = {"alignment": Shape(16, 8, 32, 2)}

    def peak(ranks: int, negatives: str) -> int:
        raw = {**raw_config, "alignment": {"negatives": negatives, "layer": [1, 2]}}
        config = config_from_dict(raw)
        return memory(config, needs_of(config, load_model_config(config.model), FULL), shapes, ranks)["peak"]

    assert peak(1, "world") == peak(1, "rank")
    assert peak(3, "world") - peak(3, "rank") == 2 * (3 - 1) * 16 * 64 * 4  # layers, other ranks, rows, width, fp32


@pytest.mark.slow
def test_mixtures_of_experts_kinds_of_blocks_and_dropout_are_seen() -> None:
    """A shorter run of the model gives what a longer one holds: dense blocks below, experts above."""
    from transformers import DeepseekV3Config

    size: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 352, "moe_intermediate_size": 32, "vocab_size": 99}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2}
    size |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    size |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 2}
    config = config_from_dict({"adapter": {"target_modules": ["o_proj"]}})
    dropping = config_from_dict({"adapter": {"target_modules": ["o_proj"], "dropout": 0.1}})
    kept = []
    for depth, settings in ((4, config), (5, config), (7, config), (7, dropping)):
        needs = needs_of(settings, DeepseekV3Config(**size, num_hidden_layers=depth), FULL)
        kept.append(needs.above(Shape(8, 8, 32, None, labels=0))["activations"])
    assert kept[2] - kept[1] == 2 * (kept[1] - kept[0]) > 0
    assert kept[3] - kept[2] >= 7 * 8 * 32 * 64  # at least the mask of each
