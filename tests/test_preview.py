"""A dry run shows what the run would do, with the run's own batches, and leaves nothing behind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

import fastalign.training.run as run
from fastalign.cli import main
from fastalign.config import config_from_dict, save_config
from fastalign.training.preview import dry_run
from fastalign.training.run import train


def command(raw: dict[str, Any], folder: Path, *options: str) -> list[str]:
    folder.mkdir(exist_ok=True)
    save_config(config_from_dict(raw), folder / "config.yaml")
    return ["train", str(folder / "config.yaml"), "--dry-run", *options]


def test_it_says_what_the_run_then_does(raw_config: dict, model_dir: Path) -> None:
    """Against the summary of the run itself."""
    config = config_from_dict(raw_config)
    found = dry_run(config)
    assert not config.output_dir.exists()
    summary = train(config)
    for name in ("plan", "data", "layer"):
        assert found[name] == summary[name]
    assert found["steps"] == summary["steps"]
    assert found["trainable"] == summary["model"]["trainable"]
    weights = summary["model"]["parameters"] - summary["model"]["trainable"]
    assert sum(found["memory"]["items"][name] for name in ("base", "embedding", "head")) == 4 * weights
    assert found["seconds"] > 0 and found["memory"]["peak"] > 4 * weights


def test_the_examples_mark_what_is_learnt_and_what_is_pooled(raw_config: dict, data_dir: Path) -> None:
    found = dry_run(config_from_dict(raw_config))
    task = [json.loads(line) for line in (data_dir / "task.jsonl").read_text().splitlines()]
    examples = found["streams"]["task"]["examples"]
    assert len(examples) == 3
    for example in examples:
        row = task[int(example["where"].rpartition("line ")[2]) - 1]
        assert example["language"] == "en"
        assert [marked for _, marked in example["parts"]] == [False, True]
        assert example["parts"][0][0] == f"<s>{row['prompt']}\n"
        assert example["parts"][1][0] == f"{row['response']}</s>"
    pairs = [json.loads(line) for line in (data_dir / "pairs.jsonl").read_text().splitlines()]
    for example in found["streams"]["alignment"]["examples"]:
        row = pairs[int(example["where"].rpartition("line ")[2]) - 1]
        pooled = [text for text, marked in example["parts"] if marked]
        assert pooled == [row[example["language"]], row["en"]]
        assert [text for text, marked in example["parts"] if not marked] == ["<s>", "  =  ", "<s>"]


def test_token_counts(raw_config: dict, tmp_path: Path) -> None:
    """Every answer has one token more than the one before; the last is cut at max_length."""
    rows = [{"prompt": "set", "response": "".join("\u00e9" * i), "lang": "en"} for i in range(1, 41)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    raw = copy.deepcopy(raw_config)
    raw["task"] = {"data": str(tmp_path / "task.jsonl"), "eval_share": 0.0, "max_length": 43}
    raw["schedule"] = {"mode": "task_only"}
    raw["training"]["max_steps"] = 10
    found = dry_run(config_from_dict(raw))
    assert [*found["streams"]] == ["task"]
    tokens = found["streams"]["task"]["tokens"]
    assert [tokens["0.5"], tokens["0.9"], tokens["0.99"], tokens["1.0"]] == [25, 41, 43, 43]
    assert any("longer than 43 tokens" in line for line in found["lines"])


def test_the_command_writes_nothing_and_loads_no_weights(
    raw_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "load_model", lambda *_: pytest.fail("weights were loaded"))
    out = Path(raw_config["training"]["output_dir"])
    assert main(command(raw_config, tmp_path / "c")) == 0
    told = capsys.readouterr().out
    assert not out.exists()
    for words in ("aligned at layer 2 of 4", "task: 18 rows", "⟦what is learnt⟧", "99%", "trainable", "memory", "time"):
        assert words in told
    assert main(command(raw_config, tmp_path / "c", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4


def test_a_folder_that_is_not_free_is_said_and_left_alone(
    raw_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = Path(raw_config["training"]["output_dir"])
    out.mkdir()
    (out / "summary.json").write_text("{}")
    assert main(command(raw_config, tmp_path / "c")) == 2
    assert "but `train` would stop here: " in capsys.readouterr().out
    assert main(command(raw_config, tmp_path / "c", "--overwrite")) == 0
    assert "would stop here" not in capsys.readouterr().out
    assert (out / "summary.json").read_text() == "{}"


def test_what_train_refuses_a_dry_run_refuses(raw_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    raw = copy.deepcopy(raw_config)
    raw["alignment"]["layer"] = 9
    assert main(command(raw, tmp_path / "c")) == 2
    assert "alignment.layer: 9 is outside 1..4" in capsys.readouterr().err


def test_a_stream_that_is_read_several_times_over(raw_config: dict, data_dir: Path) -> None:
    """It forgets its first rows while the later ones are measured."""
    raw = copy.deepcopy(raw_config)
    raw["task"] = {"data": {"path": str(data_dir / "task.jsonl"), "streaming": True}}
    raw["training"]["max_steps"] = 400
    look = dry_run(config_from_dict(raw))["streams"]["task"]
    assert len(look["examples"]) == 3 and all(len(example["parts"]) == 2 for example in look["examples"])


def test_rows_are_counted_once(raw_config: dict) -> None:
    raw = copy.deepcopy(raw_config)
    raw["training"]["max_steps"] = 400
    found = dry_run(config_from_dict(raw))
    assert found["streams"]["task"]["rows_measured"] <= found["plan"]["task"]["rows"]


def test_a_checkpoint_that_is_not_there(raw_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = command(raw_config, tmp_path / "c", "training.resume_from_checkpoint=/no/checkpoint")
    assert main(arguments) == 2
    assert "would stop here: training.resume_from_checkpoint: '/no/checkpoint'" in capsys.readouterr().out
