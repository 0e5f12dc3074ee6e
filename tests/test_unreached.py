"""Two ranks take the steps of one, whatever wraps the model: DDP and every stage of ZeRO, each on real ranks.

Negatives are those of all ranks here, so that two ranks with half the pairs each are one rank with all of them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import set_seed

from fastalign.config import config_from_dict
from fastalign.model.loading import add_adapter, load_model
from fastalign.training.run import train
from fastalign.training.zero import PRESETS, preset
from tests.rank_cases import DEEPSPEED, TORCHRUN, on_ranks, tail

WRAPPERS = ("ddp", *PRESETS)
MODES = ("alternate", "joint", "task_only", "align_only")
SGD = {"optim": "sgd", "learning_rate": 0.1}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}
Tensors = dict[str, torch.Tensor]


def configured(model_dir: Path, data_dir: Path, out: Path, ranks: int, mode: str, **training: Any) -> dict[str, Any]:
    """A run of 4 steps whose rows of a step are the same on 1 and on 2 ranks."""
    accumulation = training.get("gradient_accumulation_steps", 1)
    return {
        "model": {"name_or_path": str(model_dir)},
        "adapter": {"r": 4, "alpha": 8.0},
        "task": {"data": str(data_dir / "task.jsonl"), "eval_share": 0},
        "alignment": {
            "data": str(data_dir / "pairs.jsonl"), "layer": 2, "eval_share": 0, "negatives": "world",
            "batch_size": 8 // ranks, "micro_batch_size": 4 // ranks,
        },
        "schedule": {"mode": mode},
        "training": {
            "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 4 // ranks // accumulation,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "seed": 3, "save_strategy": "no",
            "use_cpu": True, "disable_tqdm": True, **training,
        },
    }  # fmt: skip


def wrapped(wrapper: str) -> dict[str, Any]:
    """The key of ``training``. The tiny model's parameters are all below the size from which ZeRO-3 parts them."""
    if wrapper == "ddp":
        return {}
    settings = preset(wrapper)
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if "zero3" in wrapper else {}
    return {"deepspeed": settings}


class Runs:
    """Runs on one rank, here, and the same on two, and how far they are apart."""

    def __init__(self, model_dir: Path, data_dir: Path, folder: Path):
        self._model_dir, self._data_dir, self.folder = model_dir, data_dir, folder
        self._cases: dict[str, dict[str, Any]] = {}
        self._one: dict[str, Tensors] = {}
        set_seed(3)
        config = config_from_dict(self._config("none", 1, "alternate"))
        start = add_adapter(load_model(config.model), config.adapter).state_dict()
        self._start = {name.replace(".default", ""): tensor.clone() for name, tensor in start.items()}

    def add(self, name: str, wrapper: str, mode: str, *, broken: str | None = None, **training: Any) -> None:
        """A case for two ranks."""
        config = self._config(f"two/{name}", 2, mode, **training, **wrapped(wrapper))
        self._cases[name] = {"config": config, **({"break": broken} if broken else {})}

    def launch(self, launcher: list[str] = TORCHRUN) -> Runs:
        on_ranks(self._cases, self.folder, launcher)
        return self

    def error(self, name: str, mode: str, **training: Any) -> float:
        """How far the adapter of two ranks is from that of one, relative to what the run has changed in it."""
        path = self.folder / "two" / name / "adapter_model.safetensors"
        assert path.is_file(), tail(self.folder)
        two, one = load_file(path), self._trained_on_one(mode, **training)
        assert two.keys() == one.keys()
        apart = sum(float((two[key] - one[key]).double().square().sum()) for key in one)
        moved = sum(float((self._start[key] - one[key]).double().square().sum()) for key in one)
        return (apart / moved) ** 0.5

    def failed(self, name: str) -> bool:
        return not (self.folder / "two" / name / "adapter_model.safetensors").exists()

    def _trained_on_one(self, mode: str, **training: Any) -> Tensors:
        key = f"{mode} {training}"
        if key not in self._one:
            out = self.folder / "one" / str(len(self._one))
            train(config_from_dict(self._config(f"one/{len(self._one)}", 1, mode, **training)))
            self._one[key] = load_file(out / "adapter_model.safetensors")
        return self._one[key]

    def _config(self, name: str, ranks: int, mode: str, **training: Any) -> dict[str, Any]:
        return configured(self._model_dir, self._data_dir, self.folder / name, ranks, mode, **copy.deepcopy(training))


ADAM_STEPS = {**ADAMW, "max_steps": 3}  # task, alignment, task: the layers above the aligned one are left out once
ACCUMULATED = {**SGD, "gradient_accumulation_steps": 2}
RULE = {wrapper: "clear_gradients" if "zero3" in wrapper else "zero_term" for wrapper in WRAPPERS}


@pytest.fixture(scope="module")
def all_runs(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    runs = Runs(model_dir, data_dir, tmp_path_factory.mktemp("all"))
    for wrapper in WRAPPERS:
        for mode in MODES:
            runs.add(f"sgd-{wrapper}-{mode}", wrapper, mode, **SGD)
        runs.add(f"adamw-{wrapper}", wrapper, "alternate", **ADAM_STEPS)
        for mode in ("alternate", "joint"):  # two backwards of the task, two of the alignment
            runs.add(f"accumulated-{wrapper}-{mode}", wrapper, mode, **ACCUMULATED)
    for wrapper in reversed(WRAPPERS):  # DDP last: it fails
        runs.add(f"broken-{wrapper}", wrapper, "alternate", broken=RULE[wrapper], **ADAM_STEPS)
    return runs.launch()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sgd_on_two_ranks_is_sgd_on_one(all_runs: Runs, wrapper: str, mode: str) -> None:
    assert all_runs.error(f"sgd-{wrapper}-{mode}", mode, **SGD) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["alternate", "joint"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_so_it_is_where_gradients_are_accumulated(all_runs: Runs, wrapper: str, mode: str) -> None:
    assert all_runs.error(f"accumulated-{wrapper}-{mode}", mode, **ACCUMULATED) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_so_it_is_with_adamw(all_runs: Runs, wrapper: str) -> None:
    assert all_runs.error(f"adamw-{wrapper}", "alternate", **ADAM_STEPS) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_without_the_rule_it_is_not(all_runs: Runs, wrapper: str) -> None:
    """Zero gradients for what a step does not reach: without, the upper layers go on differently, or the run fails.
    ZeRO-1 and 2 fill in zeros by themselves where they keep the optimizer on the GPU."""
    name, itself = f"broken-{wrapper}", wrapper in ("zero1", "zero2")
    assert all_runs.failed(name) or (all_runs.error(name, "alternate", **ADAM_STEPS) > 1e-2) != itself


def test_zero_2_and_3_take_the_steps_of_one_rank(
    model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The quick one, started by DeepSpeed's own launcher; above are all stages and schedules."""
    runs = Runs(model_dir, data_dir, tmp_path_factory.mktemp("quick"))
    for wrapper in ("zero2", "zero3-offload"):
        runs.add(wrapper, wrapper, "alternate", **SGD)
    runs.launch(DEEPSPEED)
    for wrapper in ("zero2", "zero3-offload"):
        assert runs.error(wrapper, "alternate", **SGD) < 1e-5
