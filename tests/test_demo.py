"""The demo runs from end to end, in small, and its table and page say what was measured and no more."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalign.demo as demo_room
from fastalign.cli import main
from fastalign.data import demo_corpus
from fastalign.demo import pretraining, scoring
from fastalign.demo.page import table, write_page


@pytest.fixture
def in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything real, of few steps and rows; no number of it means anything."""
    monkeypatch.setattr(pretraining, "SENTENCES", 40)
    monkeypatch.setattr(pretraining, "STEPS", 4)
    monkeypatch.setattr(demo_room, "TASK_STEPS", 3)
    monkeypatch.setattr(scoring, "ROWS", 6)


def test_from_end_to_end(in_small: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), "--seeds", "3", "--control", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {**json.loads((out / "demo.json").read_text()), "out": str(out)} == result
    [run] = result["runs"]
    assert run["seed"] == 3 and [*run["arms"]] == [*demo_room.ARMS]
    updates = []
    for arm, scores in run["arms"].items():
        summary = json.loads((out / arm / "summary.json").read_text())
        assert (out / arm / "adapter_model.safetensors").exists()
        assert scores["retrieval"] == summary["retrieval"]
        assert set(scores["intent_accuracy"]) == set(demo_corpus.LANGUAGES)
        updates.append(summary["streams"]["task"]["steps"])
    assert updates == [3, 3, 3]
    with (out / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["arm"] for row in rows if row["name"] == "task_loss"} == {*demo_room.ARMS}
    assert {row["arm"] for row in rows if row["name"] == "alignment_loss"} == {"aligned", "shuffled"}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3 and "shuffled pairs" in page
    assert (out / "intents.png").stat().st_size > 5_000

    assert main(["demo", "--out", str(out)]) == 2
    assert "demo.json" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "x"), "--seeds", "2", "2"]) == 2
    assert "--seeds" in capsys.readouterr().err


def test_shuffled_pairs_are_the_same_sentences_and_no_translations(tmp_path: Path) -> None:
    files = demo_corpus.write(tmp_path, seed=0, train=1, test=1, parallel=300, text=1)
    mixed = demo_room._shuffled(files["parallel"], 0)
    before, after = (
        [json.loads(line) for line in path.read_text().splitlines()] for path in (files["parallel"], mixed)
    )
    for language in demo_corpus.LANGUAGES:
        assert sorted(row[language] for row in before) == sorted(row[language] for row in after)
    together = {(row["en"], row["de"]) for row in before}
    assert sum((row["en"], row["de"]) in together for row in after) < 10


def result(plain: dict[str, list[float]], aligned: dict[str, list[float]]) -> dict[str, Any]:
    """Of the demo, with these intent accuracies of the seeds."""

    def arm(scores: dict[str, list[float]], i: int, after: float) -> dict[str, Any]:
        retrieval = {"before": {"languages": {"de": 0.1}}, "after": {"languages": {"de": after}}}
        return {"retrieval": retrieval, "intent_accuracy": {language: values[i] for language, values in scores.items()}}

    runs = [
        {"seed": i, "arms": {"task_only": arm(plain, i, 0.2), "aligned": arm(aligned, i, 0.9)}}
        for i in range(len(plain["en"]))
    ]
    languages = [*plain]
    seeds = [run["seed"] for run in runs]
    return {
        "seeds": seeds,
        "layer": 3,
        "languages": languages,
        "runs": runs,
        "versions": {"torch": "1"},
        "seconds": 1.0,
    }


def test_the_table_says_where_alignment_does_not_help() -> None:
    told = table(result({"en": [0.9], "de": [0.3], "hi": [0.2]}, {"en": [0.8], "de": [0.5], "hi": [0.2]}))
    assert "No better with alignment here: hi." in told
    assert [line.split() for line in told.splitlines() if line.startswith("de")] == [
        ["de", "10", "20", "90", "30", "50"]
    ]
    assert "No better" not in table(result({"en": [0.9], "de": [0.3]}, {"en": [0.8], "de": [0.5]}))


def test_several_seeds_show_mean_and_spread(tmp_path: Path) -> None:
    found = result({"en": [0.9, 0.7], "de": [0.3, 0.3]}, {"en": [0.8, 0.8], "de": [0.4, 0.6]})
    assert [line.split() for line in table(found).splitlines() if line.startswith("en")] == [
        ["en", "-", "-", "-", "80", "±", "10", "80", "±", "0"]
    ]
    curves = [
        {"seed": seed, "arm": arm, "step": step, "name": name, "value": 1.0 / step}
        for seed in (0, 1)
        for arm in ("task_only", "aligned")
        for name in ("task_loss", "alignment_loss")
        for step in (1, 2)
    ]
    write_page(tmp_path, found, curves)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "± 10" in page and page.count("<svg") == 3


def test_the_score_finds_the_intent_that_the_model_thinks_likely(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the model's opinion replaced by a rule: right in German only."""
    files = demo_corpus.write(tmp_path, train=1, test=30, parallel=2, text=1)

    def likelihood(model: Any, tokenizer: Any, examples: Any, answer: str) -> torch.Tensor:
        right = [scoring._intent(e) == answer if e.language == "de" else answer == "intent: never" for e in examples]
        return torch.tensor(right, dtype=torch.float32)

    monkeypatch.setattr(scoring, "_log_likelihood", likelihood)
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda model, path: model)
    scores = scoring.intent_accuracy(model_dir, tmp_path, files["task.test"])
    assert scores["de"] == 1.0
    assert all(score < 0.5 for language, score in scores.items() if language != "de")
