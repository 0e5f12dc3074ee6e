"""Early exit gives the exact state of a layer in every family, and leaves no trace on the model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, T5Config, T5ForConditionalGeneration

from fastalign.errors import ConfigError, ModelError
from fastalign.model.early_exit import early_exit, hidden_at, num_layers
from tests.families import COMMON, FAMILIES, batch, build, built


def valid(state: torch.Tensor) -> torch.Tensor:
    return state[batch()["attention_mask"].bool()]


def blocks_of(model: nn.Module) -> list[nn.Module]:
    count = num_layers(model)
    return list(next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count))


def state_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def tapped(blocks: list[nn.Module]) -> Iterator[list[tuple[int, Any]]]:
    """The outputs of all blocks, in the order in which they ran, as pairs (1-based index, state)."""
    seen: list[tuple[int, Any]] = []
    hooks = [
        b.register_forward_hook(lambda _m, _a, out, i=i: seen.append((i, state_of(out))))
        for i, b in enumerate(blocks, start=1)
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def full_states(model: nn.Module) -> dict[int, torch.Tensor]:
    """States 1..L of the full forward: transformers' own ones, the last (there after the norm) by a hook."""
    with tapped(blocks_of(model)) as seen:
        output = model(**batch(), output_hidden_states=True, use_cache=False)
    states = dict(enumerate(output.hidden_states))
    return states | {len(seen): seen[-1][1]}


def gradients(model: nn.Module, state: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(2)
    valid(state).float().mul(torch.randn(*valid(state).shape)).sum().backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def traces(model: nn.Module) -> tuple:
    """All that an early exit could leave behind."""
    modules = [(n, id(m), len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()]
    own = [sorted(vars(m)) for m in model.modules()]
    return modules, own, list(model.state_dict()), [n for n, _ in model.named_parameters()]


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# ---------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("family", FAMILIES)
def test_state_is_exact_and_nothing_runs_above(family: str):
    model = built(family)
    with torch.no_grad():
        reference, logits = full_states(model), model(**batch()).logits
        before, blocks = traces(model), blocks_of(model)
        assert num_layers(model) == 3
        for layer in (1, 2, 3):
            for _ in range(2):  # watched, then not
                with tapped(blocks) as seen, early_exit(model, layer):
                    output = model(**batch(), use_cache=False)
                assert [i for i, _ in seen] == list(range(1, layer + 1))
                assert torch.equal(valid(output.last_hidden_state), valid(reference[layer]))
                assert "logits" not in output
            assert torch.equal(valid(hidden_at(model, layer, **batch())), valid(reference[layer]))
        with tapped(blocks) as seen:
            third, first, second = hidden_at(model, [3, 1, 2], **batch())
        assert [i for i, _ in seen] == [1, 2, 3]
        for state, layer in ((first, 1), (second, 2), (third, 3)):
            assert torch.equal(valid(state), valid(reference[layer]))
        assert traces(model) == before
        assert "forward" not in vars(model)
        assert torch.equal(model(**batch()).logits, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_exactly_what_lies_below(family: str):
    model = built(family)
    blocks = blocks_of(model)
    for layer in (1, 2, 3):
        wanted = gradients(model, full_states(model)[layer])
        found = gradients(model, hidden_at(model, layer, **batch()))
        assert_same(found, wanted)
        touched = {id(p) for n, p in model.named_parameters() if n in found}
        for index, block in enumerate(blocks):
            assert {id(p) in touched for p in block.parameters()} == {index < layer}
        assert id(model.get_input_embeddings().weight) in touched


# ----------------------------------------------------------------------------------------- ways to train


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "falcon", "mixtral", "opt", "bloom", "gpt_oss"])
@pytest.mark.parametrize("layers", [2, [1, 2], [3, 1, 2]])
def test_gradient_checkpointing(family: str, layers: Any):
    silent = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "dropout": 0.0}
    silent |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    plain, checkpointed = (build(family, **silent).train() for _ in range(2))
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inner = next(blocks_of(checkpointed)[0].children())
    found: list[dict[str, torch.Tensor]] = []
    for model in (plain, checkpointed, checkpointed):  # watched, then not
        calls = []
        hook = inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        states = hidden_at(model, layers, **batch())
        found.append(gradients(model, sum(states) if isinstance(layers, list) else states))  # type: ignore[arg-type]
        hook.remove()
        assert len(calls) == (2 if model is checkpointed else 0)  # recomputed, so checkpointing was at work
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "falcon", "bloom", "mpt"])
def test_lora(family: str):
    from peft import LoraConfig, get_peft_model

    base = build(family)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    before, logits = traces(model), model(**batch()).logits
    for layer in (1, 2, 3):
        reference = full_states(model)[layer]
        state = hidden_at(model, layer, **batch())
        with early_exit(model, layer):
            again = model(**batch(), labels=batch()["input_ids"], use_cache=False).last_hidden_state
        assert torch.equal(valid(state), valid(reference))
        assert torch.equal(valid(again), valid(reference))
        found = gradients(model, state)
        assert_same(found, gradients(model, reference))
        assert found and all("lora_" in name for name in found)
    assert torch.equal(hidden_at(base, 2, **batch()), hidden_at(model, 2, **batch()))  # the inner model works too
    # transformers' recorders are hooks that stay; the reference forwards above put them there
    assert [m[:2] for m in traces(model)[0]] == [m[:2] for m in before[0]]
    assert torch.equal(model(**batch()).logits, logits)


def test_adapter_off_is_the_base_model():
    from peft import LoraConfig, get_peft_model

    base = build("llama")
    with torch.no_grad():
        untouched = hidden_at(base, 2, **batch())
        model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        assert not torch.equal(hidden_at(model, 2, **batch()), untouched)
        with model.disable_adapter():
            assert torch.equal(hidden_at(model, 2, **batch()), untouched)


def test_ddp(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = build("llama")  # a twin: backward through DDP's own module would confuse its reducer
        ddp = nn.parallel.DistributedDataParallel(build("llama"), find_unused_parameters=True)
        assert num_layers(ddp) == 3
        for layers in (2, [1, 3], 1):
            states = hidden_at(ddp, layers, **batch())
            wanted = full_states(model)
            if isinstance(layers, list):
                states, target = sum(states), sum(wanted[i] for i in layers)
            else:
                target = wanted[layers]
            found = gradients(ddp, states)  # type: ignore[arg-type]
            touched = {n.removeprefix("module."): g for n, g in found.items() if g.any()}
            assert_same(touched, {n: g for n, g in gradients(model, target).items() if g.any()})  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


def test_accelerate_autocast_is_kept_and_its_forward_comes_back():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model = Accelerator(cpu=True, mixed_precision="bf16").prepare(build("llama"))
        own = vars(model)["forward"]
        reference = full_states(model)
        plain = hidden_at(build("llama"), 2, **batch())
        for _ in range(2):
            assert torch.equal(valid(hidden_at(model, 2, **batch())), valid(reference[2].float()))
        assert not torch.equal(plain, reference[2])
        assert vars(model)["forward"] is own
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("whole", [True, False])
def test_compiled_models_do_not_miss_the_hooks(whole: bool):
    torch._dynamo.reset()
    model, plain = build("llama"), built("llama")
    if whole:
        model = cast(nn.Module, torch.compile(model, backend="eager"))
    else:
        for block in blocks_of(model):
            block.compile(backend="eager")
    with torch.no_grad():
        sequence: list[Any] = [2, 2, 1, 1, [1, 2], [1, 2], 2]
        for layers in sequence:
            wanted, found = hidden_at(plain, layers, **batch()), hidden_at(model, layers, **batch())
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(model(**batch()).logits, plain(**batch()).logits)
    torch._dynamo.reset()


def test_bfloat16():
    model = build("gemma3_text").to(torch.bfloat16)
    with torch.no_grad():
        state = hidden_at(model, 2, **batch())
        assert state.dtype == torch.bfloat16
        assert torch.equal(valid(state), valid(full_states(model)[2]))


def test_train_mode_with_dropout_and_layerdrop():
    model = build("opt", dropout=0.3).train()
    for _ in range(2):
        torch.manual_seed(3)
        state = hidden_at(model, 2, **batch())
        torch.manual_seed(3)
        assert torch.equal(valid(state), valid(full_states(model)[2]))
    skipping = build("opt", layerdrop=0.5)
    hidden_at(skipping, 2, **batch())
    with pytest.raises(ModelError, match="layerdrop"):
        hidden_at(skipping.train(), 2, **batch())


# ------------------------------------------------------------------------------------ what is put back


def test_restored_after_an_exception_inside_the_with():
    model = built("gpt2")
    before = traces(model)
    with pytest.raises(KeyboardInterrupt), early_exit(model, 1):
        assert traces(model) != before
        raise KeyboardInterrupt
    assert traces(model) == before


@pytest.mark.parametrize("layers", [2, [1, 2]])
@pytest.mark.parametrize("verified", [False, True])
def test_restored_after_an_exception_inside_the_forward(verified: bool, layers: Any):
    model = build("llama")
    logits = model(**batch()).logits
    if verified:
        hidden_at(model, layers, **batch())
    before = traces(model)
    with pytest.raises(IndexError):  # an id beyond the vocabulary: the caller's mistake, not the architecture's
        hidden_at(model, layers, input_ids=torch.tensor([[99]]))
    assert traces(model) == before
    hook = blocks_of(model)[0].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_at(model, layers, **batch())
    hook.remove()
    assert traces(model) == before
    assert torch.equal(model(**batch()).logits, logits)


def test_an_instance_forward_survives():
    model = build("llama")
    original, calls = model.forward, []

    def own(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    model.forward = own
    state = hidden_at(model, 2, **batch())
    with pytest.raises(ValueError), early_exit(model, 2):
        raise ValueError
    assert vars(model)["forward"] is own
    assert torch.equal(valid(full_states(model)[2]), valid(state))
    assert calls


def test_one_exit_at_a_time():
    model = build("llama")
    before = traces(model)
    with early_exit(model, 2):
        assert num_layers(model) == 3
        for call in (lambda: hidden_at(model, 1, **batch()), lambda: early_exit(model, 1).__enter__()):
            with pytest.raises(ModelError, match="already open"):
                call()
        assert model(**batch()).last_hidden_state.shape == (3, 11, 32)
    assert traces(model) == before
    other = build("llama")
    with early_exit(model, 1), early_exit(other, 2):  # two models do not mind each other
        assert torch.equal(other(**batch()).last_hidden_state, hidden_at(built("llama"), 2, **batch()))


def test_verification_is_remembered_beside_the_model_and_leaves_no_hooks():
    model = build("llama")

    def hooks_during(model: nn.Module, layers: Any) -> int:
        counts: list[int] = []
        blocks = blocks_of(model)
        count = model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]
            lambda *_: counts.append(sum(len(m._forward_hooks) for b in blocks for m in b.modules()))
        )
        hidden_at(model, layers, **batch())
        count.remove()
        return counts[0]

    assert [hooks_during(model, n) for n in (2, 2, 1, 1, [1, 2], [1, 2])] == [3, 0, 3, 0, 4, 1]  # 1: the tap
    assert hooks_during(copy.deepcopy(model), 2) == 3
    assert hooks_during(model, 2) == 0


@pytest.mark.parametrize("setting", ["output_hidden_states", "output_router_logits"])
def test_recorders_of_transformers_are_not_installed_on_half_a_model(setting: str):
    key = setting.removeprefix("output_")
    wanted = len(build("mixtral")(**batch(), **{setting: True})[key])
    by_argument = build("mixtral")
    with early_exit(by_argument, 1):
        by_argument(**batch(), **{setting: True})
    assert len(by_argument(**batch(), **{setting: True})[key]) == wanted
    by_config = build("mixtral", **{setting: True})
    hidden_at(by_config, 1, **batch())
    assert len(by_config(**batch())[key]) == wanted


def test_arguments_of_the_causal_model_only_are_dropped():
    for family in ("llama", "gpt2", "mpt", "bloom"):
        model, ids = built(family), batch()["input_ids"]
        wanted = hidden_at(model, 2, **batch())
        with early_exit(model, 2):
            output = model(ids, attention_mask=batch()["attention_mask"], labels=ids, logits_to_keep=1)
            assert torch.equal(output.last_hidden_state, wanted)
            assert output.past_key_values is None
            as_tuple = model(**batch(), return_dict=False)
            assert torch.equal(as_tuple[0], wanted)
    with early_exit(built("llama"), 2):  # positions mean what they mean to the causal model
        positional = built("llama")(ids, batch()["attention_mask"]).last_hidden_state
    assert torch.equal(positional, hidden_at(built("llama"), 2, **batch()))


# ---------------------------------------------------------------------------------------------- refusals


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        return state + self.linear(state).tanh()


class Decoder(nn.Module):
    """Honest: what is written below about hostile ones is about their `run` alone."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)
        self.private = [self.layers]  # in a plain list: a module that is not registered
        self.cloned = [copy.deepcopy(self.layers)]

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.run(self.embed(input_ids)),)

    def run(self, state: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            state = layer(state)
        return self.norm(state)


class RunsPrivateList(Decoder):
    def run(self, state):
        for layer in self.private[0]:
            state = layer(state)
        return self.norm(state)


class RunsClones(Decoder):
    def run(self, state):
        for layer in self.cloned[0]:
            state = layer(state)
        return self.norm(state)


class Scales(Decoder):
    def run(self, state):
        return super().run(state) * 2


class ScalesInPlace(Decoder):
    def run(self, state):
        return super().run(state).mul_(2)


class RunsTwice(Decoder):
    def run(self, state):
        return super().run(self.layers[0](state))


class SkipsFirst(Decoder):
    def run(self, state):
        for layer in self.layers[1:]:  # type: ignore[union-attr]
            state = layer(state)
        return self.norm(state)


class Backwards(Decoder):
    def run(self, state):
        for layer in reversed(self.layers):
            state = layer(state)
        return self.norm(state)


class BypassesCall(Decoder):
    def run(self, state):
        for layer in self.layers:
            state = layer.forward(state)
        return self.norm(state)


class NormsFirst(Decoder):
    def run(self, state):
        state = self.norm(state)
        for layer in self.layers:
            state = layer(state)
        return state


class CountsByConfig(Decoder):
    def run(self, state):
        for index in range(self.config.num_hidden_layers):
            state = self.layers[index](state)
        return self.norm(state)


class ReadsNormWeight(Decoder):
    def run(self, state):
        return super().run(state) * self.norm.weight


class NormUnderAnotherName(Decoder):
    def __init__(self, config):
        super().__init__(config)
        self.closing = nn.LayerNorm(config.hidden_size)

    def run(self, state):
        return self.closing(super().run(state))


class Toy(nn.Module):
    base_model_prefix = "model"

    def __init__(self, kind: type[Decoder]):
        super().__init__()
        torch.manual_seed(0)
        self.config = LlamaConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, vocab_size=64)
        self.model = kind(self.config)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids)[0] @ self.model.embed.weight.T


HOSTILE = Decoder.__subclasses__()


def test_honest_toy():
    model, ids = Toy(Decoder), batch()["input_ids"]
    with tapped(list(model.model.layers)) as seen:
        model(ids)
    for layer in (1, 2, 3, 4):
        assert torch.equal(hidden_at(model, layer, input_ids=ids, labels=ids), seen[layer - 1][1])
    with pytest.raises(TypeError, match="input_idz"):
        hidden_at(model, 2, input_ids=ids, input_idz=ids)


@pytest.mark.parametrize("kind", HOSTILE, ids=lambda k: k.__name__)
@pytest.mark.parametrize("layers", [2, [1, 2]])
def test_hostile_architectures_are_refused(kind: type[Decoder], layers: Any):
    model, ids = Toy(kind), batch()["input_ids"]
    logits, before = model(ids), traces(model)
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(ModelError, match=r"Toy \(llama\) is not supported by early exit") as error:
            hidden_at(model, layers, input_ids=ids)
        assert "\n" not in str(error.value)
        with early_exit(model, 2), pytest.raises(ModelError, match="not supported"):
            model(ids)
    assert traces(model) == before
    assert torch.equal(model(ids), logits)


def test_a_tap_that_is_changed_in_place_is_refused():
    class Overwrites(Block):
        def forward(self, state):
            return state.add_(1)

    model = Toy(Decoder)
    model.model.layers[1] = Overwrites(8)
    with torch.no_grad():
        hidden_at(model, 2, input_ids=batch()["input_ids"])
        with pytest.raises(ModelError, match="after block 1"):
            hidden_at(model, [1, 2], input_ids=batch()["input_ids"])


def test_a_wrapper_that_kept_the_old_forward_is_noticed():
    class Keeps(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.kept = module, module.forward

        def forward(self, **inputs):
            return self.kept(**inputs)

    with pytest.raises(ModelError, match="wraps it"):
        hidden_at(Keeps(build("llama")), 2, **batch())


@pytest.mark.parametrize("layer", [0, -1, 4, True, 1.5, "2", None, [], [1, 4], [2, True], (0,)])
def test_bad_layers(layer: Any):
    model = built("llama")
    before = traces(model)
    with pytest.raises(ConfigError, match=r"1\.\.3"):
        hidden_at(model, layer, **batch())
    if not isinstance(layer, list):
        with pytest.raises(ConfigError, match=r"1\.\.3"), early_exit(model, layer):
            pass
    assert traces(model) == before


def test_models_that_are_not_causal_decoders():
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2))
    ambiguous = Toy(Decoder)
    ambiguous.model.others = nn.ModuleList(nn.Identity() for _ in range(4))
    missing = Toy(Decoder)
    missing.config.num_hidden_layers = 7
    for model, words in (
        (t5, "encoder-decoder"),
        (built("llama").model, "no base decoder"),
        (ambiguous, "2 lists"),
        (missing, "0 lists"),
        (nn.Linear(2, 2), "no transformers config"),
        ("llama", "expected a causal language model"),
    ):
        with pytest.raises(ModelError, match=words):
            num_layers(model)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=words), early_exit(model, 1):  # type: ignore[arg-type]
            pass


def test_lists_of_experts_do_not_make_the_blocks_ambiguous():
    model = Toy(Decoder)
    for block in model.model.layers:
        block.experts = nn.ModuleList(nn.Identity() for _ in range(4))
    assert num_layers(model) == 4
    assert hidden_at(model, 2, input_ids=batch()["input_ids"]).shape == (3, 11, 8)


def test_composite_config():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    text = COMMON | {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    }
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=63)
    ).eval()
    assert num_layers(model) == 3
    inputs = batch() | {"input_ids": batch()["input_ids"].clamp(max=60)}
    with torch.no_grad():
        wanted = model(**inputs, output_hidden_states=True).hidden_states
        for layer in (1, 2):
            assert torch.equal(valid(hidden_at(model, layer, **inputs)), valid(wanted[layer]))
