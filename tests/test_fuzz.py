"""A bounded sample of `fuzz`, which is also run by hand in larger numbers."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    """tests/fuzz.py, which is a program and no test."""
    spec = importlib.util.spec_from_file_location("fuzz", HERE / "fuzz.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def place(fuzz: ModuleType) -> Iterator[Any]:
    with fuzz.ground() as made:
        yield made


def check(outcomes: list[Any]) -> None:
    failed = {f"{outcome.kind}:{outcome.number}": outcome.verdict() for outcome in outcomes if outcome.verdict()}
    assert not failed, failed


@pytest.mark.parametrize("kind", ["configs", "files"])
def test_random_input_gets_one_clear_answer(kind: str, fuzz: ModuleType, place: Any) -> None:
    outcomes = fuzz.campaign(place, kind, range(50), seed=11)
    check(outcomes)
    codes = Counter(outcome.code for outcome in outcomes)
    assert codes[0] >= 10 and codes[2] >= 10, f"the sample is one-sided: {codes}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["configs", "files"])
def test_more_random_input_gets_one_clear_answer(kind: str, fuzz: ModuleType, place: Any) -> None:
    check(fuzz.campaign(place, kind, range(100), seed=12))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["configs", "files"])
def test_the_same_in_processes_of_their_own(kind: str, fuzz: ModuleType, place: Any) -> None:
    check(fuzz.campaign(place, kind, range(5), seed=13, process=True))


@pytest.mark.parametrize(
    ("code", "stderr", "complaint"),
    [
        (2, "", "0 lines"),
        (2, "fastalign: a\nfastalign: b\n", "2 lines"),
        (0, "fastalign: a\n", "1 lines"),
        (1, "fastalign: interrupted\n", "was not stopped by"),
        (3, "fastalign: a\n", "exit code 3"),
        (2, "Traceback (most recent call last):\nfastalign: a\n", "traceback"),
        (2, f"fastalign: {'x' * 2000}\n", "characters"),
    ],
)
def test_the_fuzzer_sees_bad_answers(code: int, stderr: str, complaint: str, fuzz: ModuleType) -> None:
    assert complaint in fuzz.Outcome("configs", 0, code, stderr, 0.1).verdict()
    assert not fuzz.Outcome("configs", 0, 2, "fastalign: a: b\n", 0.1).verdict()
    assert not fuzz.Outcome("configs", 0, 1, "fastalign: the loss at step 1 is nan; rows\n", 0.1).verdict()


def test_the_fuzzer_sees_a_change_of_what_the_user_gave(
    fuzz: ModuleType, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(kind: str, number: int, argv: list[str], work: Path) -> Any:
        (work / "config.yaml").write_text("")
        (work / "new").write_text("")
        (work / "out").mkdir()
        return fuzz.Outcome(kind, number, 0, "", 0.1)

    monkeypatch.setattr(fuzz, "_run_here", spoil)
    changed = place.run("files", 0, 0).changed
    assert {Path(name).name for name in changed} == {"config.yaml", "new"}


def test_a_clone_fuzzes_itself_and_not_what_is_installed(tmp_path: Path) -> None:
    (tmp_path / "fastalign").mkdir()
    (tmp_path / "fastalign" / "__init__.py").write_text("raise SystemExit('the installed one')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(HERE / "fuzz.py"), "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
