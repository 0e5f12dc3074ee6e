"""DeepSpeed's runs from beginning to end, on two real ranks: 4-bit bases, checkpoints, data that run out unevenly."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.rank_cases import DEEPSPEED, ENVIRONMENT, TORCHRUN, configured, on_ranks, wrapped

STEPS = 12
# Wrapper and quantisation of a run that is saved at its middle, and of a second one that goes on from there.
RESUMED = [
    ("zero1", "none"),
    ("zero2", "none"),
    ("zero2-offload", "none"),
    ("zero3", "none"),
    ("zero3-offload", "none"),
    ("zero2", "nf4"),
    ("zero3", "nf4"),
]


def resumable(model_dir: Path, data_dir: Path, out: Path, wrapper: str, quantization: str = "none") -> dict[str, Any]:
    """A run of `STEPS` with dropout, and cached gradients over the negatives of all ranks."""
    settings: dict[str, Any] = {"learning_rate": 1e-2, "max_steps": STEPS, "logging_steps": 2, **wrapped(wrapper)}
    settings |= {"save_strategy": "steps", "save_steps": STEPS // 2, "save_total_limit": None}
    raw = configured(model_dir, data_dir, out, 2, "alternate", {"eval_share": 0.2}, **settings)
    raw["adapter"]["dropout"] = 0.1
    raw["model"]["quantization"] = quantization
    return raw


@pytest.fixture(scope="module")
def results(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: ``WRAPPER-QUANTIZATION``, its continuation ``...-resumed``, and ``uneven-...``."""
    folder = tmp_path_factory.mktemp("zero")
    for name, kept in (("task", 11), ("pairs", 7)):  # neither is a multiple of anything
        lines = (data_dir / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:kept]), encoding="utf-8")
    cases = {}
    for wrapper, quantization in RESUMED:
        name = f"{wrapper}-{quantization}"
        raw = resumable(model_dir, data_dir, folder / name, wrapper, quantization)
        cases[name] = {"config": raw}
        again = json.loads(json.dumps(raw))
        again["training"] |= {
            "output_dir": str(folder / f"{name}-resumed"),
            "resume_from_checkpoint": str(folder / name / f"checkpoint-{STEPS // 2}"),
        }
        cases[f"{name}-resumed"] = {"config": again}
    for wrapper in ("ddp", "zero3"):
        for streaming in (False, True):
            out = folder / f"uneven-{wrapper}-{streaming}"
            length: dict[str, Any] = {"max_steps": 5} if streaming else {"max_steps": -1, "num_train_epochs": 2}
            training = {"eval_strategy": "steps", "eval_steps": 3, **length, **wrapped(wrapper)}
            raw = configured(model_dir, folder, out, 2, "alternate", {"eval_share": 0.3}, **training)
            raw["task"]["eval_share"] = 0.3
            for section in ("task", "alignment") if streaming else ():
                given = raw[section]["data"]
                raw[section] |= {"data": {"path": given, "streaming": True}, "eval_data": given}
            cases[out.name] = {"config": raw}
    on_ranks(cases, folder)
    return folder


def summary(results: Path, name: str) -> dict[str, Any]:
    assert (results / name / "summary.json").is_file(), (results / "log").read_text(errors="replace")[-3000:]
    return json.loads((results / name / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "quantization"), RESUMED)
def test_a_run_learns_and_goes_on_from_its_checkpoint(results: Path, wrapper: str, quantization: str) -> None:
    name = f"{wrapper}-{quantization}"
    whole, resumed = summary(results, name), summary(results, f"{name}-resumed")
    assert whole["model"]["quantization"] == quantization
    assert whole["streams"]["task"]["loss_last"] < whole["streams"]["task"]["loss_first"]
    assert resumed["resumed_at"] == [STEPS // 2] and resumed["steps"] == STEPS
    wanted, found = (load_file(results / n / "adapter_model.safetensors") for n in (name, f"{name}-resumed"))
    assert wanted.keys() == found.keys()
    for key, tensor in wanted.items():
        assert torch.equal(tensor, found[key]), key


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "quantization"), [("zero3", "none"), ("zero3", "nf4")])
def test_an_adapter_of_zero_3_loads_with_plain_peft(
    results: Path, model_dir: Path, wrapper: str, quantization: str
) -> None:
    out = results / f"{wrapper}-{quantization}"
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    inputs = torch.arange(3, 19).unsqueeze(0)
    with torch.no_grad():
        before = base(inputs).logits
        model = PeftModel.from_pretrained(base, out)
        after = model(inputs).logits
    assert not torch.allclose(before, after, atol=1e-3)
    held = {name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    saved = load_file(out / "adapter_model.safetensors")
    assert held.keys() == saved.keys() and all(torch.equal(held[name], saved[name]) for name in saved)
    assert all(float(tensor.abs().max()) > 0 for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("wrapper", ["ddp", "zero3"])
def test_data_that_run_out_unevenly_end_no_rank_early(results: Path, wrapper: str, streaming: bool) -> None:
    found = summary(results, f"uneven-{wrapper}-{streaming}")
    steps = found["steps"]
    assert steps == (5 if streaming else found["plan"]["task"]["steps"] + found["plan"]["alignment"]["steps"])
    assert found["streams"]["task"]["steps"] + found["streams"]["alignment"]["steps"] == steps


@pytest.mark.slow
@pytest.mark.parametrize(("wrapper", "launcher"), [("ddp", TORCHRUN), ("zero3", DEEPSPEED)])
def test_a_killed_rank_ends_the_launch_and_the_run_goes_on_later(
    wrapper: str, launcher: list[str], model_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    raw = resumable(model_dir, data_dir, out, wrapper)
    raw["training"] |= {"max_steps": 100_000, "save_steps": 5, "save_total_limit": 2}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(raw), encoding="utf-8")
    command = [*launcher, "fastalign", "train", str(config)]
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT)
    try:
        deadline = time.monotonic() + 400  # DeepSpeed may compile first
        while not (out / "checkpoint-10").exists():
            assert launched.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.2)
        children = psutil.Process(launched.pid).children(recursive=True)
        [victim] = [child for child in children if child.environ().get("RANK") == "1" and "train" in child.cmdline()]
        victim.send_signal(signal.SIGKILL)
        assert launched.wait(timeout=60) != 0
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    finally:
        for process in (
            [*psutil.Process(launched.pid).children(recursive=True), launched] if launched.poll() is None else []
        ):
            process.kill()
    done = max(int(path.name.rpartition("-")[2]) for path in out.glob("checkpoint-*"))
    raw["training"] |= {"max_steps": done + 2, "resume_from_checkpoint": True}
    config.write_text(yaml.safe_dump(raw), encoding="utf-8")
    again = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=180)
    assert again.returncode == 0, again.stderr[-3000:]
    found = json.loads((out / "summary.json").read_text())
    assert found["steps"] == done + 2 and found["resumed_at"][-1] <= done
    shutil.rmtree(out)
