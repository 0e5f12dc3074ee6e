"""The benchmark of cached gradients runs, says what its last line promises, and refuses wrong numbers."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

from tests.benches import BENCHMARKS, run

TINY = "--layers=4 --hidden=64 --vocab=256 --pairs 8 32 --micro=4 --tokens=8 --timed=32 --rounds=2 --threads=1"

# Once with the second forward a little off, once with the negatives of a micro-batch alone, once as it is.
BREAK_IT = """
import sys
import bench_cached_negatives as bench
from fastalign.streams.gradient_cache import GradientCache
loss, begin = GradientCache.loss, bench.AlignmentStream.begin_step

GradientCache.loss = lambda *arguments: loss(*arguments) * 1.001
print("wrong gradient:", bench.main(sys.argv[1:]), file=sys.stderr)
GradientCache.loss = loss
bench.AlignmentStream.begin_step = lambda *arguments: None
print("no cache:", bench.main(sys.argv[1:]), file=sys.stderr)
bench.AlignmentStream.begin_step = begin
print("nothing wrong:", bench.main(sys.argv[1:]), file=sys.stderr)
"""


def test_memory_hardly_grows_with_the_negatives(tmp_path: Path):
    result = run(str(BENCHMARKS / "bench_cached_negatives.py"), *TINY.split(), f"--out={tmp_path}", "--json")
    assert result.returncode == 0, result.stderr
    rows = {(row["provider"], row["pairs"]): row for row in json.loads(result.stdout)}
    peaks = {way: row["peak_bytes"] for way, row in rows.items()}
    assert 0 < peaks["cached", 32] < 1.1 * peaks["cached", 8]
    assert peaks["plain", 8] > 1.5 * peaks["cached", 8]
    assert peaks["checkpointed", 32] > 3 * peaks["checkpointed", 8]
    assert rows["cached", 32]["time_ratio"] > 0 and rows["cached", 8]["median_ms"] is None
    (file,) = tmp_path.rglob("*.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        assert [row["provider"] for row in csv.DictReader(lines)] == [way for way, _ in rows]


def test_it_prints_no_numbers_of_something_else(tmp_path: Path):
    result = run("-c", BREAK_IT, *TINY.split(), f"--out={tmp_path}")
    assert result.returncode == 0, result.stderr
    codes = dict(re.findall(r"^(wrong gradient|no cache|nothing wrong): (\d)$", result.stderr, re.MULTILINE))
    assert codes == {"wrong gradient": "1", "no cache": "1", "nothing wrong": "0"}
    assert re.findall(r"^memory_32_8=\d\.\d{3} time_checkpointed=\d+\.\d{3}$", result.stdout, re.MULTILINE)
    assert result.stdout.count("memory_") == 1
