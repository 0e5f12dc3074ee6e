"""Random configurations and random data files through the command line: whatever comes in, one clear answer comes out.

    python tests/fuzz.py --configs 500 --files 500 --seed 0 [--processes 20]

A case passes with exit code 0, or with 2 and exactly one line that begins with ``fastalign:``; no traceback, no hang,
nothing changed outside the output folder. Exit code 1 passes only with a line of a run that began well and could not
go on, because a configuration may be valid and still diverge (a learning rate of 1e5) or ask for more memory than
there is. A failing case is printed with its kind and number: `--only configs:17` repeats it alone under the same seed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
for _folder in (ROOT, ROOT / "kernels", ROOT / "tests"):
    sys.path.insert(0, str(_folder))  # before an installed package: a clone tests itself

import conftest  # noqa: E402 - sets the environment that the libraries read at import
import fuzz_cases as cases  # noqa: E402

LIMIT = 20  # seconds a case may take in this process
PROCESS_LIMIT = 90  # and in one of its own, which has to import everything
STOPPED = re.compile(r"out of memory|is -?(nan|inf)\b|no longer finite", re.IGNORECASE)  # with exit code 1


class TimeLimit(BaseException):
    """A case took too long; not an Exception, so that nothing catches it."""


@dataclass
class Outcome:
    """What a case did."""

    kind: str
    number: int
    code: int | None
    stderr: str
    seconds: float
    complaint: str = ""
    changed: list[str] = field(default_factory=list)

    def verdict(self) -> str:
        """Why the case fails, or an empty string."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("fastalign:")]
        if self.complaint:
            return self.complaint
        if "Traceback (most" in self.stderr:
            return "a traceback was printed"
        if self.changed:
            return f"changed outside the output folder: {self.changed[:3]}"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if len(lines) != (1 if self.code else 0):
            return f"exit code {self.code} with {len(lines)} lines"
        if self.code == 1 and not STOPPED.search(lines[0]):
            return f"exit code 1, but the run was not stopped by its numbers or its memory: {lines[0][:300]}"
        if lines and len(lines[0]) > 1200:
            return f"the line has {len(lines[0])} characters: {lines[0][:300]}"
        return ""


class Ground:
    """A model, data files and a folder for cases; removed at the end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model, self.data = folder / "model", folder / "data"
        for part in (self.model, self.data):
            part.mkdir(parents=True)
        conftest.make_model(self.model)
        conftest.make_data(self.data)
        cases.more_data(self.data)
        self.fixed = _state(self.model) | _state(self.data)

    def run(self, kind: str, seed: int, number: int, process: bool = False) -> Outcome:
        """One case: its files are a function of (kind, seed, number)."""
        work = self.folder / "case"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        maker = {"configs": cases.config_case, "files": cases.file_case}[kind]
        argv = maker(random.Random(f"{kind} {seed} {number}"), work, self.model, self.data)
        given = _state(work)
        outcome = (_run_process if process else _run_here)(kind, number, argv, work)
        left = _state(work)
        fixed = _state(self.model) | _state(self.data)
        new = [
            name for name in left.keys() - given if Path(name).relative_to(work).parts[0] not in cases.OUTPUT_FOLDERS
        ]
        changed = [name for name, state in (given | self.fixed).items() if (left | fixed).get(name) != state]
        outcome.changed = sorted(new + changed + sorted(fixed.keys() - self.fixed))
        return outcome


@contextlib.contextmanager
def ground() -> Iterator[Ground]:
    """A `Ground` in a temporary folder, with the working directory put back."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        try:
            yield Ground(Path(folder))
        finally:
            os.chdir(here)


def _state(folder: Path) -> dict[str, tuple[int, int]]:
    """(size, time of the last change) of all that is in a folder."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.exists()}


def _run_here(kind: str, number: int, argv: list[str], work: Path) -> Outcome:
    from fastalign.cli import main

    def stop(*_: Any) -> None:
        raise TimeLimit

    os.chdir(work)
    out, err = io.StringIO(), io.StringIO()
    code, complaint, begun = None, "", time.monotonic()
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except TimeLimit:
        complaint = f"no answer within {LIMIT} s:\n{traceback.format_exc()[-1500:]}"
    except BaseException:
        complaint = f"an exception came through:\n{traceback.format_exc()[-2500:]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return Outcome(kind, number, code, err.getvalue(), time.monotonic() - begun, complaint)


def _run_process(kind: str, number: int, argv: list[str], work: Path) -> Outcome:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    command, begun = [sys.executable, "-m", "fastalign", *argv], time.monotonic()
    try:
        done = subprocess.run(
            command, capture_output=True, cwd=work, env=environment, timeout=PROCESS_LIMIT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Outcome(kind, number, None, "", PROCESS_LIMIT, f"no answer within {PROCESS_LIMIT} s")
    return Outcome(kind, number, done.returncode, done.stderr.decode("utf-8", "replace"), time.monotonic() - begun)


def campaign(
    place: Ground, kind: str, numbers: range, seed: int, process: bool = False, loud: bool = False
) -> list[Outcome]:
    """Runs the cases of a kind; prints those that fail, and with `loud` progress and the exit codes."""
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    for number in numbers:
        outcomes.append(place.run(kind, seed, number, process))
        verdict = outcomes[-1].verdict()
        if verdict:
            print(f"FAILED --only {kind}:{number} --seed {seed}: {verdict}", flush=True)
        if loud and len(outcomes) % 50 == 0:
            print(f"{kind}: {len(outcomes)} of {len(numbers)}, {time.monotonic() - begun:.0f} s", flush=True)
    if loud and outcomes:
        codes = collections.Counter(outcome.code for outcome in outcomes)
        failed = sum(bool(outcome.verdict()) for outcome in outcomes)
        slowest = max(outcomes, key=lambda outcome: outcome.seconds)
        where = " in processes of their own" if process else ""
        print(
            f"{kind}: {len(outcomes)} cases{where}, exit codes {dict(codes)}, {failed} failed, "
            f"slowest {slowest.seconds:.1f} s ({kind}:{slowest.number}), {time.monotonic() - begun:.0f} s"
        )
    return outcomes


def main() -> int:
    """Runs what the command line asks for; 1 if any case failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--configs", type=int, default=0)
    parser.add_argument("--files", type=int, default=0)
    parser.add_argument("--processes", type=int, default=0, help="so many of each kind in processes of their own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="KIND:NUMBER", help="one case, with all that it prints")
    arguments = parser.parse_args()
    with ground() as place:
        if arguments.only:
            kind, _, number = arguments.only.partition(":")
            outcome = place.run(kind, arguments.seed, int(number))
            print(outcome.stderr, f"\nexit code {outcome.code}; {outcome.verdict() or 'passes'}")
            return int(bool(outcome.verdict()))
        outcomes: list[Outcome] = []
        for kind, count in (("configs", arguments.configs), ("files", arguments.files)):
            outcomes += campaign(place, kind, range(count), arguments.seed, loud=True)
            half = (arguments.processes + (kind == "configs")) // 2
            outcomes += campaign(place, kind, range(half), arguments.seed, process=True, loud=True)
    return int(any(outcome.verdict() for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
