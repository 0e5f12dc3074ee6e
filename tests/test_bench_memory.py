"""The benchmark of memory on a 4-bit base runs, says what its last line promises, and refuses wrong numbers."""

from __future__ import annotations

import csv
import re
from pathlib import Path

from tests.benches import run

TINY = "--layers=4 --layer=2 --hidden=64 --inner=176 --heads=2 --keys=1 --vocab=4000 --width=8 --task-width=16 "
TINY += "--tokens-alignment 64 512 --tokens-task 256 --rounds=1 --threads=1"

# Once with the objective a little wrong, and once as it is, in one process.
BREAK_IT = """
import sys
import bench_memory as bench
loss = bench.AlignmentStream.loss

bench.AlignmentStream.loss = lambda *arguments: loss(*arguments) * 1.01
print("wrong loss:", bench.main(sys.argv[1:]), file=sys.stderr)
bench.AlignmentStream.loss = loss
print("nothing wrong:", bench.main(sys.argv[1:]), file=sys.stderr)
"""


def test_it_compares_ways_and_prints_nothing_of_something_else(tmp_path: Path):
    result = run("-c", BREAK_IT, *TINY.split(), f"--out={tmp_path}", timeout=240)
    assert result.returncode == 0, result.stderr
    codes = dict(re.findall(r"^(wrong loss|nothing wrong): (\d)$", result.stderr, re.MULTILINE))
    assert codes == {"wrong loss": "1", "nothing wrong": "0"}
    assert "no numbers" in result.stderr and result.stdout.count("memory_reference=") == 1
    last = result.stdout.splitlines()[-1]
    assert re.fullmatch(r"memory_reference=\d\.\d\d memory_prepared=\d\.\d\d predicted=\d\.\d{3}", last)
    assert "target: predictions within 10%" in result.stdout
    (file,) = tmp_path.rglob("*.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["provider"] for row in rows] == ["ours"] * 3 + ["reference"] * 2 + ["prepared"] * 3
    totals = {(row["provider"], row["stream"], row["tokens"]): int(row["total_bytes"]) for row in rows}
    assert totals["ours", "alignment", "512"] < 0.9 * totals["prepared", "alignment", "512"]
    for row in rows[:2]:
        assert 0.8 < float(row["predicted_ratio"]) < 1.25  # a tiny model; the default one is within 10%
