"""The trainer: scaling, schedules, zero gradients, logs, and what Trainer users know."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from fastalign.config import config_from_dict
from fastalign.errors import ConfigError
from fastalign.training.run import train


class Spy(TrainerCallback):
    """Keeps the adapter's gradients (before the optimizer step) and the logs."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor | None]] = []
        self.logs: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.gradients.append(
            {
                name: None if p.grad is None else p.grad.clone()
                for name, p in model.named_parameters()
                if p.requires_grad
            }
        )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def run(raw: dict, **sections: dict) -> tuple[dict[str, Any], Spy]:
    """Train with the given keys changed; no gradient clipping unless asked for."""
    raw = copy.deepcopy(raw)
    raw["training"].setdefault("max_grad_norm", 0.0)
    for section, values in sections.items():
        raw.setdefault(section, {}).update(values)
    spy = Spy()
    return train(config_from_dict(raw), overwrite=True, callbacks=[spy]), spy


def assert_same(
    left: dict[str, torch.Tensor | None], right: dict[str, torch.Tensor | None], tolerance: float = 1e-5
) -> None:
    assert left.keys() == right.keys()
    scale = max(float(g.abs().max()) for g in right.values() if g is not None)
    for name, gradient in left.items():
        other = right[name]
        assert gradient is not None and other is not None, name
        torch.testing.assert_close(gradient, other, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize(("size", "accumulation"), [(2, 4), (1, 8), (4, 2)])
def test_task_gradient_is_the_mean_over_answer_tokens_however_it_is_cut(
    raw_config: dict, size: int, accumulation: int
) -> None:
    mode = {"schedule": {"mode": "task_only"}}
    _, whole = run(raw_config, training={"per_device_train_batch_size": 8, "max_steps": 2}, **mode)
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_steps": 2}
    _, parts = run(raw_config, training=cut, **mode)
    assert_same(parts.gradients[0], whole.gradients[0])
    assert parts.logs[0]["task_loss"] == pytest.approx(whole.logs[0]["task_loss"], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_joint_is_the_sum_of_both_streams(raw_config: dict, accumulation: int) -> None:
    training = {"max_steps": 1, "gradient_accumulation_steps": accumulation}
    gradients = {}
    for mode in ("task_only", "align_only", "joint"):
        _, spy = run(raw_config, training=training, schedule={"mode": mode}, alignment={"weight": 0.5})
        gradients[mode] = spy.gradients[0]
    below = gradients["align_only"]  # no block above the aligned one is loaded
    assert below.keys() == {name for name in gradients["task_only"] if "layers.0." in name or "layers.1." in name}
    total = {name: g + below.get(name, 0.0) for name, g in gradients["task_only"].items()}  # type: ignore[operator]
    assert_same(gradients["joint"], total, 1e-4)


def test_joint_logs_each_stream_as_if_it_were_alone(raw_config: dict) -> None:
    logs = {}
    for mode in ("task_only", "align_only", "joint"):
        _, spy = run(raw_config, training={"max_steps": 1}, schedule={"mode": mode}, alignment={"weight": 0.25})
        logs[mode] = spy.logs[0]
    for stream, mode in (("task", "task_only"), ("alignment", "align_only")):
        assert logs["joint"][f"{stream}_loss"] == pytest.approx(logs[mode][f"{stream}_loss"], rel=1e-5)
        assert logs["joint"][f"{stream}_grad_norm"] == pytest.approx(logs[mode][f"{stream}_grad_norm"], rel=1e-4)
        assert logs["joint"][f"{stream}_tokens"] == logs[mode][f"{stream}_tokens"] > 0


def test_the_weight_scales_the_gradient_and_not_the_logged_loss(raw_config: dict) -> None:
    runs = [
        run(raw_config, alignment={"weight": weight}, schedule={"mode": "align_only"}, training={"max_steps": 1})[1]
        for weight in (1.0, 0.25)
    ]
    scaled = {name: 0.25 * gradient for name, gradient in runs[0].gradients[0].items() if gradient is not None}
    assert_same(runs[1].gradients[0], scaled)  # type: ignore[arg-type]
    assert runs[1].logs[0]["alignment_loss"] == runs[0].logs[0]["alignment_loss"]


def test_layers_above_the_aligned_one_get_zero_gradients_not_none(raw_config: dict) -> None:
    _, spy = run(raw_config, alignment={"layer": 2}, training={"max_steps": 2})
    for name, gradient in spy.gradients[1].items():
        assert gradient is not None, name
        if "layers.2." in name or "layers.3." in name:
            assert not gradient.any(), name
        elif "layers.0." in name:
            assert gradient.any(), name


def test_momentum_goes_on_above_the_layer_as_with_many_ranks(raw_config: dict) -> None:
    """Adam with a zero gradient still moves a parameter; with None it would not."""
    moved = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            moved[state.global_step] = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    raw = copy.deepcopy(raw_config)
    raw["alignment"]["layer"] = 1
    raw["training"]["max_steps"] = 2
    train(config_from_dict(raw), callbacks=[Watch()])
    top = [name for name in moved[1] if "layers.3." in name and "lora_B" in name]
    assert top and all(not torch.equal(moved[1][name], moved[2][name]) for name in top)


def test_only_the_adapter_moves_and_the_streams_alternate(raw_config: dict) -> None:
    summary, spy = run(raw_config, training={"max_steps": 5})
    kinds = [next(key for key in log if key.endswith("_loss")) for log in spy.logs[:5]]
    assert kinds == ["task_loss", "alignment_loss"] * 2 + ["task_loss"]
    assert all(not ({"loss", "grad_norm"} & log.keys()) for log in spy.logs)
    for log, kind in zip(spy.logs, kinds, strict=False):
        stream = kind.removesuffix("_loss")
        other = "alignment" if stream == "task" else "task"
        assert {f"{stream}_grad_norm", f"{stream}_tokens", f"{stream}_seconds"} <= log.keys()
        assert not any(key.startswith(other) for key in log)
    assert summary["streams"]["task"]["steps"] == 3 and summary["streams"]["alignment"]["steps"] == 2
    assert summary["streams"]["alignment"]["pairs"] == 16
    assert all("lora_" in name for name in spy.gradients[0])


def test_logged_means_are_over_the_streams_own_steps(raw_config: dict) -> None:
    _, fine = run(raw_config, training={"max_steps": 4, "logging_steps": 1})
    _, coarse = run(raw_config, training={"max_steps": 4, "logging_steps": 4})
    mean = (fine.logs[0]["task_loss"] + fine.logs[2]["task_loss"]) / 2
    assert coarse.logs[0]["task_loss"] == pytest.approx(mean, rel=1e-5)
    assert coarse.logs[0]["task_tokens"] == fine.logs[0]["task_tokens"] + fine.logs[2]["task_tokens"]


def test_epochs_count_task_rows_only(raw_config: dict) -> None:
    sections: dict[str, Any] = {"training": {"max_steps": -1, "num_train_epochs": 2}, "task": {"eval_share": 0.0}}
    for mode, ratio, steps in (("task_only", 1, 12), ("alternate", 1, 24), ("alternate", 2, 36), ("joint", 1, 12)):
        summary, _ = run(raw_config, schedule={"mode": mode, "ratio": float(ratio)}, **sections)
        assert summary["steps"] == steps and summary["streams"]["task"]["steps"] == 12


def test_a_resumed_run_is_the_run_that_was_not_stopped(raw_config: dict, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 4

    raw = copy.deepcopy(raw_config)
    raw["adapter"]["dropout"] = 0.2
    raw["training"] |= {"max_steps": 7, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    raw["training"]["logging_steps"] = 3  # not where checkpoints are: what was not logged yet must not be lost
    raw["training"]["output_dir"] = str(tmp_path / "whole")
    whole = train(config_from_dict(raw))
    raw["training"]["output_dir"] = str(tmp_path / "halves")
    train(config_from_dict(raw), callbacks=[Stop()])
    raw["training"]["resume_from_checkpoint"] = True
    resumed = train(config_from_dict(raw))
    assert resumed["steps"] == 7
    for stream in ("task", "alignment"):
        for key in ("steps", "loss_first", "loss_last", "tokens"):
            assert resumed["streams"][stream][key] == whole["streams"][stream][key], (stream, key)
    assert resumed["retrieval"] == whole["retrieval"]
    assert train(config_from_dict(raw))["steps"] == 7  # a finished run takes no further step
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "halves")]
    assert weights[0] == weights[1]


def test_evaluation_early_stopping_best_model_and_tensorboard(raw_config: dict, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    raw = copy.deepcopy(raw_config)
    raw["training"] |= {
        "max_steps": 40, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_task_loss", "greater_is_better": True,
        "report_to": "tensorboard", "learning_rate": 1e-3,
    }  # fmt: skip
    # With "greater is better", a falling loss is no improvement: it must stop after two evaluations without one.
    summary = train(config_from_dict(raw), callbacks=[EarlyStoppingCallback(early_stopping_patience=2)])
    assert summary["steps"] == 6
    out = Path(raw["training"]["output_dir"])
    history = json.loads((out / "checkpoint-6" / "trainer_state.json").read_text())
    assert history["best_global_step"] == 2
    assert {"eval_task_loss", "eval_alignment_loss", "eval_retrieval", "eval_loss"} <= summary["evaluation"].keys()
    assert summary["evaluation"]["eval_loss"] == summary["evaluation"]["eval_task_loss"]
    best = (out / "checkpoint-2" / "adapter_model.safetensors").read_bytes()
    assert (out / "adapter_model.safetensors").read_bytes() == best
    at_best = next(log for log in history["log_history"] if log["step"] == 2 and "eval_task_loss" in log)
    assert summary["evaluation"]["eval_task_loss"] == at_best["eval_task_loss"]
    logs = next(path for path in out.rglob("events.out.tfevents*"))
    events = EventAccumulator(str(logs.parent))
    events.Reload()
    assert {"train/task_loss", "train/alignment_loss", "eval/retrieval"} <= set(events.Tags()["scalars"])


def test_gradient_checkpointing_changes_nothing(raw_config: dict) -> None:
    _, plain = run(raw_config, training={"max_steps": 2})
    _, saved = run(raw_config, training={"max_steps": 2, "gradient_checkpointing": True})
    for one, other in zip(saved.gradients, plain.gradients, strict=True):
        assert_same(one, other)


def test_several_layers_weigh_as_told(raw_config: dict) -> None:
    gradients = []
    for layer, weights in ((1, None), (3, None), ([1, 3], [1.0, 3.0])):
        changes = {"layer": layer, "layer_weights": weights}
        _, spy = run(raw_config, alignment=changes, schedule={"mode": "align_only"}, training={"max_steps": 1})
        gradients.append(spy.gradients[0])
    low, high, both = gradients
    mixed = {name: 0.25 * low.get(name, 0.0) + 0.75 * gradient for name, gradient in high.items()}  # type: ignore[operator]
    assert len(low) < len(high)  # no block above the first is loaded
    assert_same(both, mixed, 1e-4)


def test_auto_find_batch_size_is_refused_with_a_reason(raw_config: dict) -> None:
    with pytest.raises(ConfigError, match="negatives"):
        run(raw_config, training={"auto_find_batch_size": True})


def test_nf4_base_trains(raw_config: dict) -> None:
    """The whole step on a 4-bit base, which bitsandbytes also runs on a CPU."""
    summary, spy = run(raw_config, model={"quantization": "nf4"}, training={"max_steps": 2})
    assert summary["streams"].keys() == {"task", "alignment"}
    assert all(torch.isfinite(g).all() for step in spy.gradients for g in step.values() if g is not None)
    assert any(g.any() for g in spy.gradients[1].values() if g is not None)
