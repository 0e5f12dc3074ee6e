"""The benchmark of several ranks runs, its formulas are what is counted, and it refuses wrong numbers."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.benches import BENCHMARKS, run

# One launch, whose results are then looked at as they are and with something wrong in them.
BREAK_IT = """
import copy, shutil, sys
from pathlib import Path
import bench_ranks as bench
from safetensors.torch import load_file, save_file
kept, *options = sys.argv[1:]
launch, formula, count, seen = bench.launch, bench.expected, bench.torch.cuda.device_count, []

def run(title, found=lambda found: None, adapter=lambda tensors: None):
    def again(wanted, options, folder):
        if not seen:
            seen.append(launch(wanted, options, folder))
            shutil.copytree(folder / "out", kept)
        shutil.copytree(kept, folder / "out", dirs_exist_ok=True)
        result, last = copy.deepcopy(seen[0]), wanted[-1].name
        tensors = load_file(folder / "out" / last / "adapter_model.safetensors")
        adapter(tensors)
        save_file(tensors, folder / "out" / last / "adapter_model.safetensors")
        found(result["counted"][last])
        return result

    bench.launch = again
    print(f"{title}: {bench.main(options)}", file=sys.stderr)

run("nothing wrong")
run("wrong adapter", adapter=lambda tensors: [part.mul_(1.01) for name, part in tensors.items() if "lora_B" in name])
run("wrong loss", found=lambda last: last["losses"].update(task=[7.0, 7.0]))
run("unlike steps", found=lambda last: last["traffic"][-1]["allreduce_"].__setitem__(0, 9))
bench.expected = lambda *arguments: {**formula(*arguments), "allreduce_": (1, 1)}
run("wrong formula")
bench.ON_GPU, bench.torch.cuda.device_count = True, lambda: 1
run("one GPU")
"""
QUICK = ["--quick", "--ranks=2"]


def rows_in(folder: Path) -> list[dict[str, str]]:
    (file,) = folder.rglob("ranks.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_negatives_of_all_ranks_and_no_numbers_of_something_else(tmp_path: Path) -> None:
    options = [*QUICK, "--parts", "negatives", f"--out={tmp_path}"]
    result = run("-c", BREAK_IT, str(tmp_path / "kept"), *options)
    assert result.returncode == 0, result.stderr
    codes = dict(re.findall(r"^([a-z]+ [a-zA-Z]+): (\d)$", result.stderr, re.MULTILINE))
    assert codes == {
        "nothing wrong": "0",
        "wrong adapter": "1",
        "wrong loss": "1",
        "unlike steps": "0",
        "wrong formula": "0",
        "one GPU": "2",
    }
    assert "world, in micro-batches: the adapter is off by" in result.stderr
    assert "world, in micro-batches: task losses [7.0, 7.0], not" in result.stderr
    assert "2 ranks need as many GPUs, and there are 1" in result.stderr
    assert len(re.findall(r"^ddp.*|^world_one=\d+\.\d\d world_micro-batches=\d+\.\d\d$", result.stdout, re.M)) == 3

    rows = rows_in(tmp_path)
    count = len(rows) // 3  # of three runs that gave rows
    good, unlike, wrong = (rows[i * count : (i + 1) * count] for i in range(3))
    aligned = {(row["negatives"], row["forwards"]): row for row in good if row["case"] == "alignment step"}
    assert len(aligned) == 4 and all(not row["note"] for row in good)
    for row in good:
        assert (
            row["bytes_in"] == row["formula_in"] and row["bytes_out"] == row["formula_out"] and float(row["min_ms"]) > 0
        )
    for forwards in ("one", "micro-batches"):  # four pairs of vectors of 64 numbers and their meanings, and two counts
        world, rank = aligned["world", forwards], aligned["rank", forwards]
        assert int(world["bytes_in"]) - int(rank["bytes_in"]) == 2 * 4 * 64 * 4 + 4 * 8 + 2 * 8
        assert int(world["bytes_out"]) - int(rank["bytes_out"]) == 2 * (2 * 4 * 64 * 4 + 4 * 8 + 2 * 8)
        assert int(world["collectives"]) - int(rank["collectives"]) == 4 and float(world["rank_ratio"]) > 0
    assert [row["note"] for row in unlike if row["note"]] == ["the last two steps are not alike"]
    assert all("by formula (1, 1)" in row["note"] and not row["bytes_in"] + row["formula_in"] for row in wrong)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of all parts, by run and kind of step."""
    folder = tmp_path_factory.mktemp("ranks")
    result = run(str(BENCHMARKS / "bench_ranks.py"), *QUICK, f"--out={folder}", "--json", timeout=900)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len(rows_in(folder)) == len(rows)
    names = ("provider", "schedule", "negatives", "forwards", "case")
    return {tuple(row[name] for name in names): row for row in rows}


@pytest.mark.slow
def test_what_is_counted_is_what_the_formulas_say(everything: dict[tuple[str, ...], dict[str, Any]]) -> None:
    for key, row in everything.items():
        assert not row["note"], (key, row["note"])
        has_formula = "zero3" not in key[0] or "plain" in key[0]
        assert (row["formula_in"] == row["bytes_in"]) == has_formula, key
        assert (row["median_ms"] is None) == ("plain" in key[0] or (key[0] != "ddp" and key[3] != "one")), key
    compared = {key[0] for key, row in everything.items() if row["ddp_ratio"]}
    assert compared >= {"zero1", "zero2", "zero3", "zero2-offload", "zero3-offload"}


@pytest.mark.slow
def test_what_alternation_does_to_the_trace_of_zero_3(everything: dict[tuple[str, ...], dict[str, Any]]) -> None:
    """What docs/many-gpus.md says of it: a message where the stream changes, and nothing fetched ahead until the trace
    is whole again. Where nothing is fetched ahead in any case, the collectives are the same."""

    def row(schedule: str, case: str, aside: str = "", forwards: str = "one") -> dict[str, Any]:
        return everything[f"zero3{aside}", schedule, "rank", forwards, f"{case} step"]

    task, alignment = "task", "alignment"
    assert row("alternate", task)["messages"] == 0 and row("alternate", alignment)["messages"] == 1
    assert row("joint", "alignment and task")["messages"] == 1
    for case in (task, alignment):
        assert row("alternate", case, forwards="micro-batches")["messages"] == 1
    for schedule, case in (("task_only", task), ("align_only", alignment)):
        alone, among, plain = row(schedule, case), row("alternate", case), row("alternate", case, ", plain")
        assert alone["messages"] == 0 and alone["trace_checks"] == 0 < among["trace_checks"]
        assert among["gathers"] > 1.4 * alone["gathers"]
        assert plain["gathers"] == row(schedule, case, ", plain")["gathers"]
        assert plain["bytes_in"] == row(schedule, case, ", plain")["bytes_in"]
        if case == task:
            assert (among["gathers"], among["bytes_in"]) == (plain["gathers"], plain["bytes_in"])
