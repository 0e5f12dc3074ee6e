"""Predicted activations against what PyTorch's allocator counts on the CPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastalign.errors import RunError
from fastalign.model.early_exit import hidden_at
from fastalign.training.memory import activation_bytes, free_bytes, gigabytes, is_out_of_memory

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("hidden", "inner", "vocab", "kv_heads"), [(256, 704, 2000, 4), (128, 512, 8000, 1)])
def test_within_a_third_of_what_is_measured(
    hidden: int, inner: int, vocab: int, kv_heads: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    peak_bytes = importlib.import_module("harness").peak_bytes

    config = LlamaConfig(
        num_hidden_layers=8,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=hidden // 64,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
    )
    base: Any = LlamaForCausalLM(config)
    model: Any = get_peft_model(base, LoraConfig(target_modules="all-linear", r=8, task_type="CAUSAL_LM")).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, vocab, (16, 32))

    def align() -> None:
        hidden_at(model, 4, input_ids=ids, attention_mask=torch.ones_like(ids)).mean(1).pow(2).sum().backward()

    def task() -> None:
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        F.cross_entropy(logits[:, -9:-1].flatten(0, 1).float(), ids[:, -8:].flatten()).backward()

    for step, layers, logits in ((align, 4, False), (task, 8, True)):
        step()  # what is made only once
        measured = peak_bytes(step, model.zero_grad)
        predicted = activation_bytes(config, 16, 32, layers, 4, checkpointing=checkpointing, logits=logits)
        assert 0.67 < predicted / measured < 1.5, (step.__name__, predicted, measured)


def test_what_counts_as_out_of_memory() -> None:
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    ):
        assert is_out_of_memory(error)
    for error in (RuntimeError("shapes"), ValueError("out of memory"), RunError("out of memory: said already")):
        assert not is_out_of_memory(error)


def test_free_memory_of_this_machine() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50
    assert (gigabytes(1_234_000_000), gigabytes(56_700_000)) == ("1.23 GB", "57 MB")
