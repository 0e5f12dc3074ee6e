"""A resumed run is the run that was stopped: other settings or data are refused, what changes nothing may differ."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from fastalign.config import config_from_dict
from fastalign.errors import ConfigError, RunError
from fastalign.streams.alignment import AlignmentStream
from fastalign.training.resume import require_same_run, run_record
from fastalign.training.run import train
from fastalign.training.trainer import AlignTrainer


class Stop(TrainerCallback):
    """After step 4, as by a kill: without the final results."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 4


@pytest.fixture(scope="module")
def stopped(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The configuration of a run that was stopped at step 4 of 8."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(model_dir, folder / "model")
    for name in ("task", "pairs"):
        shutil.copy(data_dir / f"{name}.jsonl", folder / f"{name}.jsonl")
    raw = {
        "model": {"name_or_path": str(folder / "model")},
        "adapter": {"r": 4, "dropout": 0.1},
        "task": {"data": str(folder / "task.jsonl"), "eval_share": 0.2},
        "alignment": {"data": [str(folder / "pairs.jsonl")], "batch_size": 8, "eval_share": 0.2},
        "training": {
            "output_dir": str(folder / "out"), "max_steps": 8, "save_steps": 4, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "eval_strategy": "no", "use_cpu": True,
        },
    }  # fmt: skip
    train(config_from_dict(raw), callbacks=[Stop()])
    return raw


@pytest.fixture
def raw(stopped: dict, tmp_path: Path) -> dict:
    """The same in folders of its own, asked to go on."""
    old = Path(stopped["training"]["output_dir"]).parent
    shutil.copytree(old, tmp_path / "run")
    moved = json.loads(json.dumps(stopped).replace(str(old), str(tmp_path / "run")))
    moved["training"]["resume_from_checkpoint"] = True
    return moved


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("training", "learning_rate", 1e-3, "training.learning_rate was 0.01, now 0.001"),
        ("training", "seed", 7, "training.seed was 42, now 7"),
        ("training", "weight_decay", 0.1, "training.weight_decay"),
        ("training", "lr_scheduler_type", "linear", "training.lr_scheduler_type"),
        ("training", "per_device_train_batch_size", 2, "rows of the task in a step was 4, now 2"),
        ("adapter", "r", 8, "adapter.r was 4, now 8"),
        ("adapter", "dropout", 0.0, "adapter.dropout"),
        ("schedule", "ratio", 2.0, "schedule.ratio was 1.0, now 2.0"),
        ("alignment", "batch_size", 16, "alignment.batch_size"),
        ("alignment", "layer", 1, "alignment.layer"),
        ("alignment", "eval_share", 0.1, "alignment.eval_share"),
        ("task", "max_length", 64, "task.max_length"),
        ("model", "dtype", "bfloat16", "model.dtype"),
    ],
)
def test_a_setting_that_decides_what_is_learnt_is_refused(
    section: str, key: str, value: Any, said: str, raw: dict
) -> None:
    raw.setdefault(section, {})[key] = value
    with pytest.raises(ConfigError, match=f"made with other settings.*{said}"):
        train(config_from_dict(raw))
    assert not (Path(raw["training"]["output_dir"]) / ".saving").exists()


@pytest.mark.parametrize("name", ["task", "pairs"])
def test_other_data_under_the_same_name_are_refused(name: str, raw: dict, tmp_path: Path) -> None:
    path = tmp_path / "run" / f"{name}.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("alarm", "alert", 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"content of (task|alignment)\.data"):
        train(config_from_dict(raw))


def test_three_differences_are_named_and_the_others_counted(raw: dict) -> None:
    raw["training"] |= {"seed": 1, "weight_decay": 0.1, "learning_rate": 1.0, "adam_beta1": 0.5, "max_grad_norm": 3.0}
    with pytest.raises(ConfigError, match="and 2 more"):
        train(config_from_dict(raw))


def test_what_changes_nothing_may_differ_and_the_end_is_the_same(stopped: dict, raw: dict, tmp_path: Path) -> None:
    """Moved files, other micro-batches, more evaluation and another rhythm of logs and checkpoints."""
    whole = copy.deepcopy(stopped)
    whole["training"]["output_dir"] = str(tmp_path / "whole")
    whole["adapter"]["dropout"] = raw["adapter"]["dropout"]
    expected = train(config_from_dict(whole))
    (tmp_path / "run" / "pairs.jsonl").rename(tmp_path / "run" / "renamed.jsonl")
    raw["alignment"] |= {"data": str(tmp_path / "run" / "renamed.jsonl"), "eval_pairs": 5}
    raw["training"] |= {"logging_steps": 3, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 3}
    found = train(config_from_dict(raw))
    for stream in ("task", "alignment"):
        assert found["streams"][stream]["loss_last"] == expected["streams"][stream]["loss_last"]
    results = [tmp_path / name / "adapter_model.safetensors" for name in ("whole", "run/out")]
    assert results[0].read_bytes() == results[1].read_bytes()


def test_after_out_of_memory_smaller_micro_batches_go_on(stopped: dict, raw: dict, tmp_path: Path) -> None:
    """The same steps up to rounding, here without dropout, which draws by forward."""
    results = []
    for name, training, alignment in (
        ("a", {}, {}),
        ("b", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {"micro_batch_size": 2}),
    ):
        begun = copy.deepcopy(stopped)
        begun["adapter"]["dropout"] = 0.0
        begun["training"] |= {"output_dir": str(tmp_path / name), "optim": "sgd", "learning_rate": 0.5}
        train(config_from_dict(begun), callbacks=[Stop()])
        begun["training"] |= {**training, "resume_from_checkpoint": True, "gradient_checkpointing": name == "b"}
        begun["alignment"] |= alignment
        assert train(config_from_dict(begun))["steps"] == 8
        results.append(load_file(tmp_path / name / "adapter_model.safetensors"))
    moved = max(float(tensor.abs().max()) for name, tensor in results[0].items() if "lora_B" in name)
    for name, tensor in results[0].items():
        assert float((tensor - results[1][name]).abs().max()) < 1e-5 * moved, name


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("max_grad_norm", 1.0),
        ("seed", 42),
        ("bf16", False),
        ("fp16", False),
        ("weight_decay", 0.0),
        ("adam_beta1", 0.9),
    ],
)
def test_a_default_that_is_spelled_out_is_no_difference(key: str, default: Any, raw: dict) -> None:
    raw["training"][key] = default
    assert train(config_from_dict(raw))["resumed_at"] == [4]


def test_logs_evaluations_and_checkpoints_come_as_they_are_asked_for_now(raw: dict, tmp_path: Path) -> None:
    raw["training"] |= {"max_steps": 12, "save_steps": 3, "logging_steps": 5, "eval_strategy": "steps", "eval_steps": 4}
    train(config_from_dict(raw))
    state = json.loads((tmp_path / "run" / "out" / "checkpoint-12" / "trainer_state.json").read_text())
    log = [entry for entry in state["log_history"] if entry["step"] > 4]
    assert [entry["step"] for entry in log if "eval_task_loss" in entry] == [8, 12]
    assert [entry["step"] for entry in log if "learning_rate" in entry] == [5, 10]
    assert {path.name for path in (tmp_path / "run" / "out").glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}


def test_from_an_older_checkpoint_only_where_the_newer_ones_may_go(raw: dict, tmp_path: Path) -> None:
    out = tmp_path / "run" / "out"
    raw["training"] |= {"save_steps": 2, "save_total_limit": 9}
    train(config_from_dict(raw))
    raw["training"]["resume_from_checkpoint"] = str(out / "checkpoint-6")
    with pytest.raises(ConfigError, match=r"not the newest; .* --overwrite, which removes checkpoint-8"):
        train(config_from_dict(raw))
    assert (out / "checkpoint-8").is_dir() and (out / "summary.json").exists()
    raw["training"]["max_steps"] = 7
    assert train(config_from_dict(raw), overwrite=True)["steps"] == 7
    assert {path.name for path in out.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (4, 6, 7)}


def test_the_settings_of_deepspeed_count_by_their_content(tmp_path: Path) -> None:
    records = []
    for name, stage in (("a.json", 1), ("b.json", 1), ("b.json", 2)):
        (tmp_path / name).write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        config = config_from_dict({"training": {"deepspeed": str(tmp_path / name)}})
        records.append(run_record(config, {}, 1))
    (tmp_path / "run.json").write_text(json.dumps(records[0]))
    assert require_same_run(tmp_path, records[1]) == []
    with pytest.raises(ConfigError, match=r"training\.deepspeed\.zero_optimization\.stage was 1, now 2"):
        require_same_run(tmp_path, records[2])


def test_another_number_of_ranks_is_refused_with_both(tmp_path: Path) -> None:
    config = config_from_dict({"training": {"deepspeed": "zero3"}})
    (tmp_path / "run.json").write_text(json.dumps(run_record(config, {}, 2)))
    assert require_same_run(tmp_path, run_record(config, {}, 2)) == []
    with pytest.raises(ConfigError, match=r"ranks was 2, now 4") as caught:
        require_same_run(tmp_path, run_record(config, {}, 4))
    assert "set them back, or start a new run" in str(caught.value)


def test_a_finished_run_in_a_moved_folder_keeps_its_best_adapter(raw: dict, tmp_path: Path) -> None:
    best = {
        "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True,
        "metric_for_best_model": "eval_task_loss", "greater_is_better": True, "save_total_limit": 9,
    }  # fmt: skip
    raw["training"] |= best
    train(config_from_dict(raw))
    saved = (tmp_path / "run" / "out" / "adapter_model.safetensors").read_bytes()
    (tmp_path / "run" / "out").rename(tmp_path / "elsewhere")
    raw["training"]["output_dir"] = str(tmp_path / "elsewhere")
    summary = train(config_from_dict(raw))
    assert (tmp_path / "elsewhere" / "adapter_model.safetensors").read_bytes() == saved
    assert saved != (tmp_path / "elsewhere" / "checkpoint-8" / "adapter_model.safetensors").read_bytes()
    assert summary["steps"] == 8


def test_early_stopping_is_continued_where_it_is_asked_for(raw_config: dict, tmp_path: Path) -> None:
    class Cut(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 6

    raw = copy.deepcopy(raw_config)
    raw["training"] |= {
        "max_steps": 40, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_task_loss", "greater_is_better": True,
        "learning_rate": 1e-3, "restore_callback_states_from_checkpoint": True,
    }  # fmt: skip
    patience = [EarlyStoppingCallback(early_stopping_patience=4) for _ in range(3)]
    whole = train(config_from_dict(raw), callbacks=patience[:1])
    assert 8 < whole["steps"] < 40
    raw["training"]["output_dir"] = str(tmp_path / "halves")
    train(config_from_dict(raw), callbacks=[patience[1], Cut()])
    raw["training"]["resume_from_checkpoint"] = True
    resumed = train(config_from_dict(raw), callbacks=patience[2:])
    assert resumed["steps"] == whole["steps"] and resumed["resumed_at"] == [6]
    for stream in ("task", "alignment"):
        assert resumed["streams"][stream]["loss_first"] == whole["streams"][stream]["loss_first"]


def test_a_trainer_that_was_stopped_can_be_asked_again(raw_config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: nothing of the step that broke is left."""
    trainers: list[Any] = []

    plain = AlignTrainer.train
    monkeypatch.setattr(AlignTrainer, "train", lambda self, *a, **k: (trainers.append(self), plain(self, *a, **k))[1])
    loss = AlignmentStream.loss

    def burst(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(AlignmentStream, "loss", burst)
        with pytest.raises(RunError):
            train(config_from_dict(raw_config))
    assert AlignmentStream.loss is loss
    trainers[0].train()
    assert {name: len(losses) for name, losses in trainers[0].meter.losses.items()} == {"task": 2, "alignment": 2}


def test_a_longer_run_is_said(raw: dict, capsys: pytest.CaptureFixture) -> None:
    raw["training"]["max_steps"] = 10
    assert train(config_from_dict(raw))["steps"] == 10
    assert "training.max_steps was 8 when the run began, and is 10 now" in capsys.readouterr().err


def test_a_checkpoint_that_does_not_say_is_taken_with_a_word(
    raw: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    record = tmp_path / "run" / "out" / "checkpoint-4" / "run.json"
    record.unlink()
    assert train(config_from_dict(raw))["steps"] == 8
    assert "settings and data are not compared" in capsys.readouterr().err
    for text in (
        "[]",
        "{}",
        '{"config": null, "data": {}, "ranks": 1}',
        '{"config": {"task": 3}, "data": {}, "ranks": 1}',
    ):
        record.write_text(text)
        with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
            require_same_run(record.parent, {"config": {}, "data": {}, "ranks": 1})


def test_a_key_that_has_come_since_is_taken_as_its_default(raw: dict, tmp_path: Path) -> None:
    record = tmp_path / "run" / "out" / "checkpoint-4" / "run.json"
    saved = json.loads(record.read_text())
    del saved["config"]["alignment"]["detach"]
    record.write_text(json.dumps(saved))
    assert train(config_from_dict(raw))["resumed_at"] == [4]
