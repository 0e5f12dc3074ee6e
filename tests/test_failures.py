"""A run that cannot go on says which step, stream and rows, what to change, and what is left; nothing is lost."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainerCallback

from fastalign.cli import main
from fastalign.config import config_from_dict
from fastalign.errors import RunError
from fastalign.streams.alignment import AlignmentStream
from fastalign.streams.task import TaskStream
from fastalign.training import run as run_module
from fastalign.training.run import train
from fastalign.training.trainer import AlignTrainer

SAVING = ["training.save_strategy=steps", "training.save_steps=2", "training.save_total_limit=9"]


@pytest.fixture
def config_file(raw_config: dict, tmp_path: Path) -> Path:
    raw = copy.deepcopy(raw_config)
    raw["training"]["max_steps"] = 12
    raw["alignment"]["micro_batch_size"] = 4
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def stop(capsys: pytest.CaptureFixture, config_file: Path, *overrides: str) -> str:
    """The one line of a run that ends with exit code 1."""
    code = main(["train", str(config_file), *overrides])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fastalign:")]
    assert code == 1 and len(lines) == 1
    return lines[0]


def at(number: int, loss: Callable[..., torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`loss`, changed in its call of this number, counted from 1."""
    calls = 0

    def changed(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        value = loss(*arguments)
        return change(value) if calls == number else value

    return changed


def test_a_diverged_run_names_step_stream_rows_and_what_is_left(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Weights of 1e30 are finite; what they make of the next batch is not."""
    line = stop(capsys, config_file, "training.learning_rate=1e30", "training.logging_steps=50", *SAVING)
    assert re.search(r"loss of the alignment stream at step 2 is nan", line)
    assert "pairs.jsonl, line" in line and "learning_rate" in line and "no checkpoint" in line
    stopped = json.loads((tmp_path / "out" / "stopped.json").read_text())
    assert stopped["step"] == 2 and stopped["stream"] == "alignment" and len(stopped["rows"]) == 8
    assert not [*(tmp_path / "out").glob("checkpoint-*")] and not (tmp_path / "out" / "summary.json").exists()


@pytest.mark.parametrize("logging_steps", [1, 50])
def test_one_bad_micro_batch_is_named_and_the_last_good_checkpoint(
    logging_steps: int,
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """The 4th task step is step 7: checkpoint-6 may hold what broke it, checkpoint-4 has been trained on since."""
    seen: list[Any] = []
    loss = TaskStream.loss

    def watched(stream: TaskStream, model: Any, micro_batch: Any) -> torch.Tensor:
        seen.append([stream.where(row) for row in micro_batch.rows])
        return loss(stream, model, micro_batch) * (torch.nan if len(seen) == 8 else 1.0)

    monkeypatch.setattr(TaskStream, "loss", watched)
    halves = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
    line = stop(capsys, config_file, f"training.logging_steps={logging_steps}", *halves, *SAVING)
    assert "loss of the task stream at step 7 is nan" in line
    assert json.loads((tmp_path / "out" / "stopped.json").read_text())["rows"] == seen[7] and len(seen[7]) == 2
    assert all(place in line for place in seen[7]) and f"good checkpoint is {tmp_path / 'out' / 'checkpoint-4'}" in line
    found = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert found == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


def test_a_gradient_that_is_not_finite_stops_the_run_too(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def burst(loss: torch.Tensor) -> torch.Tensor:
        loss.register_hook(lambda gradient: gradient * torch.inf)
        return loss * 1.0

    monkeypatch.setattr(AlignmentStream, "loss", at(3, AlignmentStream.loss, burst))
    line = stop(capsys, config_file)
    assert re.search(r"gradient norm of the alignment stream at step 4 is (nan|inf)", line)


def test_weights_that_an_update_ruined_are_not_saved(raw_config: dict, tmp_path: Path) -> None:
    class Ruin(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 4:
                next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.nan

    raw = copy.deepcopy(raw_config)
    raw["training"] |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    with pytest.raises(RunError, match="no longer finite after step 4") as error:
        train(config_from_dict(raw), callbacks=[Ruin()])
    assert str(tmp_path / "out" / "checkpoint-2") in str(error.value)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_ruined_adapter_is_no_result_either(raw_config: dict, tmp_path: Path) -> None:
    class Ruin(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 4:
                next(p for p in model.parameters() if p.requires_grad).data[0, 0] = torch.inf

    with pytest.raises(RunError, match="no longer finite after step 4"):
        train(config_from_dict(raw_config), callbacks=[Ruin()])
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_in_a_joint_step_the_stream_whose_loss_it_was_is_blamed(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(TaskStream, "loss", at(2, TaskStream.loss, lambda loss: loss * torch.nan))
    line = stop(capsys, config_file, "schedule.mode=joint")
    assert "the loss of the task stream at step 2" in line and "task.jsonl" in line


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB. GPU 0 has a total capacity of 8 GiB")


@pytest.mark.parametrize(
    ("stream", "method", "step", "keys"),
    [
        (
            TaskStream,
            "loss",
            5,
            ["per_device_train_batch_size (now 4", "gradient_accumulation_steps", "task.max_length"],
        ),
        (AlignmentStream, "loss", 4, ["alignment.micro_batch_size (now 4", "alignment.max_length (now 256)"]),
        (AlignmentStream, "begin_step", 6, ["alignment.micro_batch_size (now 4"]),
    ],
)
def test_out_of_memory_in_a_stream(
    stream: Any,
    method: str,
    step: int,
    keys: list[str],
    config_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """And the run goes on from its checkpoint, as if nothing had been, once there is room."""
    assert main(["train", str(config_file), f"training.output_dir={tmp_path / 'whole'}"]) == 0
    with monkeypatch.context() as patch:
        number = 3 if method == "begin_step" or stream is TaskStream else 2 * 1 + 2  # of two micro-batches a step
        patch.setattr(stream, method, at(number, getattr(stream, method), out_of_memory))
        line = stop(capsys, config_file, *SAVING)
    assert (
        f"out of memory in the {stream.name} stream at step {step} (CUDA out of memory. Tried to allocate 3.00 GiB)"
        in line
    )
    tokens, predicted, free = (
        int(re.search(pattern, line)[1].replace(",", ""))  # type: ignore[index]
        for pattern in (r"= ([\d,]+) tokens", r"predicted ([\d,]+) bytes", r"free were ([\d,]+)")
    )
    assert tokens > 0 and predicted > 1000 * tokens and free > 2**20
    assert all(key in line for key in [*keys, "gradient_checkpointing"])
    last = tmp_path / "out" / f"checkpoint-{(step - 1) // 2 * 2}"
    assert last.is_dir() and f"checkpoint is {last}" in line and "resume_from_checkpoint=true" in line
    assert main(["train", str(config_file), *SAVING, "training.resume_from_checkpoint=true"]) == 0
    ends = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")]
    assert ends[0] == ends[1]


def test_out_of_memory_elsewhere(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(TaskStream, "evaluate", out_of_memory)
        line = stop(
            capsys, config_file, "training.eval_strategy=steps", "training.eval_steps=2", "training.logging_steps=1"
        )
        assert "outside of a training forward" in line and "per_device_eval_batch_size" in line and "bytes" not in line
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "load_model", out_of_memory)
        line = stop(capsys, config_file, "--overwrite")
        assert "while loading the base model" in line and "quantization: nf4" in line
    with monkeypatch.context() as patch:
        patch.setattr(run_module._MeasureBefore, "on_train_begin", lambda *_, **__: None)
        patch.setattr(run_module, "retrieval", out_of_memory)
        line = stop(capsys, config_file, "--overwrite")
        assert "after the training" in line and "adapter is saved" in line
    with monkeypatch.context() as patch:
        patch.setattr(AlignTrainer, "save_model", out_of_memory)
        assert "out of memory" in stop(capsys, config_file, "--overwrite")


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes", None])
def test_memory_of_the_cpu_runs_out_too(
    words: str | None, config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def burst(*_: Any) -> Any:
        raise MemoryError if words is None else RuntimeError(words)

    monkeypatch.setattr(TaskStream, "loss", burst)
    assert "out of memory in the task stream at step 1" in stop(capsys, config_file)


def test_another_error_is_not_taken_for_memory(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(TaskStream, "loss", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        main(["train", str(config_file)])


@pytest.mark.gpu
def test_a_memory_fraction_on_a_gpu(raw_config: dict) -> None:
    """From the second step on, the process gets 2 MB more than it has."""

    class Squeeze(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**21) / total)

    raw = copy.deepcopy(raw_config)
    del raw["training"]["use_cpu"]
    raw["alignment"] |= {"batch_size": 40}
    try:
        with pytest.raises(
            RunError, match=r"out of memory in the alignment stream at step 2 .*alignment.micro_batch_size"
        ):
            train(config_from_dict(raw), callbacks=[Squeeze()])
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
