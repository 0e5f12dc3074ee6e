"""The benchmark of an alignment step runs, says what its last line promises, and refuses wrong numbers."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from tests.benches import BENCHMARKS, run

TINY = "--layers=4 --hidden=64 --vocab=256 --pairs=4 --tokens=8 --rounds=2 --threads=1"
WAYS = ["ours", "all_layers", "reference", "no_head"]

# Runs it in one process with alignment_loss or hidden_at a little wrong, and once more with them as they are.
BREAK_IT = """
import sys
import bench_alignment_step as bench
loss, states = bench.alignment_loss, bench.hidden_at

def run(title):
    print(title, bench.main(sys.argv[1:]), file=sys.stderr)
    bench.alignment_loss, bench.hidden_at = loss, states

def wrong_gradient(*args, **kwargs):
    value = loss(*args, **kwargs)
    return value.detach() + 1.001 * (value - value.detach())

bench.alignment_loss = lambda *args, **kwargs: loss(*args, **kwargs) * 1.001
run("end of wrong loss:")
bench.alignment_loss = wrong_gradient
run("end of wrong gradient:")
bench.hidden_at = lambda model, layers, **inputs: states(model, [layers[0] + 1], **inputs)
run("end of wrong layer:")
run("end of nothing wrong:")
"""


def test_it_prints_ratios_and_appends_rows(tmp_path: Path):
    script, options = str(BENCHMARKS / "bench_alignment_step.py"), [*TINY.split(), f"--out={tmp_path}"]
    first = run(script, *options)
    assert first.returncode == 0, first.stderr
    *_, memory, time = first.stdout.splitlines()
    assert re.fullmatch(" ".join(rf"ratio_{way}=\d+\.\d\d" for way in WAYS[1:]), time)
    assert re.fullmatch(" ".join(rf"memory_{way}=\d+\.\d\d" for way in WAYS[1:]), memory)
    second = run(script, *options, "--json")
    rows = json.loads(second.stdout)  # JSON and nothing else

    (file,) = tmp_path.rglob("*.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        table = list(csv.DictReader(lines))
    assert [row["provider"] for row in table] == WAYS * 2
    assert table[4:] == [{key: str(value) for key, value in row.items()} for row in rows]
    for row in rows:
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert (row["layers"], row["layer"], row["rounds"]) == (4, 2, 2)
    # half the layers hold half the activations: the one difference that a tiny shape shows without noise
    peaks = {row["provider"]: row["peak_bytes"] for row in rows}
    assert 0 < peaks["ours"] < 0.7 * peaks["no_head"] < 0.7 * peaks["all_layers"]


def test_it_prints_no_speeds_of_something_else(tmp_path: Path):
    result = run("-c", BREAK_IT, *TINY.split(), f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    parts = re.split(r"end of (.*): (\d)\n", result.stderr)
    said = {title: (int(code), text) for text, title, code in zip(parts[0::3], parts[1::3], parts[2::3], strict=False)}
    assert {title: code for title, (code, _) in said.items()} == {
        "wrong loss": 1,
        "wrong gradient": 1,
        "wrong layer": 1,
        "nothing wrong": 0,
    }
    for title, loss_is_off in ("wrong loss", True), ("wrong gradient", False), ("wrong layer", True):
        text = said[title][1]
        assert "ours: " in text and "reference:" not in text and "no_head:" not in text, text
        assert ("ours: loss is off" in text) == loss_is_off
    assert result.stdout.count("ratio_") == 3  # only the last one printed
    (file,) = tmp_path.rglob("*.csv")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 1 + 4
