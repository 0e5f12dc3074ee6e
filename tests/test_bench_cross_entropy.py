"""The benchmark of the task's loss runs, says what its last line promises, and refuses wrong numbers."""

from __future__ import annotations

import csv
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--shapes", "24,8,600", "40,16,800", "--memory=0.05MB", "--rounds=2", "--seconds=0"]
WAYS = ["ours", "whole", "labels", *(["linear"] if hasattr(torch.nn.functional, "linear_cross_entropy") else [])]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return importlib.import_module("bench_cross_entropy")


def test_it_prints_ratios_and_appends_rows(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([*TINY, f"--out={tmp_path}"]) == 0
    *_, memory, time = capsys.readouterr().out.splitlines()
    assert re.fullmatch(" ".join(rf"ratio_{way}=\d+\.\d\d" for way in WAYS[1:]), time)
    assert re.fullmatch(" ".join(rf"memory_{way}=\d+\.\d\d" for way in WAYS[1:]), memory)
    assert bench.main([*TINY, f"--out={tmp_path}", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)  # JSON and nothing else
    (file,) = tmp_path.rglob("*.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        table = list(csv.DictReader(lines))
    assert [row["provider"] for row in table] == WAYS * 4
    assert table[len(WAYS) * 2 :] == [{key: str(value) for key, value in row.items()} for row in rows]
    peaks = {row["provider"]: row["peak_bytes"] for row in rows if row["case"] == "40,16,800"}
    assert 50_000 * 0.5 < peaks["ours"] < 50_000 * 1.5 < peaks["labels"] < peaks["whole"]
    for row in rows:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_it_prints_no_speeds_of_something_else(
    wrong: str, bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = bench.Case.ours

    def broken(self: Any) -> torch.Tensor:
        value = ours(self)
        return value * 1.001 if wrong == "loss" else value.detach() + 1.001 * (value - value.detach())

    monkeypatch.setattr(bench.Case, "ours", broken)
    assert bench.main([*TINY, f"--out={tmp_path}"]) == 1
    said = capsys.readouterr()
    assert f"ours: {wrong} is off" in said.err and "whole:" not in said.err and "ratio_" not in said.out
    assert not list(tmp_path.rglob("*.csv"))
