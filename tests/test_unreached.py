"""Two ranks take the steps of one, whatever wraps the model: DDP and every stage of ZeRO, each on real ranks.

Negatives are those of all ranks here, so that two ranks with half the pairs each are one rank with all of them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastalign.training.zero import PRESETS
from tests.rank_cases import DEEPSPEED, SGD, Runs

WRAPPERS = ("ddp", *PRESETS)
MODES = ("alternate", "joint", "task_only", "align_only")
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.1}
ADAM_STEPS = {**ADAMW, "max_steps": 3}  # task, alignment, task: the layers above the aligned one are left out once
HEAD = {**SGD, "adapter": {"target_modules": ["q_proj", "lm_head"]}}
ACCUMULATED = {**SGD, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
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
    for wrapper in ("ddp", "zero3"):
        runs.add(f"head-{wrapper}", wrapper, "alternate", **HEAD)
    for wrapper in reversed(WRAPPERS):  # DDP last: it fails
        runs.add(f"broken-{wrapper}", wrapper, "alternate", broken=RULE[wrapper], **ADAM_STEPS)
    return runs.launch()


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_sgd_on_two_ranks_is_sgd_on_one(all_runs: Runs, wrapper: str, mode: str) -> None:
    assert all_runs.error(f"sgd-{wrapper}-{mode}", all_runs.one(mode, **SGD)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["alternate", "joint"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_so_it_is_where_gradients_are_accumulated_and_clipped(all_runs: Runs, wrapper: str, mode: str) -> None:
    assert all_runs.error(f"accumulated-{wrapper}-{mode}", all_runs.one(mode, **ACCUMULATED)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "zero3"])
def test_so_it_is_with_an_adapter_on_the_head(all_runs: Runs, wrapper: str) -> None:
    ours = load_file(all_runs.two(f"head-{wrapper}") / "adapter_model.safetensors")
    wanted = load_file(all_runs.one("alternate", **HEAD) / "adapter_model.safetensors")
    trained = [key for key in wanted if "lora" in key]
    assert any("lm_head" in key for key in trained)
    for key in trained:
        torch.testing.assert_close(ours[key], wanted[key], rtol=0.0, atol=1e-4 * float(wanted[key].abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_so_it_is_with_adamw(all_runs: Runs, wrapper: str) -> None:
    assert all_runs.error(f"adamw-{wrapper}", all_runs.one("alternate", **ADAM_STEPS)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_without_the_rule_it_is_not(all_runs: Runs, wrapper: str) -> None:
    """Zero gradients for what a step does not reach: without, the upper layers go on differently, or the run fails.
    ZeRO-1 and 2 fill in zeros by themselves where they keep the optimizer on the GPU."""
    name, itself = f"broken-{wrapper}", wrapper in ("zero1", "zero2")
    if wrapper == "ddp":
        assert all_runs.failed(name)
    else:
        assert (all_runs.error(name, all_runs.one("alternate", **ADAM_STEPS)) > 1e-2) != itself


@pytest.mark.timeout(900)  # DeepSpeed compiles in its first launch on a machine
def test_zero_2_and_3_take_the_steps_of_one_rank(
    model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The quick one, started by DeepSpeed's own launcher; above are all stages and schedules."""
    runs = Runs(model_dir, data_dir, tmp_path_factory.mktemp("quick"))
    for wrapper in ("zero2", "zero3-offload"):
        runs.add(wrapper, wrapper, "alternate", **SGD)
    runs.launch(DEEPSPEED)
    for wrapper in ("zero2", "zero3-offload"):
        assert runs.error(wrapper, runs.one("alternate", **SGD)) < 1e-5
