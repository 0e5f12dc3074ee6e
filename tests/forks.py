"""Real processes of the command line that start at once, for tests that kill them and fill their disk.

Run as a program it imports what training needs and then forks a process for every line of JSON on stdin; `Forks` is
the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
WATCHED = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree", "torch.save")


class Fork:
    """A process that was started. Its output comes through a pipe, which no limit on files can cut."""

    def __init__(self, forks: Forks, pid: int, pipe: int):
        self._forks, self.pid, self._pipe, self._read = forks, pid, pipe, b""

    def wait(self, timeout: float = 120) -> int:
        """Its exit code, or minus the signal that ended it. TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self._forks.ask({"poll": self.pid})) is None:
            self._sleep(deadline)
        return code

    def wait_for(self, text: str, timeout: float = 120) -> None:
        """Until its output holds `text`."""
        deadline = time.monotonic() + timeout
        while text not in self.output:
            self._sleep(deadline)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """What it has printed until now, on stdout and stderr."""
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self._pipe, 65536):
                self._read += part
        return self._read.decode(errors="replace")

    def stop_reading(self) -> None:
        """What it prints from now on meets a broken pipe."""
        os.close(self._pipe)

    def _sleep(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            self.signal(signal.SIGKILL)
            raise TimeoutError(self.output[-2000:])
        time.sleep(0.02)


class Forks:
    """Starts processes that run `fastalign.cli.main`.

    Args:
        folder: for the pipes of what they print.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._count = 0
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.ask({})  # it has imported everything

    def start(self, argv: Sequence[str], **options: Any) -> Fork:
        """A process that runs ``fastalign ARGV``.

        Args:
            argv: of the command line.
            **options: `at`, a regular expression: it kills itself before the operation on files that matches, as
                `_watch` spells it; `nth` (1): before the nth that does. `file_size`: then it goes on instead, but as
                on a disk that is full once a file has that many bytes. `pause`: then it says so instead, and sleeps
                for so many seconds. `trace`: a file to list the operations in. `environment`: variables to add, such as
            those of a launcher. `folder`: to start in.
        """
        self._count += 1
        path = self._folder / f"{self._count}.pipe"
        os.mkfifo(path)
        pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        pid = self.ask({"argv": list(argv), "pipe": str(path), **options})
        return Fork(self, pid, pipe)

    def run(self, argv: Sequence[str], **options: Any) -> tuple[int, str]:
        """Exit code and output of such a process."""
        fork = self.start(argv, **options)
        return fork.wait(), fork.output

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=60)


def _serve() -> None:
    import fastalign.cli
    import fastalign.training.run  # noqa: F401 - so that the forks have it

    for line in sys.stdin:
        request = json.loads(line)
        answer = None
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif request:
            answer = os.fork()
            if answer == 0:
                _run(**request)
        print(json.dumps(answer), flush=True)


def _run(
    argv: list[str],
    pipe: str,
    at: str | None = None,
    nth: int = 1,
    file_size: int | None = None,
    pause: float | None = None,
    trace: str | None = None,
    environment: dict[str, str] | None = None,
    folder: str = ".",
) -> NoReturn:
    """In the forked process: the command line, from the first to the last thing that a process does."""
    from fastalign.cli import main

    with open(os.devnull) as nothing, open(pipe, "w", encoding="utf-8") as output:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment or {})
    os.chdir(folder)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if at or trace:
        _watch(re.compile(at or "^$"), nth, file_size, pause, trace)
    code = 70
    try:
        code = main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _watch(at: re.Pattern[str], nth: int, file_size: int | None, pause: float | None, trace: str | None) -> None:
    """Before each operation on files: write it down as ``os.rename /a /b``; do what `Forks.start` asked for."""
    import resource

    import torch

    count = 0
    out = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if trace else None

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event not in WATCHED or (event == "open" and (args[1] is None or args[1][0] == "r")):
            return
        text = " ".join([event, *(os.fspath(arg) for arg in args if isinstance(arg, (str, os.PathLike)))])
        if out is not None:
            os.write(out, f"{text}\n".encode())
        found = at.search(text)
        count += found is not None
        if not found or count != nth:
            return
        if pause is not None:
            print("paused", flush=True)
            time.sleep(pause)
        elif file_size is None:
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    save = torch.save

    def audited_save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        sys.audit("torch.save", f)  # it writes in C++, unseen
        save(obj, f, *args, **kwargs)

    torch.save = audited_save
    sys.addaudithook(hook)


if __name__ == "__main__":
    _serve()
