"""A model that is loaded up to a block is the whole one as far as it goes, and its adapter fits the whole one."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback

from fastalign.config import AdapterConfig, ModelConfig, config_from_dict
from fastalign.errors import ConfigError, ModelError
from fastalign.model import shortening
from fastalign.model.early_exit import FINAL_NORMS, hidden_at, locate, num_layers
from fastalign.model.loading import add_adapter, load_model, load_model_config
from fastalign.model.shortening import is_short, why_whole
from fastalign.training.preview import dry_run
from fastalign.training.run import train
from tests.families import FAMILIES, MORE, batch, build
from tests.test_early_exit import valid

FAST = ("llama", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "falcon", "mixtral", "opt", "mpt", "gpt_oss", "qwen2")
FAST += ("qwen3", "cohere2", "bloom", "smollm3", "olmo3", "deepseek_v3")
# The first block alone has one kind of attention where the whole model has two, and the decoder asks for that.
WHOLE = {("qwen2", 1), ("olmo3", 1), ("gemma3_text", 1), ("smollm3", 1)}


def saved(family: str, folder: Path, **changes: Any) -> Path:
    build(family, **changes).save_pretrained(folder)
    return folder


def load(folder: Path, blocks: int | None = None, **settings: Any) -> Any:
    config = ModelConfig(name_or_path=str(folder), **settings)
    return load_model(config, blocks=blocks).eval()


def states(model: Any, layers: list[int]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [valid(state) for state in hidden_at(model, layers, **batch())]


def all_equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def bytes_of(parameters: Any) -> int:
    return sum(parameter.nbytes for parameter in parameters)


# ---------------------------------------------------------------------------------------------- families


def test_every_family_is_tried() -> None:
    assert {*FAMILIES, *MORE} == shortening.FAMILIES and {*FAST} <= shortening.FAMILIES


@pytest.mark.parametrize(
    "family",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in sorted(shortening.FAMILIES)],
)
def test_states_are_those_of_the_whole_model_and_no_byte_more_is_held(family: str, tmp_path: Path) -> None:
    saved(family, tmp_path)
    whole = load(tmp_path)
    hf_config = load_model_config(ModelConfig(name_or_path=str(tmp_path)))
    wanted, parts = states(whole, [1, 2, 3]), locate(whole)
    for blocks in (1, 2, 3):
        if (family, blocks) in WHOLE:
            assert "is another one" in str(why_whole(hf_config, blocks))
            continue
        assert why_whole(hf_config, blocks) is None
        short = load(tmp_path, blocks)
        assert num_layers(short) == blocks and type(short) is type(whole) and is_short(short) and not is_short(whole)
        assert all_equal(states(short, [*range(1, blocks + 1)]), wanted[:blocks])
        above = {id(parameter) for block in parts.blocks[blocks:] for parameter in block.parameters()}
        norms = [norm for name, norm in parts.owner._modules.items() if norm is not None and name in FINAL_NORMS]
        above |= {id(parameter) for norm in norms for parameter in norm.parameters()}
        embedding, head = whole.get_input_embeddings().weight, whole.get_output_embeddings()
        if head.weight is not embedding:
            above |= {id(parameter) for parameter in head.parameters()}
        assert len(norms) == 1
        kept = {name: parameter for name, parameter in whole.named_parameters() if id(parameter) not in above}
        held = dict(short.named_parameters())
        assert held.keys() == kept.keys() and all(torch.equal(held[name], kept[name]) for name in kept)
        with pytest.raises(ModelError, match="no final norm and no head"):
            short(**batch())


def test_a_family_that_was_not_tried_is_loaded_whole(
    raw_config: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(shortening, "FAMILIES", set())
    summary = train(config_from_dict({**raw_config, "schedule": {"mode": "align_only"}}))
    assert capsys.readouterr().err.count("all 4 blocks are loaded though 2 are needed: models of type llama") == 1
    assert summary["model"]["layers_loaded"] == 4 and summary["model"]["parameters_of"] == "the model and the adapter"


def test_code_of_a_model_is_not_guessed_about(tmp_path: Path) -> None:
    hf_config = build("llama").config
    hf_config.auto_map = {"AutoModelForCausalLM": "theirs.M"}
    assert "have not been tried" in str(why_whole(hf_config, 1))


def test_a_block_that_would_be_another_one_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a family makes its blocks of something that is counted from the end."""
    hf_config = build("gemma3_text").config
    assert why_whole(hf_config, 2) is None
    plain = shortening.shortened

    def backwards(*args: Any) -> Any:
        short = plain(*args)
        short.layer_types = short.layer_types[::-1]
        return short

    monkeypatch.setattr(shortening, "shortened", backwards)
    assert "is another one" in str(why_whole(hf_config, 2))


# ------------------------------------------------------------------------------------ what is read, and checked


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_nothing_above_is_read(tied: bool, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in one file nor in several; what is there may be ruined."""
    build("llama", tie_word_embeddings=tied).save_pretrained(tmp_path, max_shard_size=shard)
    wanted = states(load(tmp_path), [2])
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 3) == (shard == "20KB")
    for file in files:
        weights = load_file(file)
        for name in weights:
            if "layers.2." in name or "lm_head" in name or name == "model.norm.weight":
                weights[name] = torch.full((3,), float("nan"))
        save_file(weights, file, metadata={"format": "pt"})
    read = spy_on_reads(monkeypatch)
    assert all_equal(states(load(tmp_path, 2), [2]), wanted)
    assert read and all(name.startswith(("model.embed_tokens", "model.layers.0.", "model.layers.1.")) for name in read)
    with pytest.raises(ModelError, match="another shape"):
        load(tmp_path, 3)


def spy_on_reads(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names of the tensors whose content is read from then on."""
    theirs: Any = importlib.import_module("transformers.modeling_utils")
    read: set[str] = set()
    plain = theirs.safe_open

    class Slice:
        def __init__(self, name: str, inner: Any):
            self.name, self.inner = name, inner

        def __getitem__(self, index: Any) -> Any:
            read.add(self.name)
            return self.inner[index]

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

    class File:
        def __init__(self, *args: Any, **kwargs: Any):
            self.inner = plain(*args, **kwargs)

        def get_slice(self, name: str) -> Slice:
            return Slice(name, self.inner.get_slice(name))

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.inner, attribute)

        def __exit__(self, *args: Any) -> Any:
            return self.inner.__exit__(*args)

    monkeypatch.setattr(theirs, "safe_open", File)
    return read


def test_what_is_below_is_checked_as_ever(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    path, name = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    good = load_file(path)
    for change, said in (
        (lambda w: w.pop(name), "lacks 1 weights"),
        (lambda w: w.update({name: torch.zeros(3, 3)}), "another shape"),
        (lambda w: w.update({name: torch.full_like(good[name], float("nan"))}), "NaN"),
    ):
        weights = dict(good)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(ModelError, match=said):
            load(tmp_path, 1)
    assert is_short(load(saved("llama", tmp_path), 1))


def test_nothing_is_said_of_weights_that_are_left(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved("llama", tmp_path)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        load(tmp_path, 1)
    finally:
        logger.removeHandler(caplog.handler)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mpt"])
def test_in_4_bits(family: str, tmp_path: Path) -> None:
    """The same layers are packed as in the whole model, to the same bytes; the last one is none of the exceptions."""
    saved(family, tmp_path, tie_word_embeddings=family == "qwen3")  # an untied MPT ends with a linear layer
    whole, short = load(tmp_path, quantization="nf4"), load(tmp_path, 2, quantization="nf4")
    assert all_equal(states(short, [1, 2]), states(whole, [1, 2]))
    theirs = dict(whole.named_parameters())
    packed = 0
    for name, parameter in short.named_parameters():
        assert type(parameter) is type(theirs[name]) and torch.equal(parameter, theirs[name]), name
        packed += parameter.dtype == torch.uint8
    assert packed == sum(p.dtype == torch.uint8 for block in locate(short).blocks for p in block.parameters()) > 0
    whole.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed", 2)
    assert all_equal(states(again, [1, 2]), states(whole, [1, 2]))
    assert bytes_of(again.parameters()) == bytes_of(short.parameters())


# --------------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", "all-linear"),
        ("llama", ["q_proj", "up_proj"]),
        ("llama", r".*\.layers\.\d+\.mlp\.(up|down)_proj"),
        ("gpt2", "all-linear"),
        ("mpt", "all-linear"),
        ("gpt_neox", ["query_key_value"]),
        ("opt", "all-linear"),
        ("bloom", "all-linear"),
        ("deepseek_v3", "all-linear"),
        ("mixtral", "all-linear"),
    ],
)
def test_the_adapter_fits_the_whole_model(family: str, targets: Any, tmp_path: Path) -> None:
    from peft import PeftModel

    saved(family, tmp_path / "base")
    short = add_adapter(load(tmp_path / "base", 2), AdapterConfig(r=2, target_modules=targets))
    for name, parameter in short.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    short.eval().save_pretrained(str(tmp_path / "adapter"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    untouched = states(base.eval(), [2])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        whole = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    assert not [w for w in said if any(word in str(w.message).lower() for word in ("missing", "unexpected"))]
    assert all_equal(states(whole, [1, 2]), states(short, [1, 2]))
    assert not torch.equal(states(whole, [2])[0], untouched[0])
    trained = [name for name, _ in whole.named_parameters() if "lora_" in name]
    assert sorted(trained) == sorted(name for name, _ in short.named_parameters() if "lora_" in name)
    assert not any("lora_" in name for name, _ in locate(whole.get_base_model()).blocks[2].named_parameters())


class Keep(TrainerCallback):
    """Keeps the model, and its states at the aligned layer when the training ends."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model = model
        self.states = states(model.eval(), [2])


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_run_is_that_on_the_whole_model(
    quantization: str, raw_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses, retrieval and the adapter, bit for bit; then plain peft on the whole base, as whoever gets it does."""
    from peft import PeftModel

    raw = copy.deepcopy(raw_config)
    raw["schedule"] = {"mode": "align_only"}
    raw["model"]["quantization"] = quantization
    del raw["task"]  # no clipping: the sum over twice as many gradients rounds differently
    raw["training"] |= {"eval_strategy": "steps", "eval_steps": 2, "max_grad_norm": 0.0}
    kept = Keep()
    short = train(config_from_dict(raw), callbacks=[kept])
    raw["training"]["output_dir"] = str(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(shortening, "FAMILIES", set())
        whole = train(config_from_dict(raw))
    assert (short["model"]["layers_loaded"], whole["model"]["layers_loaded"]) == (2, 4)
    assert is_short(kept.model) and short["layer"] == whole["layer"] == 2
    for key in ("retrieval", "evaluation"):
        for results in (short, whole):
            results[key].pop("eval_runtime", None)
        assert short[key] == whole[key]
    for key in ("loss_first", "loss_last"):
        assert short["streams"]["alignment"][key] == whole["streams"]["alignment"][key]
    found, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "whole"))
    assert found.keys() == {name for name in wanted if "layers.0." in name or "layers.1." in name}
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    if quantization == "none":
        base = AutoModelForCausalLM.from_pretrained(raw["model"]["name_or_path"])
        adapted = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
        assert all_equal(states(adapted, [2]), kept.states)


def test_summary_and_dry_run_say_what_is_loaded(raw_config: dict, capsys: pytest.CaptureFixture) -> None:
    raw = copy.deepcopy(raw_config)
    raw["schedule"] = {"mode": "align_only"}
    raw["alignment"]["layer"] = [0.25, 0.5]  # of the real depth
    said = "blocks 1 to 2 of 4 are loaded, without final norm and head"
    found = dry_run(config_from_dict(raw))
    assert sum(line.startswith(said) for line in found["lines"]) == 1
    assert (found["layers"], found["layers_loaded"], found["layer"]) == (4, 2, [1, 2])
    capsys.readouterr()
    summary = train(config_from_dict(raw))
    assert capsys.readouterr().err.count(said) == 1
    model = summary["model"]
    assert (model["layers"], model["layers_loaded"], summary["layer"]) == (4, 2, [1, 2])
    assert model["parameters_of"] == "the embeddings, blocks 1 to 2 of 4 and the adapter"
    assert found["trainable"] == model["trainable"]
    weights = load_file(Path(raw["model"]["name_or_path"]) / "model.safetensors")
    below = [name for name in weights if name.startswith(("model.embed", "model.layers.0.", "model.layers.1."))]
    assert model["parameters"] - model["trainable"] == sum(weights[name].numel() for name in below)


def test_a_head_that_is_not_loaded_cannot_be_adapted(raw_config: dict) -> None:
    raw_config["schedule"] = {"mode": "align_only"}
    raw_config["adapter"]["target_modules"] = ["q_proj", "lm_head"]
    with pytest.raises(ConfigError, match=r"'lm_head'\] names the head .* leave them out"):
        train(config_from_dict(raw_config))


@pytest.mark.parametrize(
    ("task", "training", "loaded"),
    [
        ({}, {"eval_strategy": "no"}, 2),
        ({}, {"eval_strategy": "steps", "eval_steps": 2}, 4),
        ({"eval_share": 0.0}, {"eval_strategy": "steps", "eval_steps": 2}, 2),
    ],
)
def test_a_task_that_is_evaluated_needs_the_whole_model(
    task: dict, training: dict, loaded: int, raw_config: dict, capsys: pytest.CaptureFixture
) -> None:
    raw = copy.deepcopy(raw_config)
    raw["schedule"] = {"mode": "align_only"}
    raw["task"] |= task
    raw["training"] |= training
    summary = train(config_from_dict(raw))
    assert summary["model"]["layers_loaded"] == loaded
    assert ("eval_task_loss" in summary.get("evaluation", {})) == (loaded == 4)
    assert ("the task is evaluated, too; leave task.data out" in capsys.readouterr().err) == (loaded == 4)


def test_a_stopped_run_goes_on_to_the_same_end(raw_config: dict, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    raw = copy.deepcopy(raw_config)
    raw["schedule"] = {"mode": "align_only"}
    raw["adapter"]["dropout"] = 0.1
    raw["alignment"]["micro_batch_size"] = 3
    raw["training"] |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    train(config_from_dict(raw))
    wanted = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    raw["training"]["output_dir"] = str(tmp_path / "halves")
    train(config_from_dict(raw), callbacks=[Stop()])
    raw["training"]["resume_from_checkpoint"] = True
    assert train(config_from_dict(raw))["resumed_at"] == [4]
    assert (tmp_path / "halves" / "adapter_model.safetensors").read_bytes() == wanted
    raw["training"] |= {"max_steps": 8, "eval_strategy": "steps"}
    raw["training"]["resume_from_checkpoint"] = str(tmp_path / "halves" / "checkpoint-6")
    with pytest.raises(ConfigError, match=r"blocks that are loaded \(all where the task is evaluated\) was 2, now"):
        train(config_from_dict(raw), overwrite=True)
    written = json.loads((tmp_path / "halves" / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(written["target_modules"]) and len(written["target_modules"]) == 14
