"""What the benchmarks of the kernels share: providers, the check before any speed, the rows, the table, the targets.

- Checked first: every provider's output and gradients, against the plain formula in fp64, by the norm of the
  difference over the norm of the truth. Ours, on either backend, may err at most twice what eager PyTorch errs in the
  output and three times in a gradient (and by a floor: eager can be right by luck); nobody more than a loose limit.
  Who fails gets a row that says so and no speed; if that is ours, the exit code is 1.
- forward: no gradient is wanted. backward: of a graph that is kept. both: as in training.
- Times are the p10, p50 and p90 of rounds in which every provider takes its turn, ratios medians within rounds. On a
  GPU: CUDA events, the L2 flushed before every step, warmed up by time. graph_ms: the p50 of replays as a CUDA graph,
  for steps below 1 ms: there, launches can cost more than the kernels.
- peak_bytes: the most that a step has allocated at once, above what was there before, less the gradients it returns.
- launches: what a step puts on the GPU: kernels, copies, fills.
- roofline: max(flops / GEMM rate, bytes / copy rate) / p50, by the formulas of the benchmark and the rates that the
  same device reached at the start of the same run, which are columns, too. Empty where there is no formula.
What cannot be had (a peer that is not installed, a step that cannot be captured) is one line and an empty cell.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import HERE, ON_GPU, Step, append_rows, graph_ms, launches, machine_rates, peak_bytes, provenance, times_ms
from harness import version as version_of
from kernel_cases import Case, Provider, Skip, Target, errors

NUMBERS = ("p10_ms", "p50_ms", "p90_ms", "graph_ms", "rounds", "launches", "peak_bytes", "bytes", "flops", "roofline")
NUMBERS += ("time_ratio", "memory_ratio")  # ours / this
PEERS = ("inf-cl", "sentence-transformers")  # by the name of their package
Row = dict[str, Any]
LAUNCH_BOUND = 1.0  # ms
ROUNDS, SECONDS = 100, 0.3 if ON_GPU else 2.0  # per mode; seconds per provider


@dataclass(frozen=True)
class Benchmark:
    """`read` makes a shape of the name of a case, str() of which is the name in full; `make` makes the case of it."""

    name: str
    doc: str
    grammar: str
    gpu: Sequence[str]
    cpu: Sequence[str]
    quick: Sequence[str]
    providers: Sequence[str]  # all names
    read: Callable[[str], Any]
    make: Callable[[Any], Case]
    targets: Sequence[Target] = ()
    last: Callable[[Sequence[Row]], Sequence[str]] = lambda rows: ()  # lines to end with


def parser(bench: Benchmark) -> argparse.ArgumentParser:
    cases = bench.gpu if ON_GPU else bench.cpu
    result = argparse.ArgumentParser(description=bench.doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = result.add_argument
    add("--shapes", nargs="+", metavar="CASE", help=f"{bench.grammar}; on this machine: {' '.join(cases)}")
    add("--providers", nargs="+", metavar="NAME", help=f"only these, of: {' '.join(bench.providers)}")
    add("--seconds", type=float, default=120.0, help="no case is begun after so many (default: %(default)g)")
    add("--quick", action="store_true", help="tiny shapes, ours and eager, two rounds: does everything run?")
    add("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    add("--json", action="store_true", help="print JSON on stdout and nothing else there")
    add(
        "--out", type=Path, default=HERE / "results", help=f"for <device>/{bench.name}.csv; default: benchmarks/results"
    )
    return result


class Run:
    """One run of a benchmark: its options, and what it has found so far."""

    def __init__(self, bench: Benchmark, options: argparse.Namespace):
        self.bench, self.options, self.failed = bench, options, False
        self.begun = time.perf_counter()
        self.rows: list[Row] = []
        self.notes: list[str] = []
        if options.threads:
            torch.set_num_threads(options.threads)
        self.rates = machine_rates(options.quick)
        self.about = {**self.rates, **provenance()}
        self.show(*(f"{key}={value}" for key, value in self.about.items()))
        self.show("time_ratio and memory_ratio are ours / this; roofline is a share of the rates above")

    def show(self, *words: Any) -> None:
        print(*words, file=sys.stderr if self.options.json else sys.stdout, flush=True)

    def spent(self) -> float:
        """Share of the time that is used up."""
        return (time.perf_counter() - self.begun) / max(self.options.seconds, 1e-9)

    def note(self, *words: str, where: Sequence[str] = ()) -> None:
        """What is missing, and why; the same is said once, with where it was first."""
        line = ": ".join(words)
        if line not in self.notes:
            self.notes.append(line)
            self.show(f"  note: {line}" + (f" (first: {' '.join(where)})" if where else ""))

    def case(self, name: str, case: Case) -> None:
        """Check, measure, show and write one case."""
        self.show(f"\n{name}")
        checked = self.checked(name, case)
        right = {label: provider for label, (provider, head) in checked.items() if head["check"] == "right"}
        rows = [{**head, "mode": "both"} for _, head in checked.values() if head["check"] == "wrong"]
        for mode in case.modes:
            try:
                measured = self.measured(name, case, mode, self.steps(name, mode, right))
            except Exception as error:  # the other modes' numbers are good
                self.note(name, mode, in_short(error))
                self.failed, measured = True, []
            rows += [{**checked[label][1], **numbers} for label, numbers in measured]
        if not rows:
            return
        rows = [{**row, **self.about} for row in rows]
        append_rows(self.bench.name, rows, self.options.out)
        self.rows += rows
        self.show("\n".join(table(rows)))

    def wanted(self) -> Sequence[str]:
        """The names of the providers of this run."""
        if self.options.providers or self.options.quick:
            return self.options.providers or ("ours", "eager")
        if not ON_GPU and "twin" in self.bench.providers:
            self.note("twin", "on the CPU that is what ours runs")
            return [label for label in self.bench.providers if label != "twin"]
        return self.bench.providers

    def checked(self, name: str, case: Case) -> dict[str, tuple[Provider, Row]]:
        """Those that could be run, each with the beginning of its rows, which also says whether it was right."""
        truth, eager, found = case.truth(), (math.nan, math.nan), {}
        wanted = [label for label in self.wanted() if label in case.providers]
        for label in dict.fromkeys(["eager", *wanted]):  # eager's errors are the measure of ours
            if label == "compile" and self.spent() > 0.5:
                self.note("compile", "no more, half of the time is used up, and it takes the most", where=[name])
                continue
            try:
                provider = case.providers[label](case.inputs, case.upstream)
                off = errors(provider, truth)
            except Skip as reason:
                self.note(label, str(reason))
                continue
            except Exception as error:
                self.note(name, label, in_short(error))
                self.failed |= label == "ours"
                continue
            limits = (case.loose, case.loose)
            if label == "eager":
                eager = off
            if label in case.strict:  # min() keeps its first if the second is a NaN
                limits = (min(case.loose, 2 * eager[0] + case.floor), min(case.loose, 3 * eager[1] + case.floor))
            right = off[0] <= limits[0] and off[1] <= limits[1]
            if not right:
                figures = "output off by {:.1e} (allowed {:.1e}), gradient by {:.1e} (allowed {:.1e})"
                self.note(name, label, "wrong, so no speed", figures.format(off[0], limits[0], off[1], limits[1]))
                self.failed |= label in case.strict
            head = {"provider": label, "version": version_of(label) if label in PEERS else "", "mode": "", "case": name}
            head |= {**case.columns, "check": "right" if right else "wrong"}
            head |= {"error_output": f"{off[0]:.2e}", "error_gradient": f"{off[1]:.2e}", **dict.fromkeys(NUMBERS, "")}
            found[label] = provider, head
        return {label: found[label] for label in wanted if label in found}

    def steps(self, name: str, mode: str, providers: Mapping[str, Provider]) -> dict[str, Step]:
        """One step of this mode of every provider that has it, each run once."""
        steps = {}
        for label, provider in providers.items():
            try:
                step = provider.step(mode)
                step()
                steps[label] = step
            except Skip as reason:
                self.note(label, mode, str(reason))
            except Exception as error:
                self.note(name, label, mode, in_short(error))
                self.failed |= label == "ours"
        return steps

    def measured(self, name: str, case: Case, mode: str, steps: Mapping[str, Step]) -> list[tuple[str, Row]]:
        """Every number of every step of one mode."""
        rounds, seconds = (2, 0.0) if self.options.quick else (ROUNDS, SECONDS)
        times = times_ms(steps, rounds, seconds * len(steps)) if steps else {}
        returned = 0 if mode == "forward" else sum(tensor.nbytes for tensor in case.inputs)
        result = []
        for label, ms in times.items():
            low, middle, high = (round(float(q), 4) for q in np.quantile(ms, (0.1, 0.5, 0.9)))
            row = {"mode": mode, "p10_ms": low, "p50_ms": middle, "p90_ms": high, "rounds": len(ms)}
            for column in ("bytes", "flops"):
                row[column] = getattr(case, column).get(mode, "")
            row["roofline"] = roofline(row, case.gemm, self.rates)
            optional = functools.partial(self.optional, name, label, mode)
            row["peak_bytes"] = optional("peak", lambda step=steps[label]: max(0, peak_bytes(step, idle) - returned))
            if ON_GPU:
                row["launches"] = optional("launches", lambda step=steps[label]: launches(step))
            # A backward alone runs on the stream of its forward, not on the one that is captured.
            if ON_GPU and case.capturable and middle < LAUNCH_BOUND and mode != "backward":
                replay = functools.partial(graph_ms, steps[label], rounds, seconds)
                row["graph_ms"] = optional("graph", lambda replay=replay: round(float(np.median(replay())), 4))
            result.append((label, row))
        ours = dict(result).get("ours")
        if ours is None:
            return result
        for label, row in result:
            row["time_ratio"] = round(float(np.median(np.divide(times["ours"], times[label]))), 4)
            if ours["peak_bytes"] != "" and row["peak_bytes"]:
                row["memory_ratio"] = round(ours["peak_bytes"] / row["peak_bytes"], 4)
        return result

    def optional(self, name: str, label: str, mode: str, what: str, measure: Callable[[], Any]) -> Any:
        """A measure that not every machine or step offers; an empty cell and a note where not."""
        try:
            return measure()
        except Exception as error:
            self.note(what, in_short(error), where=(name, label, mode))
            return ""


def idle() -> None:
    """Nothing to reset between steps."""


def in_short(error: Exception) -> str:
    said = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {said[:160]}"


def roofline(row: Row, gemm: str, rates: Mapping[str, float]) -> float | str:
    """Share of what the same device reached in a copy or a GEMM, whichever bounds this; empty without a formula."""
    bounds = [0.0]
    if row["bytes"] != "":
        bounds.append(row["bytes"] / rates["copy_gb_s"] / 1e6)
    if row["flops"] != "":
        bounds.append(row["flops"] / rates[f"gemm_{gemm}_tflop_s"] / 1e9)
    return float(f"{max(bounds) / row['p50_ms']:.4g}") if max(bounds) and row["p50_ms"] else ""


def table(rows: Sequence[Row]) -> list[str]:
    """Lines to read; the CSV has more."""
    formats = {"p10_ms": "10.3f", "p50_ms": "10.3f", "p90_ms": "10.3f", "graph_ms": "10.3f", "launches": "9d"}
    formats |= {"peak_bytes": "14,d", "roofline": "9.0%", "time_ratio": "11.2f", "memory_ratio": "13.2f"}
    width = max(len(row["provider"]) for row in rows) + 2
    titles = (f"{column:>{form.partition('.')[0].rstrip(',d')}}" for column, form in formats.items())
    lines = [f"  {'':{width}}{'mode':9}{''.join(titles)}"]
    for row in rows:
        cells = (
            f"{row[column]:{form}}" if row[column] != "" else " " * int(form.partition(".")[0].rstrip(",d%"))
            for column, form in formats.items()
        )
        lines.append(f"  {row['provider']:{width}}{row['mode']:9}{''.join(cells)}{'  ' + row['check']}")
    return lines


def run(bench: Benchmark, options: argparse.Namespace) -> int:
    """Every case that the options name, as long as there is time; the exit code."""
    names = options.shapes or (bench.quick if options.quick else bench.gpu if ON_GPU else bench.cpu)
    try:
        shapes = [bench.read(name) for name in names]
        if unknown := [label for label in options.providers or () if label not in bench.providers]:
            raise ValueError(f"--providers: {unknown[0]} is none of {', '.join(bench.providers)}")
    except ValueError as error:
        print(f"{error} ({bench.grammar})", file=sys.stderr)
        return 2
    this, left_out = Run(bench, options), []
    for shape in shapes:
        if this.spent() > 1:
            left_out.append(str(shape))
            continue
        try:
            this.case(str(shape), bench.make(shape))
        except Exception as error:
            this.note(str(shape), in_short(error))
            this.failed = True
        gc.collect()
        if ON_GPU:
            with contextlib.suppress(RuntimeError):  # a capture that failed may not let go
                torch.cuda.empty_cache()
    if left_out:
        this.note(f"left out after {options.seconds:g} s", " ".join(left_out))
    reached = [verdict for target in bench.targets if (verdict := target.verdict(this.rows))]
    this.show("\n".join(["", *reached, *bench.last(this.rows)]))
    if options.json:
        print(json.dumps({"rows": this.rows, "notes": this.notes, "left_out": left_out, "targets": reached}, indent=2))
    return int(this.failed)
