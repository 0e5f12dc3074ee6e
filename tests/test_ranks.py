"""Two ranks do what one does: real launches on the CPU."""

from __future__ import annotations

import copy
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fastalign.config import config_from_dict
from fastalign.streams.alignment import AlignmentStream
from fastalign.streams.base import MicroBatch, Stream
from fastalign.training.run import train
from tests import rank_cases as ranks

TORCHRUN, DEEPSPEED = [*ranks.TORCHRUN, "fastalign"], [*ranks.DEEPSPEED, "fastalign"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "-m",
    "fastalign",
]
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0.0, "seed": 3, "report_to": "none"}


def launch(launcher: list[str], config: Path) -> subprocess.CompletedProcess:
    command = [*launcher, "train", str(config)]
    return subprocess.run(command, capture_output=True, text=True, env=ranks.ENVIRONMENT, timeout=300)


def write(raw: dict, path: Path) -> Path:
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]], ids=["blocks", "head"])
def test_two_ranks_contrast_their_own_pairs(targets: Any, raw_config: dict, tmp_path: Path) -> None:
    """DDP with cached gradients on every rank, each with its own negatives: on one rank the two halves of the alignment
    batch are taken for themselves. Also with an adapter on the head, though its logits come in chunks."""

    def alone(self: AlignmentStream, model: Any, micro_batch: MicroBatch) -> torch.Tensor:
        return plain_loss(self, model, micro_batch) * (micro_batch.items / self.rows_per_step)

    plain_loss = AlignmentStream.loss
    raw = copy.deepcopy(raw_config)
    raw["adapter"]["target_modules"] = targets
    raw["alignment"] |= {"layer": 2, "batch_size": 8, "micro_batch_size": 4}
    raw["training"] |= {**SGD, "max_steps": 4, "per_device_train_batch_size": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignmentStream, "begin_step", Stream.begin_step)
        patch.setattr(AlignmentStream, "loss", alone)
        one = train(config_from_dict(raw))
    expected = load_file(Path(raw["training"]["output_dir"]) / "adapter_model.safetensors")

    raw["alignment"] |= {"batch_size": 4, "micro_batch_size": 2}
    raw["training"] |= {"per_device_train_batch_size": 2, "output_dir": str(tmp_path / "two")}
    done = launch(TORCHRUN, write(raw, tmp_path / "two.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    both = load_file(tmp_path / "two" / "adapter_model.safetensors")
    moved = max(float(tensor.abs().max()) for name, tensor in expected.items() if "lora_B" in name)
    for name, tensor in expected.items():
        torch.testing.assert_close(both[name], tensor, rtol=1e-4, atol=1e-5 * moved, msg=name)
    two = json.loads((tmp_path / "two" / "summary.json").read_text())
    for stream, row in one["streams"].items():
        assert two["streams"][stream]["loss_first"] == pytest.approx(row["loss_first"], rel=1e-4)
        assert two["streams"][stream]["tokens"] == row["tokens"]
    assert two["retrieval"]["after"]["mean"] == pytest.approx(one["retrieval"]["after"]["mean"], abs=0.15)


def assert_resumes_to_the_same_end(launcher: list[str], raw: dict, out: Path) -> None:
    """Of a run of 6 steps with a checkpoint at the third: without its end, it comes to the same adapter again."""
    expected = (out / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(out / "checkpoint-6")
    (out / "adapter_model.safetensors").unlink()
    raw["training"]["resume_from_checkpoint"] = True
    done = launch(launcher, write(raw, out.parent / "config.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "summary.json").read_text())["resumed_at"] == [3]
    assert (out / "adapter_model.safetensors").read_bytes() == expected


@pytest.mark.slow
def test_two_ranks_resume_to_the_same_end(raw_config: dict, tmp_path: Path) -> None:
    """Checkpoints of several ranks are whole, and hold what each rank needs; DeepSpeed's are in test_zero_runs.py."""
    raw = copy.deepcopy(raw_config)
    raw["adapter"]["dropout"] = 0.1
    raw["alignment"]["micro_batch_size"] = 3
    raw["training"] |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "report_to": "none"}
    done = launch(TORCHRUN, write(raw, tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    assert_resumes_to_the_same_end(TORCHRUN, raw, out)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_two_ranks_with_the_first_blocks_only(quantization: str, raw_config: dict, tmp_path: Path) -> None:
    """`align_only` under DDP: evaluated, resumed to the same end, with an adapter that names its modules."""
    raw = copy.deepcopy(raw_config)
    raw["schedule"] = {"mode": "align_only"}
    raw["model"]["quantization"] = quantization
    del raw["task"]
    raw["alignment"] |= {"micro_batch_size": 3, "eval_share": 0.4}
    raw["training"] |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "report_to": "none"}
    raw["training"] |= {"eval_strategy": "steps", "eval_steps": 3}
    done = launch(TORCHRUN, write(raw, tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("blocks 1 to 2 of 4 are loaded") == 1
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["model"]["layers_loaded"] == 2 and {"before", "after"} <= summary["retrieval"].keys()
    assert "eval_alignment_loss" in summary["evaluation"]
    assert len(json.loads((out / "adapter_config.json").read_text())["target_modules"]) == 14
    assert_resumes_to_the_same_end(TORCHRUN, raw, out)


@pytest.mark.slow
def test_accelerate_launches_too(raw_config: dict, tmp_path: Path) -> None:
    raw = copy.deepcopy(raw_config)
    done = launch(ACCELERATE, write(raw, tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["ranks"] == 2 and (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_mistake_is_said_once_and_ends_all_ranks(raw_config: dict, tmp_path: Path) -> None:
    raw = copy.deepcopy(raw_config)
    raw["alignment"]["layer"] = 99
    done = launch(TORCHRUN, write(raw, tmp_path / "config.yaml"))
    assert done.returncode != 0
    assert sum(line.startswith("fastalign:") for line in done.stderr.splitlines()) == 1
    assert "1..4" in done.stderr and "cli.py" not in done.stderr  # the only traceback is the launcher's own


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_rows_of_all(raw_config: dict, tmp_path: Path) -> None:
    raw = copy.deepcopy(raw_config)
    raw["training"] |= {"learning_rate": 1e30, "logging_steps": 50}
    done = launch(TORCHRUN, write(raw, tmp_path / "config.yaml"))
    assert done.returncode != 0
    [line] = [line for line in done.stderr.splitlines() if line.startswith("fastalign:")]
    assert "alignment stream at step 2 is nan" in line and "cli.py" not in done.stderr
    stopped = json.loads((tmp_path / "out" / "stopped.json").read_text())
    assert len(stopped["rows"]) == 2 * raw["alignment"]["batch_size"]  # all of each rank


@pytest.mark.slow
def test_an_interrupt_that_reaches_one_rank_stops_all_with_a_checkpoint(raw_config: dict, tmp_path: Path) -> None:
    raw = copy.deepcopy(raw_config)
    raw["training"] |= {"max_steps": 100_000, "logging_steps": 5, "disable_tqdm": True}
    command = [*TORCHRUN, "train", str(write(raw, tmp_path / "config.yaml"))]
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=ranks.ENVIRONMENT)
    try:
        deadline = time.monotonic() + 120
        while "task_loss" not in (tmp_path / "log").read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = psutil.Process(launcher.pid).children()
        assert len(workers) == 2
        workers[1].send_signal(signal.SIGINT)
        assert launcher.wait(timeout=90) != 0
    finally:
        launcher.kill()
    [checkpoint] = (tmp_path / "out").glob("checkpoint-*")
    assert (checkpoint / "trainer_state.json").exists() and (tmp_path / "out" / "summary.json").exists()
