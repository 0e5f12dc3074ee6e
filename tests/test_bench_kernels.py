"""The benchmarks of the kernels: they run, their check gates, their formulas are right, and what a GPU adds holds."""

from __future__ import annotations

import contextlib
import csv
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.benches import BENCHMARKS, run

KERNELS = ["masked_mean_pool", "info_nce", "pooled_info_nce"]

# A GPU without graphs, profiler and memory statistics, whose kernels run through Triton's interpreter: all that only a
# GPU does is called, and what it cannot do must cost no more than a cell.
FAKE_GPU = """
import sys, time, types, torch, harness

class Event:
    def __init__(self, enable_timing):
        assert enable_timing
    def record(self):
        self.at = time.perf_counter()
    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3

torch.cuda.Event, torch.cuda.synchronize, torch.cuda.empty_cache = Event, lambda: None, lambda: None
torch.cuda.get_device_name = lambda device: "NVIDIA Test 9000"
torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(L2_cache_size=1 << 20)
harness.ON_GPU, harness.WARM_UP = True, 0.0
import bench_info_nce, bench_masked_mean_pool, bench_pooled_info_nce, kernel_bench
kernel_bench.LAUNCH_BOUND = 1e9
options = ["--quick", "--out", sys.argv[1], "--shapes"]
code = bench_masked_mean_pool.main([*options, "3x7x33:bf16:left:unit"])
code |= bench_info_nce.main([*options, "5x16:fp32:exact:symmetric"])
code |= bench_pooled_info_nce.main([*options, "2x3x16:fp32:exact:one:ragged"])
regimes = ["--regimes", "--providers", "ours", "fused", "dense", "panels"]
sys.exit(code | bench_info_nce.main([*options, "4x16:fp32:exact:one", *regimes]))
"""


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    (file,) = folder.rglob(f"{name}.csv")
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks by name, as on a machine without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.mark.parametrize("name", KERNELS)
def test_it_runs_and_appends_rows(name: str, tmp_path: Path):
    result = run(str(BENCHMARKS / f"bench_{name}.py"), "--quick", f"--out={tmp_path}", "--json")
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)  # JSON and nothing else
    table = rows_of(tmp_path, name)
    assert table == [{key: str(value) for key, value in row.items()} for row in said["rows"]]
    assert {row["provider"] for row in table} == {"ours", "eager"}
    assert {row["mode"] for row in table} == {"forward", "backward", "both"}
    for row in said["rows"]:
        assert row["check"] == "right" and row["rounds"] == 2 and row["torch"] == torch.__version__
        assert 0 < row["p10_ms"] <= row["p50_ms"] <= row["p90_ms"]
        assert row["copy_gb_s"] > 0 < row["gemm_bf16_tflop_s"] and row["gemm_fp32_tflop_s"] > 0
        assert (row["launches"], row["graph_ms"], row["driver"]) == ("", "", "")  # there is no GPU
        assert {"triton", "commit", "date", "device"} <= {*row}
        if row["mode"] == "both":
            assert row["bytes"] > 0 and row["roofline"] >= 0 and row["peak_bytes"] >= 0
        if row["provider"] == "ours":
            assert row["time_ratio"] == 1 and row["memory_ratio"] in (1, "")


def test_on_a_gpu_everything_runs_and_what_fails_is_a_note(tmp_path: Path):
    result = run("-c", FAKE_GPU, str(tmp_path), TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr + result.stdout
    for measure in ("peak", "launches", "graph"):
        assert result.stdout.count(f"note: {measure}: ") == 4  # once a run
    assert "wrong" not in result.stdout
    for name in [*KERNELS, "info_nce_regimes"]:
        assert (tmp_path / "nvidia-test-9000" / f"{name}.csv").exists()
        for row in rows_of(tmp_path, name):
            assert float(row["p50_ms"]) > 0 and row["check"] == "right"
            assert (row["peak_bytes"], row["launches"], row["graph_ms"]) == ("", "", "")
    assert "4x16:fp32:exact:one: fastest fused fused=" in result.stdout


def test_what_is_wrong_gets_no_speed(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    bench = load("bench_info_nce")
    right, plain = bench.info_nce, bench.eager

    def wrong_gradient(*args: Any, **kwargs: Any) -> torch.Tensor:
        value = right(*args, **kwargs)
        return value.detach() + 1.001 * (value - value.detach())

    def wrong_value(*args: Any, **kwargs: Any) -> torch.Tensor:
        value = right(*args, **kwargs)
        return 1.001 * value.detach() + (value - value.detach())

    cases = {
        "wrong value": (wrong_value, plain, 1, "ours"),
        "wrong loss": (lambda *args, **kwargs: right(*args, **kwargs) * 1.001, plain, 1, "ours"),
        "wrong gradient": (wrong_gradient, plain, 1, "ours"),
        "no number": (lambda *args, **kwargs: right(*args, **kwargs) * math.nan, plain, 1, "ours"),
        "no answer": (lambda *args, **kwargs: right(args[1]), plain, 1, "ours"),
        "wrong measure": (right, lambda *args, **kwargs: plain(*args, **kwargs) * 1.5, 0, "eager"),
        "nothing wrong": (right, plain, 0, None),
    }
    for title, (ours, eager, code, wrong) in cases.items():
        monkeypatch.setattr(bench, "info_nce", ours)
        monkeypatch.setattr(bench, "eager", eager)
        out = tmp_path / title
        options = ["--quick", f"--out={out}", "--shapes", "6x16:fp32:exact:symmetric"]
        assert bench.main(options) == code, title
        printed = capsys.readouterr().out
        rows = rows_of(out, "info_nce")
        timed = {row["provider"] for row in rows if row["p50_ms"]}
        assert timed == {"ours", "eager"} - {wrong}, title
        lines = [line for line in printed.splitlines() if line.startswith(f"  {wrong} ")]
        assert not any("right" in line for line in lines)
        if wrong and title != "no answer":  # that one could not even be compared
            assert f"{wrong}: wrong, so no speed" in printed
            (row,) = (row for row in rows if row["provider"] == wrong)
            assert row["check"] == "wrong" and not row["p50_ms"] and not row["roofline"] and row["error_gradient"]


def test_ours_is_held_to_what_eager_errs(load: Any):
    """Not to the loose limit of the others: an fp32 loss that is off by as much as fp16 is wrong."""
    cases, bench = load("kernel_cases"), load("bench_info_nce")
    case = bench.make(bench.read("64x96:fp32:exact:one"))
    truth = case.truth()
    given = (case.inputs, case.upstream)
    output, gradient = cases.errors(case.providers["eager"](*given), truth)
    assert 0 <= output < 1e-6 and 0 < gradient < 1e-5
    half = cases.Provider(lambda *rows: bench.eager(*(row.half() for row in rows), fast=False, symmetric=False), *given)
    assert 3 * gradient + case.floor < cases.errors(half, truth)[1] < case.loose
    half.both = lambda: (truth[0], *(slope.half() for slope in truth[1:]))
    assert all(map(math.isnan, cases.errors(half, truth)))  # a gradient in another dtype is not the gradient


def test_formulas(load: Any):
    pool, loss = load("bench_masked_mean_pool"), load("bench_info_nce")
    # 2 rows of 3 tokens, 5 count, 4 wide, 2 bytes each: 5 * 4 * 2 read, 6 * 4 * 2 written, 2 * 4 * 4 beside both
    assert pool.bytes_moved(6, 5, 2, 4, 2) == {"forward": 72, "backward": 80, "both": 152}
    assert loss.flops(2, 3, 5, symmetric=False) == {"forward": 60, "both": 180}
    assert loss.flops(2, 2, 5, symmetric=True) == {"forward": 40, "both": 160}
    assert loss.bytes_moved(2, 3, 5, 4) == {"forward": 100, "both": 200}
    roofline = load("kernel_bench").roofline
    rates = {"copy_gb_s": 100.0, "gemm_bf16_tflop_s": 100.0, "gemm_fp32_tflop_s": 50.0}
    row = {"bytes": 10**9, "flops": 2 * 10**12, "p50_ms": 40.0}  # a copy of 10 ms; a GEMM of 20 or 40 ms
    assert roofline(row, "bf16", rates) == 0.5 and roofline(row, "fp32", rates) == 1.0
    assert roofline(row | {"flops": ""}, "bf16", rates) == 0.25
    assert roofline(row | {"flops": "", "bytes": ""}, "bf16", rates) == ""


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_truth_of_the_loss_is_autograd_of_the_plain_formula(load: Any, symmetric: bool, monkeypatch: Any):
    bench = load("bench_info_nce")
    monkeypatch.setattr(bench, "CHUNK", 3)
    source, target = torch.randn(7, 5), torch.randn(7 if symmetric else 9, 5)
    value, *slopes = bench.truth(source, target, symmetric)
    rows = [tensor.double().requires_grad_() for tensor in (source, target)]
    logits = F.normalize(rows[0]) @ F.normalize(rows[1]).T / 0.1
    expected = F.cross_entropy(logits, torch.arange(7))
    if symmetric:
        expected = (expected + F.cross_entropy(logits.T, torch.arange(7))) / 2
    torch.testing.assert_close(value, expected.detach())
    for slope, wanted in zip(slopes, torch.autograd.grad(expected, rows), strict=True):
        torch.testing.assert_close(slope, wanted)


@pytest.mark.parametrize("layout", ["full", "ragged", "left", "holes", "flat"])
@pytest.mark.parametrize("scaling", ["mean", "unit"])
def test_the_truth_of_pooling_is_autograd_of_the_plain_formula(load: Any, layout: str, scaling: str):
    bench = load("bench_masked_mean_pool")
    batch = bench.Batch(6, 9, 4, "fp32", layout)
    upstream = torch.randn(6, 4)
    pooled, gradient = batch.truth(scaling, upstream)
    hidden = batch.hidden.detach().double().requires_grad_()
    if layout == "flat":
        pieces = hidden.split(batch.cu_seqlens.diff().tolist())
    else:
        pieces = [row[keep] for row, keep in zip(hidden, batch.mask, strict=True)]
    assert [len(piece) for piece in pieces] == [len(kept) for kept in batch.kept]
    assert (batch.size["kept"] < 6 * 9) == (layout != "full")
    means = torch.stack([piece.mean(0) for piece in pieces])
    means = F.normalize(means) if scaling == "unit" else means
    torch.testing.assert_close(pooled, means.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(means, hidden, upstream.double())[0])


def test_names_of_cases(load: Any):
    bench = load("bench_info_nce")
    assert str(bench.read("64x4096")) == "64x4096:bf16:fast:one"
    assert str(bench.read("8x16x32:symmetric:fp32".replace("8x16", "16x16"))) == "16x32:fp32:fast:symmetric"
    assert str(bench.read("8x16x32:exact")) == "8x16x32:bf16:exact:one"
    for name in ("64", "64x0", "64xa", "64x8:bf16:fp32", "64x8:quick", "16x8x4", "8x16x4:symmetric", "1x2x3x4"):
        with pytest.raises(ValueError, match=name):
            bench.read(name)
    for module in KERNELS:  # every case that is run by default has its full name, and every target is one of them
        bench = load(f"bench_{module}").BENCH
        names = [*bench.gpu, *bench.cpu, *bench.quick]
        assert [str(bench.read(name)) for name in names] == names
        assert {target.case for target in bench.targets} <= {*names}


def test_a_regime_is_forced(load: Any):
    pytest.importorskip("triton")
    kernel = importlib.import_module("fastalign_kernels.info_nce")
    for regime in kernel.REGIMES:
        assert load("bench_info_nce").forced(regime, lambda: kernel.regime(4, 4, fast=True)) == regime


def test_targets_say_what_was_reached(load: Any):
    target = load("kernel_cases").Target
    rows = [{"case": "a", "provider": "ours", "mode": "both", "roofline": 0.7, "peak_bytes": 5e8, "launches": ""}]
    assert target("fast", "a", "ours", "roofline", least=0.6).verdict(rows) == "target fast>=0.6 reached 0.70: yes"
    assert target("fast", "a", "ours", "roofline", least=0.8).verdict(rows) == "target fast>=0.8 reached 0.70: no"
    small = target("gb", "a", "ours", "peak_bytes", most=1, over=1e9)
    assert small.verdict(rows) == "target gb<=1 reached 0.50: yes"
    assert target("launches", "a", "ours", "launches", most=6).verdict(rows) is None  # not measured
    assert target("fast", "b", "ours", "roofline", least=0.6).verdict(rows) is None


def test_options(load: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    bench = load("bench_info_nce")
    out = f"--out={tmp_path}"
    assert bench.main(["--shapes", "7", out]) == 2 and "7 is not 2 or 3 sizes" in capsys.readouterr().err
    assert bench.main(["--providers", "theirs", out]) == 2 and "theirs" in capsys.readouterr().err
    assert bench.main(["--regimes", out]) == 0 and "needs a GPU" in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]
    assert bench.main(["--quick", "--seconds=-1", out]) == 0
    assert "note: left out after -1 s: 5x16:fp32:exact:symmetric 6x9x24:bf16:fast:one" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "inf_cl", None)  # as if not installed
    peers = ["--quick", "--shapes", "6x16:fp32:exact:one", "--providers", "ours", "inf-cl", out]
    assert bench.main(peers) == 0
    assert "note: inf-cl: not installed" in capsys.readouterr().out
    assert {row["provider"] for row in rows_of(tmp_path, "info_nce")} == {"ours"}


def test_compile_stops_when_half_of_the_time_is_used(load: Any, tmp_path: Path, capsys: Any, monkeypatch: Any):
    bench, runner = load("bench_masked_mean_pool"), load("kernel_bench")
    monkeypatch.setattr(runner.Run, "spent", lambda self: 0.6)
    shape = "3x4x8:fp32:full:mean"
    assert bench.main(["--quick", f"--out={tmp_path}", "--providers", "ours", "compile", "--shapes", shape]) == 0
    assert "note: compile: no more" in capsys.readouterr().out
    assert {row["provider"] for row in rows_of(tmp_path, "masked_mean_pool")} == {"ours"}


def test_rows_of_before_get_empty_new_columns(load: Any, tmp_path: Path):
    append = load("harness").append_rows
    file = append("claim", [{"a": 1, "c": 2}], tmp_path)
    append("claim", [{"a": 3, "c": 4}], tmp_path)
    assert file.read_text(encoding="utf-8").splitlines() == ["a,c", "1,2", "3,4"]
    append("claim", [{"a": 5, "b": "x,y", "c": 6}], tmp_path)
    assert file.read_text(encoding="utf-8").splitlines() == ["a,b,c", "1,,2", "3,,4", '5,"x,y",6']
    with pytest.raises(SystemExit, match=r"claim.csv has columns that this version does not write \(b\)"):
        append("claim", [{"a": 1, "c": 2}], tmp_path)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4 and [*file.parent.iterdir()] == [file]


def test_a_benchmark_made_by_hand(load: Any, tmp_path: Path, capsys: Any):
    """Peak memory is that of the step less the gradients it returns; a case that cannot be made is told and fails."""
    bench, cases = load("kernel_bench"), load("kernel_cases")

    def make(size: int) -> Any:
        rows = torch.ones(size, requires_grad=True)
        return cases.Case(
            columns={"size": size},
            inputs=[rows],
            upstream=torch.ones(()),
            truth=lambda: (torch.tensor(3.0 * size), torch.full((size,), 3.0)),
            providers={
                "ours": lambda *given: cases.Provider(lambda x: (x * 3).sum(), *given),
                "eager": lambda *given: cases.Provider(lambda x: (x.double() * 3).sum().float(), *given),
            },
            floor=1e-6,
            loose=1e-3,
            bytes={"forward": 4 * size, "both": 8 * size},
        )

    made = bench.Benchmark(
        name="made",
        doc="",
        grammar="a size",
        gpu=(),
        cpu=(),
        quick=("-1", "1000"),
        providers=("ours", "eager"),
        read=int,
        make=make,
        targets=(cases.Target("peak", "1000", "ours", "peak_bytes", mode="forward", most=4100),),
    )
    assert bench.run(made, bench.parser(made).parse_args(["--quick", f"--out={tmp_path}"])) == 1
    printed = capsys.readouterr().out
    assert "note: -1: RuntimeError: " in printed
    rows = {(row["provider"], row["mode"]): row for row in rows_of(tmp_path, "made")}
    assert len(rows) == 6
    # the product, 4000 bytes, and the scalar; in the backward, the gradient is another 4000, and it is returned
    forward, both, backward = (int(rows["ours", mode]["peak_bytes"]) for mode in ("forward", "both", "backward"))
    assert 4000 <= forward < 4100 and 0 <= both < 100 and 0 <= backward < 100
    assert int(rows["eager", "both"]["peak_bytes"]) > 4000
    assert f"target peak<=4100 reached {forward}.00: yes" in printed
    assert (rows["ours", "both"]["bytes"], rows["ours", "backward"]["bytes"]) == ("8000", "")
    assert rows["ours", "backward"]["roofline"] == "" and float(rows["ours", "both"]["roofline"]) > 0


def test_a_graph_is_warmed_up_captured_and_replayed(load: Any, monkeypatch: pytest.MonkeyPatch):
    harness, calls = load("harness"), []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def capture(graph: Any):
        calls.append("capture")
        yield
        calls.append("captured")

    def event_ms(steps: Any, rounds: int, seconds: float) -> dict[str, list[float]]:
        steps["graph"]()
        return {"graph": [rounds, seconds]}

    cuda = harness.torch.cuda
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": contextlib.nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: calls.append("replay")),
        "graph": capture,
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(harness, "event_ms", event_ms)
    assert harness.graph_ms(lambda: calls.append("step"), 7, 0.5) == [7, 0.5]
    assert calls == ["step"] * 3 + ["capture", "step", "captured", "replay"]


def test_launches_are_what_runs_on_the_gpu(load: Any, monkeypatch: pytest.MonkeyPatch):
    harness = load("harness")
    kinds = torch.autograd.DeviceType  # type: ignore[attr-defined]
    seen = [(kinds.CPU, False), (kinds.CUDA, False), (kinds.CUDA, True), (kinds.CUDA, False)]  # the third: a range
    events = [SimpleNamespace(device_type=kind, is_user_annotation=named) for kind, named in seen]
    recorded = SimpleNamespace(events=lambda: events)
    monkeypatch.setattr(harness, "profile", lambda activities: contextlib.nullcontext(recorded))
    monkeypatch.setattr(harness.torch.cuda, "synchronize", lambda: None)
    steps = []
    assert harness.launches(lambda: steps.append(1)) == 2 and len(steps) == 2
    events.clear()
    with pytest.raises(RuntimeError, match="saw no kernel"):
        harness.launches(lambda: None)


def test_plots_are_drawn_from_the_rows(load: Any, tmp_path: Path, monkeypatch: Any, capsys: Any):
    pytest.importorskip("matplotlib")
    plots = load("plots")
    assert load("bench_info_nce").main(["--quick", f"--out={tmp_path}"]) == 0
    folder = tmp_path / "cpu"
    regimes = (folder / "info_nce.csv").read_text(encoding="utf-8").replace("eager", "fused")
    (folder / "info_nce_regimes.csv").write_text(regimes, encoding="utf-8")
    step = "provider,device,torch,commit,median_ms,peak_bytes\nours,x,y,z,1.5,1000\nno_head,x,y,z,3,2000\n"
    (folder / "alignment_step.csv").write_text(step, encoding="utf-8")
    (folder / "empty.csv").write_text("provider,p50_ms\n", encoding="utf-8")
    capsys.readouterr()
    assert plots.main([str(folder)]) == 0
    drawn = sorted(folder.glob("*.png"))
    assert [file.stem for file in drawn] == ["alignment_step", "info_nce", "info_nce_regimes"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in drawn)
    assert "nothing to plot" in capsys.readouterr().out
    assert plots.main([str(tmp_path)]) == 2
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if not installed
    assert plots.main([str(folder)]) == 0 and "matplotlib is not installed" in capsys.readouterr().out
