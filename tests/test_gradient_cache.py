"""Cached gradients: those of one big batch, whatever the micro-batch, dropout replayed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from fastalign.config import AlignmentConfig, config_from_dict
from fastalign.data.parallel import Pair
from fastalign.data.sampling import Sampler
from fastalign.data.tokenization import SentenceTokenizer
from fastalign.model.encode import pooled_at
from fastalign.streams.alignment import AlignmentStream
from fastalign.streams.base import MicroBatch
from fastalign.training.run import train

Gradients = dict[str, torch.Tensor]
WORDS = ["alarm", "music", "light", "wecker", "musik", "licht", "réveil", "lampe"]


def sentence(number: int) -> str:
    """Of three to nine words, a different one for every number below 512."""
    return " ".join([WORDS[number // 8**place % 8] for place in range(3)] * (1 + number % 3))


PAIRS = [  # two in a row share a meaning, across the edge of a micro-batch too
    Pair(sentence(i), sentence(200 + i), ("de", "fr")[i % 2], "en", (i + 1) // 2) for i in range(64)
]


def adapted(model_dir: Path, dropout: float = 0.0) -> nn.Module:
    """A model with an adapter that is no longer zero, in training mode."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout, init_lora_weights=False)
    return get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), lora).train()


def stream(model_dir: Path, layers: list[int], **settings: Any) -> AlignmentStream:
    config = AlignmentConfig(batch_size=64, temperature=0.2, **settings)
    sampler = Sampler([pair.direction for pair in PAIRS], "uniform", 0, "alignment")
    tokenizer = SentenceTokenizer(AutoTokenizer.from_pretrained(model_dir))
    return AlignmentStream(PAIRS, [], tokenizer, sampler, config, layers, accumulation=1)


def step(stream: AlignmentStream, model: nn.Module) -> tuple[float, Gradients]:
    """Loss and gradients of one optimizer step, as the trainer takes them."""
    model.zero_grad()
    micro_batches = stream.micro_batches(0, 0, 1)
    stream.begin_step(model, micro_batches)
    total = 0.0
    for micro_batch in micro_batches:
        loss = stream.loss(model, micro_batch)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: Gradients, expected: Gradients) -> float:
    """The largest relative error of a parameter's gradient, in the L2 norm."""
    assert found.keys() == expected.keys() and expected
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("direction", ["source_to_target", "target_to_source", "symmetric"])
@pytest.mark.parametrize("layers", [[2], [1, 3]])
@pytest.mark.parametrize("size", [8, 7, 1])
def test_micro_batches_give_the_gradient_of_one_batch(
    size: int, layers: list[int], direction: Any, model_dir: Path
) -> None:
    settings: dict[str, Any] = {"direction": direction, "layer_weights": [1.0, 3.0][: len(layers)]}
    model = adapted(model_dir)
    whole, parts = (stream(model_dir, layers, micro_batch_size=n, **settings) for n in (64, size))
    assert len(whole.micro_batches(0, 0, 1)) == 1 and len(parts.micro_batches(0, 0, 1)) == -(-64 // size)
    loss, expected = step(whole, model)
    cached_loss, found = step(parts, model)
    assert distance(found, expected) < 1e-5
    assert cached_loss == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("settings", [{"detach": "source"}, {"detach": "target"}, {"mask_equal_meaning": False}])
def test_settings_of_the_objective_reach_the_cache(settings: dict[str, Any], model_dir: Path) -> None:
    model = adapted(model_dir)
    _, plain = step(stream(model_dir, [2], micro_batch_size=64), model)
    _, expected = step(stream(model_dir, [2], micro_batch_size=64, **settings), model)
    _, found = step(stream(model_dir, [2], micro_batch_size=8, **settings), model)
    assert distance(found, expected) < 1e-5 < 1e-3 < distance(plain, expected)


def test_without_the_cache_the_gradient_is_another(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negatives of a micro-batch alone are far from those of the batch: the tests above can tell them apart."""
    model = adapted(model_dir)
    _, expected = step(stream(model_dir, [2], micro_batch_size=64), model)
    monkeypatch.setattr(AlignmentStream, "begin_step", lambda *_: None)
    _, found = step(stream(model_dir, [2], micro_batch_size=8), model)
    assert distance({name: gradient / 8 for name, gradient in found.items()}, expected) > 0.1


def test_dropout_is_replayed(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to the same eight forwards kept in one graph, from the same random state."""
    model, parts = adapted(model_dir, dropout=0.3), stream(model_dir, [2], micro_batch_size=8)
    drawn: list[torch.Tensor] = []
    draw = nn.functional.dropout

    def watched(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = draw(x, *args, **kwargs)
        drawn.append(y.detach() == 0)
        return y

    monkeypatch.setattr(nn.functional, "dropout", watched)
    torch.manual_seed(5)
    _, found = step(parts, model)
    masks, drawn = drawn, []
    model.zero_grad()
    torch.manual_seed(5)
    micro_batches = parts.micro_batches(0, 0, 1)
    vectors = [parts._vectors(model, micro_batch) for micro_batch in micro_batches]
    parts._contrast(torch.cat(vectors, dim=-2), micro_batches).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    assert distance(found, expected) < 1e-5
    half = len(masks) // 2
    assert half == len(drawn) > 8 and all(0.1 < float(mask.float().mean()) < 0.6 for mask in masks)
    assert all(torch.equal(first, second) for first, second in zip(masks[:half], masks[half:], strict=True))
    assert any(not torch.equal(masks[0], mask) for mask in masks[1:] if mask.shape == masks[0].shape)


def test_the_random_state_goes_on_as_if_there_had_been_one_pass(model_dir: Path) -> None:
    """What is drawn after the step does not depend on how often it was replayed, and is not drawn again."""
    model, parts = adapted(model_dir, dropout=0.3), stream(model_dir, [2], micro_batch_size=16)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    for micro_batch in parts.micro_batches(0, 0, 1):
        parts._vectors(model, micro_batch)
    once = torch.get_rng_state()
    torch.manual_seed(5)
    step(parts, model)
    assert torch.equal(torch.get_rng_state(), once) and not torch.equal(before, once)


def test_gradient_checkpointing_and_the_cache_together(model_dir: Path) -> None:
    model = adapted(model_dir, dropout=0.3)
    parts = stream(model_dir, [3], micro_batch_size=16)
    torch.manual_seed(2)
    _, expected = step(parts, model)
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    torch.manual_seed(2)
    _, found = step(parts, model)
    assert distance(found, expected) < 1e-5


def test_one_forward_where_one_micro_batch_holds_all(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(model_dir)
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    for size, expected in ((64, 1), (32, 4)):
        forwards.clear()
        step(stream(model_dir, [2], micro_batch_size=size), model)
        assert len(forwards) == expected


def test_what_a_broken_step_has_left_is_forgotten(model_dir: Path) -> None:
    model, parts = adapted(model_dir), stream(model_dir, [2], micro_batch_size=8)
    micro_batches = parts.micro_batches(0, 0, 1)
    parts.begin_step(model, micro_batches)  # and then memory ran out
    expected = parts._contrast(parts._vectors(model, micro_batches[0]), micro_batches[:1])
    parts.begin_step(model, micro_batches[:1])
    torch.testing.assert_close(parts.loss(model, micro_batches[0]), expected)


def test_the_held_out_loss_does_not_depend_on_the_micro_batch(model_dir: Path) -> None:
    model = adapted(model_dir).eval()
    losses = []
    for size in (64, 7):
        one = stream(model_dir, [1, 3], micro_batch_size=size)
        one.held_out = PAIRS
        losses.append(one.evaluate(model, torch.device("cpu"))["eval_alignment_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    everything = stream(model_dir, [1, 3]).collate(range(64))
    assert losses[0] == pytest.approx(one.loss(model, everything).item(), rel=1e-5)


def test_vectors_are_those_that_are_measured(model_dir: Path) -> None:
    """The cache pools as `encode` and retrieval do: fp32, sources before targets, one plane a layer."""
    model, one = adapted(model_dir).eval(), stream(model_dir, [1, 3])
    batch: MicroBatch = one.collate([3, 4])
    vectors = one._vectors(model, batch)
    assert vectors.shape == (2, 2, 2, 64) and vectors.dtype == torch.float32
    for plane, pooled in zip(vectors, pooled_at(model, [1, 3], batch.inputs), strict=True):
        torch.testing.assert_close(torch.cat(list(plane)), pooled)


@pytest.mark.parametrize("mode", ["align_only", "joint"])
def test_through_the_trainer(mode: str, raw_config: dict) -> None:
    """Accumulation, micro-batches and both streams: the step of one big batch, and its loss in the log."""
    runs = []
    for training, alignment in (
        ({"per_device_train_batch_size": 4}, {}),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {}),
        ({"per_device_train_batch_size": 4}, {"micro_batch_size": 3}),
    ):
        raw = copy.deepcopy(raw_config)
        raw["schedule"] = {"mode": mode}
        raw["alignment"] |= {"batch_size": 24, "layer": [2, 3], **alignment}
        raw["training"] |= {"max_steps": 2, "max_grad_norm": 0.0, **training}
        spy = _Spy()
        train(config_from_dict(raw), overwrite=True, callbacks=[spy])
        runs.append(spy)
    for run in runs[1:]:
        for first, second in zip(runs[0].gradients, run.gradients, strict=True):
            scale = max(float(gradient.norm()) for gradient in first.values())
            for name, gradient in first.items():
                assert float((gradient - second[name]).norm()) < 1e-5 * max(float(gradient.norm()), 1e-3 * scale), name
        assert run.losses == pytest.approx(runs[0].losses, rel=1e-5)


class _Spy(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[Gradients] = []
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [value for name, value in logs.items() if name.endswith("_loss")]
