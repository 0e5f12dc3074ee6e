"""`fastalign doctor` answers whatever the libraries do, and trusts none of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fastalign_kernels
from fastalign.cli import main
from fastalign.doctor import children, doctor, table, trials, verdict
from fastalign.doctor.children import Answer
from fastalign.doctor.machine import nvidia_gpus, this_machine
from fastalign.doctor.parts import PARTS, row

ROOT = Path(__file__).resolve().parents[1]
RAISES = "raise RuntimeError('no native library\\nsecond line')"
SILENT = "import os; os._exit(3)"
ABORTS = "import os, resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0)); os.abort()"
HANGS = "import time; time.sleep(600)"
HIDES = """
import importlib.machinery, os
find = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in os.environ["HIDDEN"].split() else find(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
"""


def fake(folder: Path, code: str, *names: str) -> Path:
    """A folder with packages of these names that do `code` when they are imported."""
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(code, encoding="utf-8")
    return folder


def by_part(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {told["part"]: told for told in found["rows"]}


def process(*argv: str, **environment: str) -> subprocess.CompletedProcess:
    """`fastalign doctor`, whose PYTHONPATH begins with the one that is given."""
    path = os.pathsep.join(filter(None, [environment.pop("PYTHONPATH", ""), str(ROOT), str(ROOT / "kernels")]))
    return subprocess.run(
        [sys.executable, "-m", "fastalign", "doctor", *argv],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


@pytest.mark.slow
def test_all_of_this_machine() -> None:
    done = process("--json", HF_TOKEN="hf_" + "secret" * 6)
    assert done.returncode == 0, done.stdout
    found = json.loads(done.stdout)
    assert found["problems"] == [] and found["kernels"]["problem"] is None
    assert found["kernels"]["backend"] == "triton" if torch.cuda.is_available() else "torch"
    assert found["versions"]["torch"] == torch.__version__
    states = {name: told["state"] for name, told in by_part(found).items()}
    needed = {name for name, part in PARTS.items() if part.required} | {"bitsandbytes", "attention"}
    assert {states[name] for name in needed} == {"ok"} and states.keys() >= PARTS.keys()
    assert "secretsecret" not in done.stdout + done.stderr and "there (HF_TOKEN)" in done.stdout
    text = " ".join(table(found).split())
    for said in (torch.__version__, "agree with fp64", "Fine-tuning will run on", "nf4): yes", "sdpa"):
        assert said in text


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        (RAISES, "bitsandbytes", "RuntimeError: no native library (in bitsandbytes)"),
        (ABORTS, "deepspeed", "SIGABRT"),
        (SILENT, "triton", "exit code 3"),
        (SILENT, "matplotlib", "exit code 3"),
        ("raise SystemExit(0)", "wandb", "SystemExit: 0"),
        ("print('{}'); import no_such_library", "tensorboard", "No module named 'no_such_library'"),
    ],
)
def test_a_broken_part_is_told_and_the_others_too(
    code: str, name: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.name != "posix" and code is ABORTS:
        pytest.skip("signals as on POSIX")
    monkeypatch.syspath_prepend(str(fake(tmp_path, code, name)))
    monkeypatch.setattr(children, "ask", answered_but(name, children.ask))
    found = doctor([name, "datasets"])
    told = by_part(found)
    assert told[name]["state"] == "broken" and said in told[name]["why"] and "second line" not in told[name]["why"]
    assert name in told[name]["mend"] and told[name]["mend"].startswith("pip ")
    assert told["torch"]["state"] == told["datasets"]["state"] == "ok"
    assert name in table(found) and "Traceback" not in table(found)


def answered_but(name: str, ask: Any) -> Any:
    """`ask` that tries only one part, and takes the others for ok: for tests that are about one."""
    facts = {
        "torch": {"build": "CPU", "threads": 1, "device": "cpu", "gpus": [], "why_no_gpu": None, "version": "99"},
    }
    return lambda asked, limit: ask(asked, limit) if asked == name else Answer("ok", facts=facts.get(asked, {}))


@pytest.mark.parametrize(
    ("code", "said"), [(RAISES, "no native library"), (SILENT, "exit code 3"), (HANGS, "no answer within 2 s")]
)
def test_a_broken_torch_is_waited_for_once(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(fake(tmp_path, code, "torch")))
    begun = time.monotonic()
    found = doctor(["torch", "transformers", "peft", "bitsandbytes", "kernels", "training"], limit=2)
    assert time.monotonic() - begun < 10
    told = by_part(found)
    assert told["torch"]["state"] == "broken" and said in told["torch"]["why"]
    assert {told[name]["state"] for name in ("transformers", "peft", "kernels", "training")} == {"not tried"}
    assert [problem.split(":")[0] for problem in found["problems"]] == ["torch"]
    assert "will not run here" in found["conclusion"][0]
    assert ("--timeout" if code is HANGS else "force-reinstall") in found["conclusion"][-1]


@pytest.mark.skipif(os.name != "posix", reason="groups of processes as on POSIX")
def test_what_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = tmp_path / "pid"
    code = f"import subprocess; p = subprocess.Popen(['sleep', '600']); open({str(pid)!r}, 'w').write(str(p.pid))\n"
    monkeypatch.syspath_prepend(str(fake(tmp_path / "fake", f"{code}p.wait()", "wandb")))
    answer = children.ask("wandb", 1.5)
    assert answer.state == "broken" and answer.late
    stat = Path(f"/proc/{pid.read_text()}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


def test_nothing_but_python_and_yaml(tmp_path: Path) -> None:
    """As after `pip install --no-deps`: what is missing comes with a command, and JSON is only JSON."""
    (tmp_path / "sitecustomize.py").write_text(HIDES, encoding="utf-8")
    libraries = [part.module or part.package or "" for part in PARTS.values()]
    hidden = {"PYTHONPATH": str(tmp_path), "HIDDEN": " ".join([*libraries, "tokenizers", "numpy", "psutil"])}
    done = process("--json", **hidden)
    assert done.returncode == 1 and done.stderr == ""
    found = json.loads(done.stdout)
    told = by_part(found)
    for name, part in PARTS.items():
        if part.aside:
            assert told[name]["state"] == "not needed here" and told[name]["mend"] is None
        elif part.package:
            assert told[name]["state"] == "missing" and told[name]["version"] is None
            assert told[name]["mend"].startswith("pip install ") and part.package in told[name]["mend"]
    assert {"torch", "transformers", "peft", "accelerate"} <= {line.split(":")[0] for line in found["problems"]}
    assert "pip install" in found["conclusion"][-1] and "torch" in found["conclusion"][-1]
    assert found["conclusion"][-1] in table(found).splitlines()


def test_what_a_missing_aside_means_with_gpus() -> None:
    answers = {"torch": Answer("ok", facts={"gpus": [{}, {}]})}
    for name in ("triton", "deepspeed"):
        told = row(name, Answer("missing"), answers, {name: "1.0"})
        assert told["state"] == "missing" and told["mend"] == f'pip install "{name}>=1.0"'


def test_a_part_that_is_too_old() -> None:
    told = row("peft", Answer("ok", facts={"version": "0.9.1"}), {}, {"peft": "0.20"})
    assert told["state"] == "broken" and "older than 0.20" in told["why"] and '"peft>=0.20"' in told["mend"]
    assert row("peft", Answer("ok", facts={"version": "0.20.0.dev0"}), {}, {"peft": "0.20"})["state"] == "ok"


def test_it_finds_kernels_that_are_wrong_or_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = fastalign_kernels.pooled_info_nce
    assert trials.kernel_problem(torch.device("cpu")) is None

    def wrong(hidden, mask, **options):
        return right(hidden, mask, **options) * (1 if hidden.dtype == torch.float64 else 1.001)

    def broken(hidden, mask, **options):
        raise OSError("no ptxas\nsecond line")

    for kernel, said in ((wrong, "wrong results: off by 1.0e-03"), (broken, "OSError: no ptxas")):
        monkeypatch.setattr(fastalign_kernels, "pooled_info_nce", kernel)
        problem = trials.kernel_problem(torch.device("cpu"))
        assert problem and said in problem and "second line" not in problem
    answer = Answer("ok", facts={"backend": "torch", "why": "", "problem": "wrong results"})
    told = row("kernels", answer, {}, {})
    assert told["state"] == "broken" and verdict.problems([told]) == ["kernels: broken; wrong results"]


def test_it_finds_four_bits_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    trials.TRIALS["bitsandbytes"]()
    forward = bnb.nn.Linear4bit.forward
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", lambda self, states: 1.1 * forward(self, states))
    with pytest.raises(ArithmeticError, match="product off by"):
        trials.TRIALS["bitsandbytes"]()


GPU = {"name": "Test GPU", "capability": "9.0", "total": 80e9, "free": 79e9, "bf16": "native", "problem": None}


@pytest.mark.parametrize(
    ("facts", "driver", "state", "said"),
    [
        ({"gpus": [GPU]}, True, "ok", "driver 5.7"),
        ({"gpus": [{**GPU, "bf16": "emulated"}]}, False, "ok", "bf16 emulated"),
        ({"gpus": [{**GPU, "problem": "no kernel image is available"}]}, True, "broken", "no kernel image"),
        ({"build": "CPU"}, True, "broken", "build for the CPU"),
        ({"why_no_gpu": "driver too old"}, True, "broken", "driver too old"),
        ({}, False, "missing", "on the CPU"),
    ],
)
def test_gpus(facts: dict[str, Any], driver: bool, state: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    plain = {"gpus": [], "build": "CUDA 13.0", "threads": 1, "device": "cpu", "why_no_gpu": None}
    answers = {"torch": Answer("ok", facts={**plain, **facts})}
    known = [{"name": "Test GPU", "driver": "5.7", "capability": "9.0"}] if driver else []
    [told] = verdict.device_rows(answers, known)
    assert told["state"] == state and said in told["why"]
    assert bool(told["mend"]) == (state == "broken")
    here, wrong = this_machine(), verdict.problems([told])
    assert bool(wrong) == (state == "broken" and bool(facts.get("gpus")))
    lines = " ".join(verdict.conclusion([told], answers, here, known, {}, wrong))
    assert ("training.fp16=true" in lines) == ("emulated" in said)
    assert ("no GPU" in lines) == (not facts.get("gpus"))


@pytest.mark.skipif(os.name != "posix", reason="a script in place of a program")
def test_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_gpus() == []
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Tesla T4, 535.1, 7.5'\n", encoding="utf-8")
    program.chmod(0o755)
    assert nvidia_gpus() == [{"name": "Tesla T4", "driver": "535.1", "capability": "7.5"}]
    program.write_text("#!/bin/sh\necho 'has failed, because, it could not'\nexit 9\n", encoding="utf-8")
    assert nvidia_gpus() == []


def test_no_secret_in_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "x" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    said = children.one_line(f"GET https://me:{'pass'}word@host\n \x1b[31m {secret} {'long ' * 200}")
    assert secret not in said and "password" not in said and "\x1b" not in said and len(said) <= children.LONGEST


def test_the_exit_code_is_of_the_problems(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    command = "  pip install" + " package" * 40
    for problem in ([], ["torch: missing"]):
        found = {"machine": this_machine(), "rows": [], "conclusion": ["as it is", command], "problems": problem}
        monkeypatch.setattr("fastalign.doctor.doctor", lambda limit, found=found: found)
        assert main(["doctor", "--timeout", "3"]) == len(problem)
        assert capsys.readouterr().out.splitlines()[-2:] == ["as it is", command]  # a command is not broken into lines


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_a_timeout_that_is_none(value: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["doctor", f"--timeout={value}"])
    assert "seconds above 0" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bitsandbytes", "deepspeed", "matplotlib"])
@pytest.mark.parametrize("code", [RAISES, SILENT])
def test_whether_a_broken_part_breaks_a_run_is_tried(name: str, code: str, tmp_path: Path) -> None:
    """The libraries that a run needs import bitsandbytes and deepspeed where they are there, but not matplotlib."""
    done = process("--json", PYTHONPATH=str(fake(tmp_path, code, name)))
    found = json.loads(done.stdout)
    told = by_part(found)
    assert told[name]["state"] == "broken"
    assert (done.returncode, told["training"]["state"]) == ((0, "ok") if name == "matplotlib" else (1, "broken"))
    if name != "matplotlib":
        assert told[name]["mend"] in " ".join(found["conclusion"])
