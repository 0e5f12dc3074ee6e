"""Training on several ranks: what every stage of ZeRO, negatives of all ranks, and alternation under ZeRO-3 cost.

Starts its ranks itself, on the CPU with gloo, on GPUs with NCCL, and trains there as `fastalign train` does: LoRA (r 8,
every linear layer but the head) on a Llama with random weights, of the proportions of an 8B model but narrower, with
AdamW. ZeRO-3 gets its preset with values that fit this width: elements by the size of a block, the size from which a
parameter is parted by the width (else nothing of so small a model would be parted). All runs take turns in one launch,
once with collectives counted and then, for the times, in rounds; the first steps of a run do not count.

- stages: steps of the task and of the alignment under `alternate`, by DDP and every preset, each beside DDP.
- negatives: alignment steps with those of all ranks beside those of one rank, in one forward and in micro-batches.
- trace: ZeRO-3 under every schedule, with its prefetch and without; DeepSpeed's messages and collectives.

First, all runs of a schedule must come to the same losses and the same adapter, whatever wraps the model, within 1e-3
of what training has changed, else there are no numbers and the exit code is 1. Bytes are those of one rank and step:
in, what it gives to collectives; out, what it has afterwards. Where there is a formula (rank_traffic.py), the count
has to be it exactly, else a note stands in place of the figure. Of ZeRO-3 that is so in runs of their own, where all
is parted, nothing is fetched ahead and nothing kept ("plain"): these are counted, not timed. A ratio of times is the
median of the rounds' ratios. Rows go to the end of results/<device>/ranks.csv.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import HERE, ON_GPU, append_rows, provenance, version
from rank_plan import PARTS, SKIPPED, Case, cases, configuration, kinds, make_base, settings
from rank_traffic import BROADCAST, GATHER, Step, expected
from safetensors.torch import load_file

TOLERANCE = 1e-3  # of the adapter and the losses, relative; AdamW makes rounding larger
LEAST = 2  # rounds that there are, however slow
DEFAULTS = {"ranks": 2, "layers": 8, "hidden": 256, "vocab": 2000, "words": 15, "rows": 16, "pairs": 16, "micro": 8}
DEFAULTS |= {"steps": 10, "rounds": 5, "threads": 1}
QUICK = {"layers": 4, "hidden": 64, "vocab": 200, "words": 7, "rows": 4, "pairs": 4, "micro": 2}
QUICK |= {"steps": 8, "rounds": 1}
BESIDE = {  # which run a ratio is to
    "ddp_ratio": {"wrapper": "ddp", "aside": ""},
    "rank_ratio": {"negatives": "rank"},
    "prefetch_ratio": {"aside": ""},
}
WORDS = ("case", "provider", "schedule", "negatives", "forwards")
BYTES = ("bytes_in", "bytes_out", "formula_in")


def launch(wanted: Sequence[Case], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What rank 0 has seen of all runs. SystemExit with the end of what the ranks printed, where one failed."""
    runs = [{"name": case.name, "timed": case.timed, "config": configuration(case, options, folder)} for case in wanted]
    limits = {"rounds": options.rounds, "least": min(LEAST, options.rounds), "seconds": options.seconds}
    plan, results = folder / "plan.json", folder / "results.json"
    plan.write_text(json.dumps({"cases": runs, "threads": options.threads, **limits}), encoding="utf-8")
    paths = [str(HERE.parent), str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["OMP_NUM_THREADS"] = str(options.threads)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}"]
    with (folder / "log").open("w") as log:
        command = [*torchrun, str(HERE / "rank_runs.py"), str(plan), str(results)]
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode or not results.exists():
        raise SystemExit(f"the ranks failed:\n{(folder / 'log').read_text(errors='replace')[-3000:]}")
    return json.loads(results.read_text(encoding="utf-8"))


def disagreements(wanted: Sequence[Case], found: Mapping[str, Any], folder: Path) -> list[str]:
    """Where a loss or an adapter is not that of the first run with its schedule and negatives."""
    first: dict[tuple[str, str], Case] = {}
    wrong = []
    for case in wanted:
        beside = first.setdefault((case.mode, case.negatives), case)
        expected_losses = found["counted"][beside.name]["losses"]
        for run in [found["counted"][case.name], *found["timed"].get(case.name, [])]:
            for stream, losses in run["losses"].items():
                if not np.allclose(losses, expected_losses[stream], rtol=TOLERANCE / 10):  # NaN is wrong, too
                    wrong.append(f"{case.name}: {stream} losses {losses}, not {expected_losses[stream]}")
        ours, theirs = (load_file(folder / "out" / one.name / "adapter_model.safetensors") for one in (case, beside))
        if ours.keys() != theirs.keys():
            wrong.append(f"{case.name}: the adapter has other parameters")
            continue
        apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
        moved = sum(float(theirs[name].double().square().sum()) for name in theirs if "lora_B" in name)  # from zero
        if not apart**0.5 <= TOLERANCE * moved**0.5:
            wrong.append(f"{case.name}: the adapter is off by {(apart / moved) ** 0.5:.1e}")
    return wrong


def rows_of(wanted: Sequence[Case], found: Mapping[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of every run and kind of step."""

    def times(case: Case, kind: tuple[str, ...]) -> np.ndarray:
        """Milliseconds (rounds, steps of that kind); empty where the case was not timed."""
        steps = steps_of(case, kind, options)
        return np.array([[run["ms"][i] for i in steps] for run in found["timed"].get(case.name, [])])

    rows = []
    for case in wanted:
        for kind in dict.fromkeys(kinds(case.mode, options.steps)):
            row = counts(case, kind, found["counted"][case.name], options)
            ms = times(case, kind)
            row["median_ms"] = round(float(np.median(ms)), 3) if ms.size else None
            row["min_ms"] = round(float(ms.min()), 3) if ms.size else None
            for name, change in BESIDE.items():
                beside = dataclasses.replace(case, **change)
                theirs = times(beside, kind)
                ratios = np.median(ms, axis=1) / np.median(theirs, axis=1) if ms.size and theirs.size else None
                row[name] = None if ratios is None or beside == case else round(float(np.median(ratios)), 4)
            rows.append(row)
    return rows


def steps_of(case: Case, kind: tuple[str, ...], options: argparse.Namespace) -> list[int]:
    order = kinds(case.mode, options.steps)
    return [i for i, one in enumerate(order) if one == kind and i >= SKIPPED]


def counts(
    case: Case, kind: tuple[str, ...], counted: Mapping[str, Any], options: argparse.Namespace
) -> dict[str, Any]:
    """Collectives and messages of a step of this kind: the last one of a run, which must be as the one before it."""
    steps = steps_of(case, kind, options)
    traffic: dict[str, list[int]] = dict(counted["traffic"][steps[-1]])
    notes = [] if traffic == counted["traffic"][steps[-2]] else ["the last two steps are not alike"]
    of_trace = traffic.pop(BROADCAST, [0])[0] if "zero3" in case.wrapper else 0  # DeepSpeed compares those of the ranks
    formula = None
    if case.aside == "plain" or "zero3" not in case.wrapper:
        forwards = -(-options.pairs // options.micro) if case.micro else 1
        world, blocks = case.negatives == "world", options.layers // 2
        step = Step(kind, options.ranks, options.pairs, forwards, blocks, options.hidden, world)
        formula = expected(case.wrapper, step, counted["parameters"], counted["buffers"])
        for operation in sorted(traffic.keys() | formula.keys()):
            bytes_of = tuple(traffic.get(operation, [0, 0, 0])[1:])
            if bytes_of != formula.get(operation):
                notes.append(f"{operation} takes and gives {bytes_of} bytes, by formula {formula.get(operation)}")
    totals = [sum(part) for part in zip(*traffic.values(), strict=True)]
    by_formula = [sum(part) for part in zip(*formula.values(), strict=True)] if formula else [None, None]
    return {
        "case": f"{' and '.join(kind)} step",
        "provider": ", ".join(filter(None, (case.wrapper, case.aside))),
        "schedule": case.mode,
        "negatives": case.negatives,
        "forwards": "micro-batches" if case.micro else "one",
        "zero": json.dumps((settings(case, options.hidden) or {}).get("zero_optimization", {})),
        "collectives": totals[0],
        "gathers": traffic.get(GATHER, [0])[0],
        "bytes_in": None if notes else totals[1],
        "bytes_out": None if notes else totals[2],
        "formula_in": None if notes else by_formula[0],
        "formula_out": None if notes else by_formula[1],
        "operations": json.dumps(traffic),
        "messages": round(sum(counted["messages"][i] for i in steps) / len(steps), 3),
        "trace_checks": of_trace,
        "note": "; ".join(notes),
    }


def table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Prints some columns of the rows under short names; bytes in thousands, ratios with two digits."""

    def cell(row: Mapping[str, Any], name: str) -> str:
        if name == "bytes_in" and row["note"]:
            return row["note"]
        value = row[name]
        if value is None or isinstance(value, str):
            return value or ""
        return f"{value:.2f}" if "ratio" in name else f"{value / 1e3:.1f}" if name in BYTES else f"{value:g}"

    lines = [[*columns.values()], *([cell(row, name) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(f"\n{title}")
    for line in lines:
        parts = zip(line, widths, columns, strict=True)
        print("  ".join(part.ljust(width) if name in WORDS else part.rjust(width) for part, width, name in parts))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What ZeRO, negatives of all ranks, and alternation cost on ranks.")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help=f"default: {' '.join(PARTS)}")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default}")
    parser.add_argument("--seconds", type=float, default=900.0, help="after which no further round begins; default 900")
    parser.add_argument("--quick", action="store_true", help="a tiny model and one round: does it work?")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="for <device>/ranks.csv")
    if parser.parse_known_args(arguments)[0].quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if options.ranks < 2 or options.layers < 2 or options.micro >= options.pairs or options.rounds < 1:
        parser.error("--ranks and --layers must be 2 or more, --rounds 1 or more, --micro below --pairs")
    if options.steps < SKIPPED + 4 or options.steps % 2:
        parser.error(f"--steps must be even and {SKIPPED + 4} or more, half of each stream")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if ON_GPU and torch.cuda.device_count() < options.ranks:
        there = torch.cuda.device_count()
        print(f"nothing is measured: {options.ranks} ranks need as many GPUs, and there are {there}", file=sys.stderr)
        return 2
    wanted = cases(options.parts)
    with tempfile.TemporaryDirectory() as name:
        make_base(options, Path(name))
        found = launch(wanted, options, Path(name))
        wrong = disagreements(wanted, found, Path(name))
    if wrong:
        print("no numbers, because not all runs come to the same:", *wrong[:9], sep="\n  ", file=sys.stderr)
        return 1
    about = provenance() | {"deepspeed": version("deepspeed"), "backend": found["backend"]}
    about |= {name: getattr(options, name) for name in DEFAULTS}
    about["rounds"] = max((len(runs) for runs in found["timed"].values()), default=0)
    rows = [{**dict.fromkeys(("case", "provider")), **about, **row} for row in rows_of(wanted, found, options)]
    path = append_rows("ranks", rows, options.out)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(*(f"{key}={value}" for key, value in about.items()), f"\nrows appended to {path}")
    print("bytes: thousands of one rank and step, into collectives and out of them; ratios: medians of rounds")
    tables(rows)
    return 0


def tables(rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows of each part, and a last line of ratios."""
    ours = [row for row in rows if row["schedule"] == "alternate" and row["forwards"] == "one"]
    stages = [row for row in ours if row["negatives"] == "rank" and "," not in row["provider"]]
    stages.sort(key=lambda row: row["case"])
    negatives = [row for row in rows if (row["case"], row["provider"]) == ("alignment step", "ddp")]
    negatives = [row for row in negatives if row["schedule"] == "alternate"]
    trace = [row for row in rows if row["provider"].startswith("zero3") and "offload" not in row["provider"]]
    times = {"median_ms": "ms", "min_ms": "least", "ddp_ratio": "/ ddp"}
    sizes = {"bytes_in": "in", "bytes_out": "out", "formula_in": "in by formula"}
    names = {"case": "", "provider": ""}
    table(
        "stages (alternate, negatives of one rank, one forward)",
        stages,
        {**names, **times, "collectives": "calls", **sizes},
    )
    named = {"negatives": "negatives", "forwards": "forwards"}
    table(
        "negatives (alignment steps, DDP)",
        negatives,
        {**named, **times, "rank_ratio": "/ rank", "collectives": "calls", **sizes},
    )
    schedule = {"schedule": "schedule", **names, "forwards": "forwards"}
    rest = {"prefetch_ratio": "/ prefetch", "gathers": "gathers", **sizes, "messages": "messages"}
    table(
        "trace (ZeRO-3; gathers: of parameters; messages: of an invalid trace, per step)",
        trace,
        {**schedule, **times, **rest},
    )
    ratios = [
        f"{row['provider']}_{row['case'].split()[0]}={row['ddp_ratio']:.2f}" for row in stages if row["ddp_ratio"]
    ]
    ratios += [f"world_{row['forwards']}={row['rank_ratio']:.2f}" for row in negatives if row["rank_ratio"]]
    print(*ratios)


if __name__ == "__main__":
    sys.exit(main())
