"""Nothing phones home: seen by Python's own audit events, in a process that is allowed to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from fastalign.config.hub import asking_hub, may_ask_hub, offline

ROOT = Path(__file__).resolve().parents[1]

# Reports every name that is looked up, every address that is not this machine, and every program that is started.
WATCHED = """
import ipaddress, json, os, sys
seen = []
PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
def watch(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        name = arguments[0]
        if name not in (None, "", "localhost", "127.0.0.1", "::1", b"localhost"):
            seen.append((event, str(name)))
    elif event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        if isinstance(address, tuple) and not ipaddress.ip_address(address[0]).is_loopback:
            seen.append((event, str(address)))
    elif event in PROGRAMS and any(word in str(arguments[:2]) for word in ("curl", "wget", "git", "http", "pip")):
        seen.append((event, str(arguments[:2])))
sys.addaudithook(watch)
"""

TRAIN = """
from fastalign.cli import main
codes = [main(["train", *arguments]) for arguments in json.loads(sys.argv[1])]
import threading
[thread.join(20) for thread in threading.enumerate() if thread is not threading.current_thread() and not thread.daemon]
print("SEEN", json.dumps([codes, seen]), file=sys.stderr)
"""


def watched(code: str, argument: Any, home: Path, **environment: str) -> Any:
    """What a process saw that may go online, with caches of its own, so that nothing is there already."""
    allowed = {key: value for key, value in os.environ.items() if "OFFLINE" not in key and not key.startswith("HF_")}
    allowed |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HOME": str(home), **environment}
    command = [sys.executable, "-c", WATCHED + code, json.dumps(argument)]
    done = subprocess.run(command, capture_output=True, text=True, env=allowed, timeout=250)
    lines = [line for line in done.stderr.splitlines() if line.startswith("SEEN")]
    assert lines, done.stderr[-3000:]
    return json.loads(lines[-1].removeprefix("SEEN "))


@pytest.fixture
def arguments(raw_config: dict, tmp_path: Path) -> list[list[str]]:
    """Command lines that train, evaluate, save checkpoints and the adapter: from JSONL and from parquet, full, nf4."""
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in Path(raw_config["alignment"]["data"]).read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    raw_config["alignment"]["data"] = str(tmp_path / "pairs.parquet")
    raw_config["training"] |= {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    raw_config["training"] |= {"save_steps": 1, "report_to": "tensorboard"}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config), encoding="utf-8")
    embeddings = "adapter.target_modules=[q_proj, embed_tokens]"  # peft asks for the base's config when it saves these
    out = [f"training.output_dir={tmp_path / name}" for name in ("full", "nf4")]
    return [[str(path), out[0], embeddings], [str(path), out[1], "model.quantization=nf4"]]


def test_training_from_local_files_opens_no_connection(arguments: list[list[str]], tmp_path: Path) -> None:
    assert watched(TRAIN, arguments, tmp_path / "home") == [[0, 0], []]
    for name in ("full", "nf4"):
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
        assert (tmp_path / name / "checkpoint-2").is_dir()


@pytest.mark.slow
def test_the_watch_sees_what_the_libraries_do_without_the_guard(arguments: list[list[str]], tmp_path: Path) -> None:
    unguarded = """
import contextlib, fastalign.config.hub as hub
@contextlib.contextmanager
def nothing(active=True):
    yield
hub.offline = nothing
"""
    codes, seen = watched(unguarded + TRAIN, arguments, tmp_path / "home")
    assert codes == [0, 0]
    assert any(event == "socket.getaddrinfo" for event, _ in seen), seen  # of which host differs from time to time


class _Hub(BaseHTTPRequestHandler):
    """A hub on this machine with one model, which notes what it is asked for."""

    folder: ClassVar[Path]
    asked: ClassVar[list[str]] = []
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        names = sorted(file.name for file in self.folder.iterdir())
        name = path.rpartition("/")[2]
        if path.startswith("/api/models/some/model/tree/"):
            sizes = {name: (self.folder / name).stat().st_size for name in names}
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            self._answer(json.dumps(tree).encode())
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": name} for name in names]
            self._answer(json.dumps({"id": "some/model", "sha": self.commit, "siblings": siblings}).encode())
        elif path.startswith("/some/model/resolve/") and name in names:
            self._answer((self.folder / name).read_bytes(), name)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    do_HEAD = do_GET

    def _answer(self, content: bytes, etag: str = "x") -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Not on stderr."""


def test_a_hub_is_asked_for_the_model_and_nothing_else(
    arguments: list[list[str]], model_dir: Path, tmp_path: Path
) -> None:
    _Hub.folder = Path(shutil.copytree(model_dir, tmp_path / "hub"))
    (_Hub.folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (_Hub.folder / "modeling_theirs.py").write_text("raise SystemExit")
    _Hub.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        line = [*arguments[0], "model.name_or_path=some/model"]
        codes, seen = watched(TRAIN, [line], tmp_path / "home", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
    assert codes == [0] and seen == []
    assert _Hub.asked and all("some/model" in path for path in _Hub.asked), _Hub.asked
    assert not any(path.endswith((".bin", ".py")) for path in _Hub.asked)
    adapter = json.loads((tmp_path / "full" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "some/model"


def test_settings_are_put_back_and_the_hub_can_be_asked_for_what_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def state() -> tuple[Any, ...]:
        return (
            constants.HF_HUB_OFFLINE,
            datasets.config.HF_HUB_OFFLINE,
            os.environ.get("HF_HUB_OFFLINE"),
            constants.HF_HUB_DISABLE_TELEMETRY,
            datasets.config.HF_UPDATE_DOWNLOAD_COUNTS,
        )

    before = state()
    with pytest.raises(ZeroDivisionError), offline():
        assert state() == (True, True, "1", True, False) and may_ask_hub()
        with asking_hub():
            assert state() == (False, False, None, True, False)
            with offline():
                assert state() == (True, True, "1", True, False)
        assert state() == (True, True, "1", True, False)
        raise ZeroDivisionError
    assert state() == before
    with offline(active=False):  # a run that sends its results to a hub
        assert state() == (False, False, None, True, False)
    assert state() == before


def test_threads_that_overlap_keep_the_guard_and_the_last_one_puts_the_settings_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    def state() -> tuple[bool, str | None]:
        return constants.HF_HUB_OFFLINE, os.environ.get("HF_HUB_OFFLINE")

    first, second = offline(), offline()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        asking = asking_hub()
        one.submit(asking.__enter__).result()
        assert state() == (False, None), "one thread may ask while the other trains"
        one.submit(asking.__exit__, None, None, None).result()
        assert state() == (True, "1")
        one.submit(first.__exit__, None, None, None).result()
        assert state() == (True, "1"), "the other one still trains"
        other.submit(second.__exit__, None, None, None).result()
    assert state() == (False, None)


def test_importing_the_training_is_quiet_and_leaves_the_loggers_as_they_were(tmp_path: Path) -> None:
    code = """
import logging
logging.getLogger("kernels").setLevel(logging.INFO)
import fastalign.training.run
print(logging.getLogger("kernels").level, logging.getLogger("bitsandbytes").level)
"""
    allowed = {key: value for key, value in os.environ.items() if "OFFLINE" not in key and not key.startswith("HF_")}
    allowed |= {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=allowed, timeout=120)
    assert done.stdout.split()[0] == "20" and not done.stderr, done.stderr


def test_who_is_offline_stays_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with offline(), asking_hub():
        assert constants.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1" and not may_ask_hub()


def test_data_that_is_named_by_a_hub_id_may_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import constants

    from fastalign.data.sources import read_sources

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    while_reading: list[bool] = []

    def load(name: str, **_: Any) -> datasets.Dataset:
        while_reading.append(constants.HF_HUB_OFFLINE)
        return datasets.Dataset.from_list([{"prompt": "a", "response": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    with offline():
        assert read_sources("some/data", "task.data")[0].rows == [{"prompt": "a", "response": "b"}]
        assert constants.HF_HUB_OFFLINE
    assert while_reading == [False]
