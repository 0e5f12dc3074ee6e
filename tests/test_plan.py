"""The plan of a run is refused, or said, before its first step, and the summary says what was done."""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

from fastalign.config import config_from_dict
from fastalign.errors import ConfigError
from fastalign.training.run import train
from fastalign.training.schedule import Schedule


@pytest.mark.parametrize("mode", ["alternate", "joint", "task_only", "align_only"])
@pytest.mark.parametrize("ratio", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("steps", [0, 1, 2, 7, 40])
def test_counts_are_those_of_the_schedule(mode: Any, ratio: float, steps: int) -> None:
    schedule = Schedule(mode, ratio)
    run = [name for step in range(steps) for name, _ in schedule.at(step)]
    assert schedule.counts(steps) == {name: run.count(name) for name in schedule.streams}


@pytest.mark.parametrize(
    ("schedule", "training"),
    [
        ({"ratio": 0.01}, {"max_steps": 50}),
        ({"ratio": 0.01}, {"max_steps": -1, "num_train_epochs": 3}),
        ({}, {"max_steps": 1}),
    ],
)
def test_a_schedule_that_never_reaches_a_stream_is_refused(schedule: dict, training: dict, raw_config: dict) -> None:
    raw = copy.deepcopy(raw_config)
    raw["schedule"], raw["training"] = schedule, {**raw["training"], **training}
    with pytest.raises(ConfigError, match=r"none of the \d+ steps is one of the alignment stream .*schedule.ratio"):
        train(config_from_dict(raw))
    assert not Path(raw["training"]["output_dir"]).exists()


def test_the_plan_is_said_before_the_first_step(
    raw_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"de": f"satz {i}", "en": f"sentence {i}"} for i in range(6)] + [{"fr": "seul", "en": "alone"}]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "held.jsonl").write_text('{"it": "una", "en": "one"}\n{"de": "zwei", "en": "two"}\n', encoding="utf-8")
    raw = copy.deepcopy(raw_config)
    raw["alignment"] |= {"data": str(tmp_path / "few.jsonl"), "eval_data": str(tmp_path / "held.jsonl")}
    raw["task"]["eval_share"] = 0.0
    summary = train(config_from_dict(raw))
    said = capsys.readouterr().err
    assert "task: 24 rows (en 24), 0 held out; 2 steps of 4 rows: 0.33 passes" in said
    assert "alignment: 7 pairs (de 6, fr 1), 2 held out; 2 steps of 8 pairs: 2.3 passes" in said
    assert "alignment: a step takes 8 pairs but there are 7, so they repeat" in said
    assert "alignment: no pairs to train on in it, only held-out ones" in said
    assert said.index("task: 24 rows") < said.index("no pairs to train on")
    assert summary["plan"]["alignment"] == {
        "rows": 7,
        "languages": {"de": 6, "fr": 1},
        "held_out": 2,
        "steps": 2,
        "rows_per_step": 8,
        "micro_batch_size": 8,
        "passes": pytest.approx(16 / 7),
    }


def test_the_summary_records_what_was_run(raw_config: dict, data_dir: Path, tmp_path: Path) -> None:
    raw = copy.deepcopy(raw_config)
    raw["training"] |= {"seed": 5, "save_strategy": "steps", "save_steps": 2}
    first = train(config_from_dict(raw))
    assert first["resumed_at"] == [] and first["seed"] == 5 and first["ranks"] == 1
    assert first["versions"]["torch"] == importlib.metadata.version("torch")
    assert first["versions"]["fastalign"] == importlib.metadata.version("fastalign")
    assert first["kernels"]["backend"] == "torch" and first["device"].startswith("CPU")
    assert first["model"]["type"] == "llama" and 0 < first["model"]["trainable"] < first["model"]["parameters"]
    for key, name, rows in (("task.data", "task", 24), ("alignment.data", "pairs", 60)):
        path = data_dir / f"{name}.jsonl"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert first["data"]["files"][key] == [{"name": str(path), "sha256": digest, "rows": rows}]
    assert {name: row["steps"] for name, row in first["plan"].items()} == {"task": 2, "alignment": 2}

    raw["training"] |= {"max_steps": 6, "resume_from_checkpoint": True}
    again = train(config_from_dict(raw))
    assert again["resumed_at"] == [4] and again["steps"] == 6
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == again


def test_held_out_rows_that_are_trained_on_or_left_out_are_said(
    raw_config: dict, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"prompt": f"question {i}", "response": "yes"} for i in range(600)]
    held_out = tmp_path / "held.jsonl"
    trained_on = (data_dir / "task.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:3]
    held_out.write_text("".join([*trained_on, *(json.dumps(row) + "\n" for row in rows)]), encoding="utf-8")
    raw = copy.deepcopy(raw_config)
    raw["task"] |= {"eval_data": str(held_out)}
    raw["alignment"] |= {"eval_data": str(data_dir / "pairs.jsonl")}
    train(config_from_dict(raw))
    said = capsys.readouterr().err
    assert "task.eval_data: 3 of 603 held-out rows are also trained on" in said
    assert "task.eval_data: the loss is measured on 500 of 603 rows" in said
    assert "alignment.eval_data: 120 of 120 held-out rows are also trained on" in said
