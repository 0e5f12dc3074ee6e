"""The task's loss without all its logits: equal to the plain one for every head, within its memory, or refused."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastalign.config import config_from_dict, logits_bytes
from fastalign.data.tokenization import IGNORE_INDEX
from fastalign.errors import ConfigError
from fastalign.model.head import Head, through_head
from fastalign.objectives.cross_entropy import ChunkedCrossEntropy
from fastalign.streams.base import MicroBatch
from fastalign.streams.task import TaskStream
from tests.families import FAMILIES, batch, build, built

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
# (family, changes, what is particular about its head)
HEADS: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES}
HEADS |= {
    "tied": ("llama", {"tie_word_embeddings": True}),
    "bias": ("phi", {}),
    "bias of gptj": ("gptj", {"rotary_dim": 4}),
    "projected": ("opt", {"word_embed_proj_dim": 16}),
    "soft cap of gemma3": ("gemma3_text", {"final_logit_softcapping": 2.0}),
}


def labelled(keep: torch.Tensor | None = None) -> MicroBatch:
    """`batch()` with labels where `keep` is true, else on sixteen of its tokens: division by that rounds nothing."""
    inputs = batch()
    answer = inputs["attention_mask"].bool() if keep is None else inputs["attention_mask"].bool() & keep
    answer[:, 0] = False
    if keep is None:
        dropped = torch.randperm(int(answer.sum()))[16:]
        answer[tuple(answer.nonzero()[dropped].T)] = False
    labels = inputs["input_ids"].masked_fill(~answer, IGNORE_INDEX)
    return MicroBatch(inputs | {"labels": labels}, tokens=27, items=int((labels[:, 1:] != IGNORE_INDEX).sum()))


def stream(memory: int | None) -> TaskStream:
    tokenizer: Any = SimpleNamespace(max_length=11)
    nothing: Any = None
    settings: dict[str, Any] = {"micro_batch_size": 3, "accumulation": 1, "eval_batch_size": 3}
    return TaskStream([], [], tokenizer, nothing, **settings, logits_memory=memory)


def plain(model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
    """The mean, over all tokens, in fp32."""
    inputs = micro_batch.inputs
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)[0]
    logits = logits[:, :-1].flatten(0, 1).float()
    labels = inputs["labels"][:, 1:].flatten()
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum") / micro_batch.items


def ours(model: nn.Module, micro_batch: MicroBatch, memory: int) -> torch.Tensor:
    task = stream(memory)
    task.begin_step(model, [micro_batch])
    return task.loss(model, micro_batch)


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


def assert_equal_loss(model: nn.Module, micro_batch: MicroBatch, memory: int, tolerance: float = 1e-5) -> None:
    """The tolerance is relative: of a gradient its norm's, but of one that is nearly zero the largest's."""
    expected, found = plain(model, micro_batch), ours(model, micro_batch, memory)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    wanted, given = gradients(model, expected), gradients(model, found)
    assert given.keys() == wanted.keys()
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        error, norm = float((given[name] - gradient).norm()), float(gradient.norm())
        assert error <= tolerance * max(norm, 0.1 * largest), (name, error, norm)


# ------------------------------------------------------------------------------------------------- every head


@pytest.mark.parametrize("case", HEADS)
def test_value_and_all_gradients_are_those_of_the_plain_logits(case: str) -> None:
    """Of a model that is trained whole: through a tied head, too, and in one row, a few rows and all at a time."""
    family, changes = HEADS[case]
    model = build(family, **changes)
    micro_batch = labelled()
    assert micro_batch.items == 16
    for memory in (1, 3500, 10**9):
        assert_equal_loss(model, micro_batch, memory)
    assert "forward" not in vars(model) and not any("forward" in vars(module) for module in model.modules())


def test_heads_are_what_they_are_called() -> None:
    assert built("gemma2").config.final_logit_softcapping and built("granite").config.logits_scaling == 7.0
    assert built("cohere").logit_scale == 0.25 and build("phi").lm_head.bias is not None
    assert build("opt", word_embed_proj_dim=16).model.decoder.project_out is not None
    for family in ("gpt2", "gemma2"):
        model = built(family)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert built("llama").lm_head.weight is not built("llama").model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], ["lm_head"]], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_inside_wrappers_and_with_an_adapter_on_the_head(dtype: torch.dtype, autocast: bool, targets: Any) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    model: Any = get_peft_model(build("llama").to(dtype).requires_grad_(False), lora).train()
    # Sums over chunks round to bf16 otherwise than one sum: 2.4e-3 was seen.
    tolerance = 1e-5 if dtype == torch.float32 and not autocast else 1e-2
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        if autocast:  # accelerate puts it on the forward of the outermost wrapper
            model = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
        for _ in range(2):  # first use, and not
            assert_equal_loss(model, labelled(), 3500, tolerance)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_compiled() -> None:
    torch._dynamo.reset()
    model = build("llama")
    compiled: Any = torch.compile(build("llama"), backend="eager")
    wanted = gradients(model, plain(model, labelled()))
    for _ in range(2):
        given = gradients(compiled, ours(compiled, labelled(), 3500))
        for name, gradient in wanted.items():
            torch.testing.assert_close(given[f"_orig_mod.{name}"], gradient, rtol=1e-4, atol=1e-6, msg=name)
    torch._dynamo.reset()


# ------------------------------------------------------------------------------------------------------ rows


def matrix(rows: int, size: int = 50, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, list[int]]:
    """States, labels, a head, and the number of rows of its calls."""
    torch.manual_seed(0)
    weight = torch.randn(size, 8).to(dtype)
    calls: list[int] = []

    def head(states: torch.Tensor) -> torch.Tensor:
        calls.append(len(states))
        return states @ weight.T

    return torch.randn(rows, 8).to(dtype).requires_grad_(), torch.randint(0, size, (rows,)), head, calls


@pytest.mark.parametrize(("rows", "at_once", "chunks"), [(7, 3, [2, 2, 3]), (7, 7, [7]), (7, 1, [1] * 7), (1, 9, [1])])
def test_chunks_that_do_not_divide(rows: int, at_once: int, chunks: list[int]) -> None:
    states, labels, head, calls = matrix(rows)
    in_chunks = ChunkedCrossEntropy(at_once * 8 * 50 + 3)  # logits and their copy, in fp32
    loss = in_chunks(states, labels, head)
    assert calls[2:] == chunks  # after the two calls that count
    (given,) = torch.autograd.grad(3.0 * loss, states)
    (wanted,) = torch.autograd.grad(3.0 * F.cross_entropy(head(states), labels, reduction="sum"), states)
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)
    calls.clear()
    in_chunks(states, labels, head)
    assert calls == chunks  # it is counted once


@pytest.mark.parametrize("memory", [1, 10**9])
def test_no_row_and_one_row(memory: int) -> None:
    model = build("llama")
    nothing = labelled(torch.zeros(3, 11, dtype=torch.bool))
    loss = ours(model, nothing, memory)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(model, loss).values())
    only = torch.zeros(3, 11, dtype=torch.bool)
    only[1, 4] = True
    one = labelled(only)
    assert one.items == 1
    assert_equal_loss(model, one, memory)


def test_what_is_ignored_is_not_seen_by_the_head() -> None:
    model = build("llama")
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[:-1].numel()))
    micro_batch = labelled()
    ours(model, micro_batch, 10**9)
    assert seen.pop() == micro_batch.items and max(seen) <= 3  # the rest is first use: comparison and count


def test_accumulation_is_one_batch() -> None:
    """A step of three micro-batches of one row, one of them without a label."""
    model, whole = build("llama"), labelled()
    whole.inputs["labels"][1] = IGNORE_INDEX
    learnt = [int((labels[1:] != IGNORE_INDEX).sum()) for labels in whole.inputs["labels"]]
    whole.items = sum(learnt)
    parts = [MicroBatch({name: part[i : i + 1] for name, part in whole.inputs.items()}, 1, learnt[i]) for i in range(3)]
    task = stream(3500)
    task.begin_step(model, parts)
    model.zero_grad()
    total = torch.zeros(())
    for part in parts:
        loss = task.loss(model, part)
        loss.backward()
        total += loss.detach()
    given = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    expected = plain(model, whole)
    torch.testing.assert_close(total, expected.detach())
    for name, gradient in gradients(model, expected).items():
        torch.testing.assert_close(given[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_the_first_use_draws_no_random_number_of_the_run() -> None:
    """A resumed process has its first use later, and must draw what the other one drew."""
    weight = torch.randn(50, 8)
    chunked = ChunkedCrossEntropy(10**9)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        head = lambda rows: F.dropout(rows, 0.5) @ weight.T  # noqa: E731
        losses.append(chunked(torch.ones(4, 8), torch.arange(4), head).item())
    assert losses[0] == losses[1]


def test_evaluation_takes_no_gradients() -> None:
    states, labels, head, calls = matrix(20)
    in_chunks = ChunkedCrossEntropy(2000)
    expected = in_chunks(states, labels, head)

    def checked(rows: torch.Tensor) -> torch.Tensor:
        assert not rows.requires_grad
        return head(rows)

    with torch.no_grad():
        loss = in_chunks(states, labels, checked)
    assert loss.item() == expected.item() and not loss.requires_grad and len(calls) > 4


def test_fp16_keeps_gradients_that_are_small_before_the_loss_is_scaled_up() -> None:
    """exp(-17.7) = 2e-8 is zero in fp16, whose smallest number is 6e-8."""
    states = torch.zeros(1, 2, dtype=torch.float16, requires_grad=True)
    offset = torch.tensor([17.7, 0.0], dtype=torch.float16)
    loss = ChunkedCrossEntropy(1000)(states, torch.tensor([0]), lambda rows: rows + offset)
    (gradient,) = torch.autograd.grad(65536.0 * loss, states)
    assert gradient[0, 1].item() == pytest.approx(65536.0 * math.exp(offset[1] - offset[0]), rel=0.05)


# ------------------------------------------------------------------------------------------------------ bytes


@pytest.fixture
def peak_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Of all tensors during a step, as PyTorch's allocator counts them."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    yield importlib.import_module("harness").peak_bytes


@pytest.mark.parametrize(
    ("case", "dtype", "per_logit"),
    [
        ("llama", torch.float32, 8),
        ("llama", torch.bfloat16, 6),
        ("bias", torch.float32, 8),
        ("gemma2", torch.float32, 16),
        ("gemma2", torch.bfloat16, 8),
        ("granite", torch.bfloat16, 6),
        ("llama", torch.float32, None),
        ("gemma2", torch.bfloat16, None),
    ],
)
def test_logits_stay_within_their_memory(case: str, dtype: torch.dtype, per_logit: int | None, peak_bytes: Any) -> None:
    """In training and, without bytes `per_logit`, in evaluation. Nothing else is large here: the vocabulary is five
    hundred times as wide as the states."""
    training, vocabulary, memory = per_logit is not None, 8_000, 800_000
    family, changes = HEADS[case]
    narrow = {"hidden_size": 16, "head_dim": 4, "query_pre_attn_scalar": 4, "intermediate_size": 16}
    model = build(family, **changes, **narrow, vocab_size=vocabulary).to(dtype).requires_grad_(False)
    [block, *_] = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    block.requires_grad_(True)
    micro_batch = labelled(torch.ones(3, 11, dtype=torch.bool))
    rows = micro_batch.items
    assert rows == 24 and rows * vocabulary * dtype.itemsize * 2 > 0.9 * memory

    def states_only(states: torch.Tensor, _head: Head) -> torch.Tensor:
        return states.float().sum()

    inputs = {name: micro_batch.inputs[name] for name in ("input_ids", "attention_mask")}
    task = stream(memory)
    task.begin_step(model, [micro_batch])
    peaks = []
    with torch.set_grad_enabled(training):
        for loss in (
            lambda: through_head(model, states_only, **inputs, use_cache=False),
            lambda: task.loss(model, micro_batch),
            lambda: plain(model, micro_batch),
        ):

            def step(loss: Any = loss) -> None:
                value = loss()
                if training:
                    value.backward()

            step()
            peaks.append(peak_bytes(step, model.zero_grad))
    nothing, chunked, whole = peaks
    assert chunked - nothing <= memory < whole - nothing
    if per_logit is not None:
        assert next(iter(task._in_chunks._row_bytes.values())) == per_logit * vocabulary  # type: ignore[union-attr]
        largest = memory // (per_logit * vocabulary)  # rows; chunks are about equal
        used = -(-rows // -(-rows // largest)) * per_logit * vocabulary
        assert chunked - nothing > 0.8 * used


def test_first_use_leaves_no_trace() -> None:
    """No random number is drawn, no mode is changed, and dropout does not make a head look unknown."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    base = build("opt", dropout=0.5).train()
    lora.target_modules = ["q_proj", "lm_head"]
    model: Any = get_peft_model(base, lora)
    model.base_model.model.model.decoder.layers[1].eval()
    modes = [module.training for module in model.modules()]
    losses = []
    for _ in range(2):
        torch.manual_seed(5)
        losses.append(ours(model, labelled(), 10**9).item())
    assert losses[0] == losses[1]
    assert [module.training for module in model.modules()] == modes


# ------------------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize(("text", "size"), [("256MB", 256e6), ("1 GiB", 2**30), ("1M", 1e6), ("whole", None)])
def test_the_key(text: str, size: float | None) -> None:
    assert logits_bytes(config_from_dict({"task": {"logits_memory": text}}).task) == size


@pytest.mark.parametrize("text", ["256", "1KB", "all", "", "none", "0.5MB", 256])
def test_a_bad_key(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"task\.logits_memory") as caught:
        config_from_dict({"task": {"logits_memory": text}})
    assert "\n" not in str(caught.value)
