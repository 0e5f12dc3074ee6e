"""Bases in 4 and 8 bits: nothing is copied in fp32, they learn, go on and fit the plain base; and what is refused."""

from __future__ import annotations

import copy
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainerCallback

from fastalign.config import ModelConfig, config_from_dict
from fastalign.errors import ConfigError, ModelError
from fastalign.model.loading import load_model, load_model_config
from fastalign.model.quantization import effective_quantization, nf4, quant_storage, require_quantization
from fastalign.training.run import train
from tests.forks import Forks
from tests.test_doctor import HIDES, RAISES, ROOT, fake

CPU = torch.device("cpu")
IDS = torch.tensor([[0, 5, 6, 7, 8, 9]])
STORED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def packed(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of the same model, quantised by transformers and saved."""
    folders = {}
    for name, settings in STORED.items():
        folders[name] = Path(shutil.copytree(model_dir, tmp_path_factory.mktemp("packed") / name))
        (folders[name] / "model.safetensors").unlink()
        options: Any = {"quantization_config": BitsAndBytesConfig(**settings), "dtype": torch.float32}
        AutoModelForCausalLM.from_pretrained(model_dir, **options).save_pretrained(folders[name])
    return folders


def load(folder: Path, **settings: Any) -> Any:
    return load_model(ModelConfig(name_or_path=str(folder), **settings))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


class Watch(TrainerCallback):
    """Stops after a step, as a kill would; keeps the model and looks at every tensor that is alive."""

    def __init__(self, stop: int | None = None):
        self.stop, self.alive = stop, set()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.model, self.optimizer = model, kwargs["optimizer"]
        control.should_training_stop = state.global_step == self.stop
        tensors = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        self.alive |= {(tuple(t.shape), t.dtype) for t in tensors if not t.is_meta}


# ------------------------------------------------------------------------------------------------ lean


def test_nothing_is_copied_in_fp32(raw_config: dict) -> None:
    """Looked at in the midst of the training: after loading, adapter and set-up have done what they do."""
    raw = copy.deepcopy(raw_config)
    raw["model"] |= {"quantization": "nf4", "dtype": "bfloat16"}
    raw["training"] |= {"max_steps": 2, "gradient_checkpointing": True}
    watch = Watch()
    summary = train(config_from_dict(raw), callbacks=[watch])
    base = watch.model.get_base_model()
    parts = [base.get_input_embeddings(), base.get_output_embeddings(), base.model.norm]
    parts += [part for name, part in base.named_modules() if name.endswith("layernorm")]
    assert len(parts) == 3 + 2 * 4
    for part in parts:
        assert part.weight.dtype == torch.bfloat16 and not part.weight.requires_grad
        assert (tuple(part.weight.shape), torch.float32) not in watch.alive
    assert {p.dtype for p in base.parameters() if p.requires_grad} == {torch.float32}
    weights = [p for name, p in base.named_parameters() if "lora_" not in name and p.dim() > 1][1:-1]
    assert len(weights) == 4 * 7 and {p.dtype for p in weights} == {torch.uint8}
    assert all(p.quant_state.nested and p.quant_state.quant_type == "nf4" for p in weights)
    assert summary["model"]["quantization"] == "nf4" and summary["model"]["dtype"] == "bfloat16"


def test_packed_weights_pose_as_what_the_launch_needs(model_dir: Path) -> None:
    """The same bits either way, and so the same numbers."""
    assert quant_storage(torch.bfloat16, sharded=False) == torch.uint8
    assert quant_storage(torch.bfloat16, sharded=True) == torch.bfloat16
    found = []
    for sharded in (False, True):
        options: Any = {"quantization_config": nf4(torch.bfloat16, sharded=sharded), "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(model_dir, **options)
        weight = model.model.layers[0].mlp.up_proj.weight
        assert weight.dtype == (torch.bfloat16 if sharded else torch.uint8)
        found.append((weight.detach().view(torch.uint8).flatten(), logits(model)))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "kwargs",
    [{"preserve_rng_state": True}, *(pytest.param(k, marks=pytest.mark.slow) for k in (None, {"use_reentrant": True}))],
)
def test_checkpointing_leaves_the_gradient_as_it_is(kwargs: dict | None, raw_config: dict, tmp_path: Path) -> None:
    """Also as the reentrant kind, though nothing below the adapter has a gradient; else it is the other kind."""
    adapters = []
    for name, training in (("plain", {}), ("saved", {"gradient_checkpointing": True})):
        raw = copy.deepcopy(raw_config)
        raw["model"]["quantization"] = "nf4"
        raw["alignment"]["micro_batch_size"] = 4
        raw["training"] |= {"max_steps": 2, "optim": "sgd", "output_dir": str(tmp_path / name), **training}
        if kwargs is not None and training:
            raw["training"]["gradient_checkpointing_kwargs"] = kwargs
        watch = Watch()
        train(config_from_dict(raw), callbacks=[watch])
        adapters.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    block = watch.model.get_base_model().model.layers[0]
    reentrant = block._gradient_checkpointing_func.keywords["use_reentrant"]
    assert block.gradient_checkpointing and reentrant == (kwargs == {"use_reentrant": True})
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ what is trained, and its optimizer


@pytest.mark.parametrize(
    ("dtype", "held"),
    [
        ("bfloat16", torch.bfloat16),
        pytest.param("auto", torch.float32, marks=pytest.mark.slow),
        pytest.param("float16", torch.float16, marks=pytest.mark.slow),
    ],
)
def test_the_adapter_is_held_in_the_format_that_was_chosen(
    dtype: str, held: torch.dtype, raw_config: dict, tmp_path: Path
) -> None:
    """With its gradient and what the optimizer keeps; resumed from a checkpoint, too."""
    raw = copy.deepcopy(raw_config)
    raw["adapter"]["dtype"] = dtype
    raw["training"] |= {"save_strategy": "steps", "save_steps": 2, "adam_epsilon": 1e-4}
    train(config_from_dict(raw))
    wanted = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in wanted.values()} == {held}
    raw["training"]["output_dir"] = str(tmp_path / "halves")
    train(config_from_dict(raw), callbacks=[Watch(stop=2)])
    raw["training"]["resume_from_checkpoint"] = True
    watch = Watch()
    assert train(config_from_dict(raw), callbacks=[watch])["resumed_at"] == [2]
    assert {p.dtype for p in watch.model.parameters() if p.requires_grad} == {held}
    kept = [value for state in watch.optimizer.state.values() for name, value in state.items() if name != "step"]
    assert kept and {value.dtype for value in kept} == {held}
    found = load_file(tmp_path / "halves" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("training", "said"), [({"fp16": True}, "training.fp16"), ({}, "adam_epsilon"), ({"adam_epsilon": 1e-9}, "1e-09")]
)
def test_what_an_adapter_in_fp16_cannot_be_trained_with(training: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"^adapter\.dtype: float16 .*{said}"):
        config_from_dict({"adapter": {"dtype": "float16"}, "training": training})


@pytest.mark.parametrize(
    "optim",
    ["adamw_8bit", pytest.param("paged_adamw_8bit", marks=pytest.mark.slow)],
)
def test_adamw_in_8_bits_learns_and_goes_on(optim: str, raw_config: dict, tmp_path: Path) -> None:
    """Tensors of 4,096 numbers and more are kept in 8 bits; smaller ones, as bitsandbytes has it, in 32."""
    raw = copy.deepcopy(raw_config)
    raw["adapter"] = {"r": 64, "target_modules": ["q_proj"]}
    raw["training"] |= {"optim": optim, "save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    watch = Watch()
    summary = train(config_from_dict(raw), callbacks=[watch])
    assert {state["state1"].dtype for state in watch.optimizer.optimizer.state.values()} == {torch.uint8}
    assert summary["streams"]["task"]["loss_last"] < summary["streams"]["task"]["loss_first"]
    raw["training"]["output_dir"] = str(tmp_path / "halves")
    train(config_from_dict(raw), callbacks=[Watch(stop=4)])
    raw["training"]["resume_from_checkpoint"] = True
    assert train(config_from_dict(raw))["resumed_at"] == [4]
    found, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("halves", "out"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ------------------------------------------------------------------------------------- learns, goes on, fits


@pytest.fixture(scope="module")
def learnt(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """A run on a base in 4 bits: its configuration and its summary."""
    folder = tmp_path_factory.mktemp("learnt")
    raw = {
        "model": {"name_or_path": str(model_dir), "quantization": "nf4"},
        "adapter": {"r": 4, "dropout": 0.1},
        "task": {"data": str(data_dir / "task.jsonl"), "eval_share": 0.2},
        "alignment": {"data": str(data_dir / "pairs.jsonl"), "batch_size": 8, "micro_batch_size": 3},
        "training": {
            "output_dir": str(folder / "out"), "max_steps": 20, "save_steps": 10, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "eval_strategy": "no", "use_cpu": True,
        },
    }  # fmt: skip
    return raw, train(config_from_dict(raw))


def test_both_losses_fall(learnt: tuple[dict, dict]) -> None:
    task, alignment = (learnt[1]["streams"][name] for name in ("task", "alignment"))
    assert task["loss_last"] < 0.7 * task["loss_first"] and alignment["loss_last"] < alignment["loss_first"]


def test_a_stopped_run_ends_as_the_whole_one(learnt: tuple[dict, dict], tmp_path: Path) -> None:
    """To the last bit, on one machine."""
    raw = copy.deepcopy(learnt[0])
    raw["training"]["output_dir"] = str(tmp_path)
    train(config_from_dict(raw), callbacks=[Watch(stop=10)])
    raw["training"]["resume_from_checkpoint"] = True
    assert train(config_from_dict(raw))["resumed_at"] == [10]
    whole = Path(learnt[0]["training"]["output_dir"])
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == (whole / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills as on POSIX")
@pytest.mark.parametrize("at", [r"os\.rename .*/\.saving/checkpoint-10 ", r"open .*/\.saving/final/adapter_config"])
def test_a_killed_run_ends_as_the_whole_one(at: str, learnt: tuple[dict, dict], forks: Forks, tmp_path: Path) -> None:
    raw = copy.deepcopy(learnt[0])
    raw["training"] |= {"output_dir": str(tmp_path / "out"), "save_steps": 5}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    code, output = forks.run(["train", str(path)], at=at)
    assert code == -signal.SIGKILL, output
    code, output = forks.run(["train", str(path), "training.resume_from_checkpoint=true"])
    assert code == 0, output
    whole = Path(learnt[0]["training"]["output_dir"])
    found = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert found == (whole / "adapter_model.safetensors").read_bytes()


def test_the_adapter_loads_with_plain_peft_on_the_base_in_bf16(learnt: tuple[dict, dict], model_dir: Path) -> None:
    """And does there what it does on the base in 4 bits, up to what the 4 bits have changed."""
    from peft import PeftModel

    out = learnt[0]["training"]["output_dir"]
    plain = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    before = logits(plain)
    after = logits(PeftModel.from_pretrained(plain, out))
    on_4_bits = logits(PeftModel.from_pretrained(load(model_dir, quantization="nf4"), out))
    assert after.isfinite().all()
    assert relative(after, on_4_bits) < 0.3 < relative(after, before)


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


# --------------------------------------------------------------------------- checkpoints that are quantised


@pytest.mark.parametrize("asked", ["none", "nf4"])
@pytest.mark.parametrize("stored", STORED)
def test_a_quantised_checkpoint_is_taken_as_it_is(
    stored: str, asked: str, packed: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    config = ModelConfig(name_or_path=str(packed[stored]), quantization=asked)  # type: ignore[arg-type]
    assert effective_quantization(config, load_model_config(config)) == stored
    said = require_quantization(config, load_model_config(config), CPU)
    assert len(said) == (asked == "nf4" and stored != "nf4") and all("has no effect" in line for line in said)
    model = load_model(config)
    on_disk = load_file(packed[stored] / "model.safetensors")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight.detach(), on_disk["model.layers.0.mlp.up_proj.weight"])
    assert weight.dtype == (torch.int8 if stored == "int8" else torch.uint8)
    assert model.lm_head.weight.dtype == model.model.norm.weight.dtype == torch.float32
    if stored != "int8":
        assert weight.quant_state.quant_type == stored
        assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.float32  # as this run computes


@pytest.mark.parametrize("stored", ["fp4", "int8", pytest.param("nf4", marks=pytest.mark.slow)])
def test_a_quantised_checkpoint_trains(
    stored: str, packed: dict[str, Path], raw_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    raw = copy.deepcopy(raw_config)
    raw["model"] = {"name_or_path": str(packed[stored]), "quantization": "nf4" if stored == "fp4" else "none"}
    raw["training"]["max_steps"] = 8
    summary = train(config_from_dict(raw))
    assert summary["model"]["quantization"] == stored
    assert ("nf4 has no effect: the checkpoint is fp4" in capsys.readouterr().err) == (stored == "fp4")
    assert summary["streams"]["task"]["loss_last"] < summary["streams"]["task"]["loss_first"]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


def test_int8_has_the_gradient_of_the_dequantised_weights(packed: dict[str, Path]) -> None:
    layer = load(packed["int8"]).model.layers[0].mlp.up_proj
    weight = layer.weight.float() * (layer.weight.SCB / 127)[:, None]
    x, g = torch.randn(3, 64, requires_grad=True), torch.randn(3, 128)
    (layer.train()(x) * g).sum().backward()
    assert x.grad is not None and relative(x.grad, g @ weight) < 0.01  # the product is in 16 bits; seen: 0.0004


def test_weights_in_8_bits_are_checked_too(packed: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shutil.copytree(packed["int8"], tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.SCB"][3] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"NaN, in 'model\.layers\.1\.mlp\.up_proj"):
        load(tmp_path)


# ------------------------------------------------------------------------------------------ what is refused


MISSING = (
    HIDES.replace("importlib.machinery.PathFinder.find_spec = find_spec", "")
    + """
importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
import json, sys
from fastalign.cli import main
print(json.dumps([main(argv) for argv in json.loads(sys.argv[1])]))
"""
)


def child(code: str, *argv: str, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels")]))
    command = [sys.executable, "-c", code, *argv]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": path, **environment}
    )


@pytest.fixture
def config_file(raw_config: dict, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config), encoding="utf-8")
    return path


def test_without_bitsandbytes(config_file: Path, packed: dict[str, Path], tmp_path: Path) -> None:
    command = ["train", str(config_file)]
    wanting = ["model.quantization=nf4"], [f"model.name_or_path={packed['int8']}"], ["training.optim=adamw_8bit"]
    commands = [[*command, *more] for more in wanting]
    done = child(MISSING, json.dumps([*commands, [*command, "training.max_steps=2"]]), HIDDEN="bitsandbytes")
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[-1]) == [2, 2, 2, 0], done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastalign:")]
    assert "Traceback" not in done.stderr and len(lines) == 3
    assert "model.quantization: nf4 needs bitsandbytes, which is not installed; pip install" in lines[0]
    assert "the checkpoint is quantised (int8) needs bitsandbytes" in lines[1]
    assert "bitsandbytes" in lines[2] and "training" in lines[2]


@pytest.mark.slow
def test_with_a_bitsandbytes_that_cannot_be_imported(config_file: Path, tmp_path: Path) -> None:
    code = "import sys\nfrom fastalign.cli import main\nsys.exit(main(sys.argv[1:]))"
    path = str(fake(tmp_path / "fake", RAISES, "bitsandbytes"))
    done = child(code, "train", str(config_file), "model.quantization=nf4", PYTHONPATH=path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("fastalign:")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert "no native library" in lines[0] and "in bitsandbytes" in lines[0] and "fastalign doctor" in lines[0]
    assert not (tmp_path / "out").exists()


def test_with_a_bitsandbytes_that_does_not_work(
    raw_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes.functional

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no\nkernel image")

    monkeypatch.setattr(bitsandbytes.functional, "quantize_4bit", broken)
    raw = {**raw_config, "model": {**raw_config["model"], "quantization": "nf4"}}
    with pytest.raises(ConfigError, match=r"is broken \(RuntimeError: no kernel image\); pip .* none$"):
        train(config_from_dict(raw))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "mxfp4", "compressed-tensors", "hqq", "bitsandbytes"])
def test_other_quantisations_are_refused(method: str, model_dir: Path, tmp_path: Path) -> None:
    """Before a weight is read: here there is none."""
    raw = json.loads((model_dir / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": settings}))
    for asked in ("none", "nf4"):
        with pytest.raises(ModelError, match=rf"is quantised with {method}, .* unquantised version") as told:
            load(tmp_path, quantization=asked)
        assert "\n" not in str(told.value)
