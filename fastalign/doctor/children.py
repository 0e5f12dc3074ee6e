"""Every part is tried in a process of its own: a broken native library may raise, end its process, or hang."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from fastalign.errors import mask_secrets, printable

AT_ONCE = 2
LONGEST = 300  # characters of a reason
# The child sees the modules that its parent would see, wherever it is started.
CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1])\n"
    "from fastalign.doctor.trials import answer; answer(sys.argv[2], float(sys.argv[3]))"
)
# Nothing is fetched or sent, also by what a library does when it is imported.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "WANDB_MODE": "disabled",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONIOENCODING": "utf-8",
}
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Answer:
    """What a child said, or what became of it.

    Attributes:
        state: ``ok``, ``missing``, ``broken`` or ``not tried``.
        why: the reason where it is not ok, one line without secrets.
        facts: what the trial found.
        late: it gave no answer within its time.
    """

    state: str
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)
    late: bool = False


@dataclass
class Ended:
    """A process that has ended; `late`: it was ended because its time was over."""

    code: int
    out: str
    err: str
    late: bool


def ask(name: str, limit: float) -> Answer:
    """Run the trial `name` of `fastalign.doctor.trials` in a child, for at most `limit` seconds."""
    command = [sys.executable, "-c", CHILD, json.dumps(sys.path), name, str(limit)]
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER} | QUIET
    try:
        ended = run(command, limit, environment)
    except OSError as error:
        return Answer("broken", f"its process could not be started: {one_line(str(error))}")
    if ended.late:
        return Answer("broken", f"it hangs: no answer within {limit:g} s", late=True)
    try:
        found = json.loads(ended.out)
        return Answer(found["state"], one_line(found["why"]), found["facts"])
    except (ValueError, KeyError, TypeError):
        last = [line for line in ended.err.splitlines() if line.strip()][-1:]
        return Answer("broken", one_line(": ".join([f"it ends its process ({_manner(ended.code)})", *last])))


def ask_all(names: Sequence[str], limit: float) -> dict[str, Answer]:
    """`ask` for each name, `AT_ONCE` at a time, in this order."""
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        futures = {name: pool.submit(ask, name, limit) for name in names}
        return {name: future.result() for name, future in futures.items()}
    except BaseException:  # Ctrl-C does not reach children that have a session of their own
        pool.shutdown(wait=False, cancel_futures=True)
        with _lock:
            for process in _running:
                _end(process)
        raise
    finally:
        pool.shutdown()


def run(command: Sequence[str], limit: float, environment: Mapping[str, str] | None = None) -> Ended:
    """Run a command; when its time is over, end it and whatever it has started. Raises OSError."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=os.name == "posix",
    )
    with _lock:
        _running.add(process)
    late = False
    try:
        out, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        late = True
        _end(process)
        try:
            out, err = process.communicate(timeout=2)
        except subprocess.TimeoutExpired:  # something outside its group holds the pipes
            out, err = b"", b""
    finally:
        with _lock:
            _running.discard(process)
    code = process.returncode if process.returncode is not None else -1
    return Ended(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"), late)


def one_line(text: str) -> str:
    """`text` on one line, without secrets and without what drives a terminal, at most `LONGEST` characters."""
    text = printable(mask_secrets(" ".join(text.split())))
    return text if len(text) <= LONGEST else text[: LONGEST - 5] + "[...]"


_running: set[subprocess.Popen] = set()
_lock = threading.Lock()


def _end(process: subprocess.Popen) -> None:
    if process.returncode is not None:
        return
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _manner(code: int) -> str:
    """How a process has ended, in words."""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
