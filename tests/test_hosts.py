"""Two hosts: network namespaces with addresses of their own and a cable between them, and the real launchers in each.

Each has its own host name and working folder. Where the machine does not let us make them, the tests are skipped.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.forks import Forks
from tests.launches import environment, free_port, place

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
ADDRESSES = {"a": "198.51.100.1", "b": "198.51.100.2"}  # kept free for documentation (RFC 5737)
PORT = 29500  # nobody else is in there
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


class Hosts:
    """Hosts `a` and `b`; `folder` is a disk that both see, ``folder/a`` and ``folder/b`` are their own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._running: list[subprocess.Popen] = []
        try:
            for name in ADDRESSES:
                ip("netns", "add", self.space(name))
                ip("-n", self.space(name), "link", "set", "lo", "up")
            end, other = (["cable", "netns", self.space(name)] for name in ADDRESSES)
            ip("link", "add", *end, "type", "veth", "peer", "name", *other)
            for name, address in ADDRESSES.items():
                ip("-n", self.space(name), "addr", "add", f"{address}/24", "dev", "cable")
                ip("-n", self.space(name), "link", "set", "cable", "up")
                (folder / name).mkdir()
        except BaseException:
            self.remove()
            raise

    @staticmethod
    def space(name: str) -> str:
        return f"fastalign-{os.getpid()}-{name}"

    def start(self, name: str, command: list[str], **variables: str) -> subprocess.Popen:
        """`command` on this host, in its own folder, which gets its output as ``log``."""
        here = ["ip", "netns", "exec", self.space(name), "unshare", "--uts"]
        named = ["sh", "-c", f'hostname host-{name} && exec "$@"', "sh", *command]
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            **variables,
        }
        with (self.folder / name / "log").open("w") as log:
            process = subprocess.Popen(
                [*here, *named], stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=self.folder / name
            )
        self._running.append(process)
        return process

    def both(self, launcher: list[str], *arguments: str, **variables: str) -> list[subprocess.Popen]:
        """The same run on both."""
        return [
            self.start(name, [*launcher[:1], "--node_rank", f"{i}", *launcher[1:], "train", *arguments], **variables)
            for i, name in enumerate(ADDRESSES)
        ]

    def log(self, name: str) -> str:
        return (self.folder / name / "log").read_text(errors="replace")

    def lines(self, name: str) -> list[str]:
        """What fastalign has said there; no traceback but that of torchrun, which fails when a rank does."""
        log = self.log(name)
        assert "cli.py" not in log, log
        return [line for line in log.splitlines() if line.startswith("fastalign:")]

    def kill(self, name: str) -> None:
        """Every process of this host at once."""
        for pid in ip("netns", "pids", self.space(name)).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def cable(self, state: str) -> None:
        ip("-n", self.space("b"), "link", "set", "cable", state)

    def remove(self) -> None:
        for name in ADDRESSES:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                self.kill(name)
                ip("netns", "delete", self.space(name))
        for process in self._running:
            process.wait(timeout=30)


def remove_forgotten() -> None:
    """Those of a test run that was killed."""
    for name in re.findall(r"^fastalign-\d+-[ab]", ip("netns", "list"), flags=re.M):
        if not Path(f"/proc/{name.split('-')[1]}").exists():
            ip("netns", "delete", name)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("two hosts need ip (iproute2) and unshare (util-linux)")
    try:
        remove_forgotten()
        ip("netns", "add", Hosts.space("trial"))
        ip("netns", "delete", Hosts.space("trial"))
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces can be made here: {error.stderr.strip()}")
    made = Hosts(tmp_path)
    yield made
    made.remove()


@pytest.fixture
def raw(raw_config: dict, tmp_path: Path) -> dict:
    raw = copy.deepcopy(raw_config)
    raw["adapter"]["dropout"] = 0.1
    raw["training"] |= {"max_steps": 6, "report_to": "none", "output_dir": "out"}
    return raw


def write(raw: dict, path: Path) -> str:
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return str(path)


TORCHRUN = ["torchrun", "--nnodes=2", "--nproc_per_node=1", f"--master_addr={ADDRESSES['a']}", f"--master_port={PORT}"]
TORCHRUN += ["-m", "fastalign"]


def deepspeed(folder: Path) -> list[str]:
    (folder / "hostfile").write_text("host-a slots=1\nhost-b slots=1\n")
    found = ["deepspeed", f"--hostfile={folder / 'hostfile'}", "--no_ssh", f"--master_addr={ADDRESSES['a']}"]
    return [*found, f"--master_port={PORT}", "--module", "fastalign"]


def adapter_of_one_host(forks: Forks, config: str, out: Path) -> bytes:
    """That of two ranks on this machine."""
    port = free_port()
    argv = ["train", config, f"training.output_dir={out}"]
    started = [forks.start(argv, environment=environment(place(rank, port))) for rank in (0, 1)]
    assert [fork.wait() for fork in started] == [0, 0], [fork.output for fork in started]
    return (out / "adapter_model.safetensors").read_bytes()


def wait(running: list[subprocess.Popen], timeout: float = 240) -> list[int]:
    deadline = time.monotonic() + timeout
    return [process.wait(timeout=max(0.1, deadline - time.monotonic())) for process in running]


def wait_for(path: Path, hosts: Hosts, running: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < deadline and running[0].poll() is None, hosts.log("a") + hosts.log("b")
        time.sleep(0.1)


def test_torchrun_on_two_hosts_with_disks_of_their_own(hosts: Hosts, raw: dict, forks: Forks, tmp_path: Path) -> None:
    """DDP; without checkpoints nothing needs to be shared. gloo is told which network to take."""
    config = write(raw, tmp_path / "config.yaml")
    assert wait(hosts.both(TORCHRUN, config, GLOO_SOCKET_IFNAME="cable")) == [0, 0], hosts.log("a") + hosts.log("b")
    assert json.loads((tmp_path / "a" / "out" / "summary.json").read_text())["ranks"] == 2
    assert not [path for path in (tmp_path / "b").rglob("*") if path.is_file() and path.name != "log"]
    found = (tmp_path / "a" / "out" / "adapter_model.safetensors").read_bytes()
    assert found == adapter_of_one_host(forks, config, tmp_path / "one")
    assert hosts.lines("a") == hosts.lines("b") == []


def test_deepspeed_on_two_hosts_with_one_disk(hosts: Hosts, raw: dict, forks: Forks, tmp_path: Path) -> None:
    """ZeRO-2, saved and resumed; each host writes its part of the optimizer. The network is found without a hint."""
    out = tmp_path / "out"
    raw["training"] |= {"save_strategy": "steps", "save_steps": 3, "deepspeed": DEEPSPEED}
    config, shared = write(raw, tmp_path / "config.yaml"), f"training.output_dir={out}"
    launcher = deepspeed(tmp_path)
    assert wait(hosts.both(launcher, config, shared)) == [0, 0], hosts.log("a") + hosts.log("b")
    expected = (out / "adapter_model.safetensors").read_bytes()
    assert expected == adapter_of_one_host(forks, config, tmp_path / "one")
    parts = sorted(path.name for path in (out / "checkpoint-3").rglob("*zero_pp_rank_*_optim_states.pt"))
    assert len(parts) == 2
    shutil.rmtree(out / "checkpoint-6")
    (out / "adapter_model.safetensors").unlink()
    again = [config, shared, "training.resume_from_checkpoint=true"]
    assert wait(hosts.both(launcher, *again)) == [0, 0], hosts.log("a") + hosts.log("b")
    assert json.loads((out / "summary.json").read_text())["resumed_at"] == [3]
    assert (out / "adapter_model.safetensors").read_bytes() == expected


def endless(raw: dict, tmp_path: Path, **training: Any) -> list[str]:
    raw["training"] |= {
        "max_steps": 100_000,
        "save_strategy": "steps",
        "save_steps": 5,
        "disable_tqdm": True,
        **training,
    }
    return [write(raw, tmp_path / "config.yaml"), f"training.output_dir={tmp_path / 'out'}"]


def test_a_host_that_dies(hosts: Hosts, raw: dict, tmp_path: Path) -> None:
    running = hosts.both(TORCHRUN, *endless(raw, tmp_path))
    wait_for(tmp_path / "out" / "checkpoint-5", hosts, running)
    hosts.kill("b")
    assert wait(running[:1], timeout=60) == [1]
    [line] = hosts.lines("a")
    assert "contact with another rank was lost" in line and "continue with training.resume_from_checkpoint=true" in line


def test_a_cable_that_is_pulled_and_a_host_that_cannot_be_reached(hosts: Hosts, raw: dict, tmp_path: Path) -> None:
    """Nothing closes a connection then, so `training.ddp_timeout` decides, also in the groups of DeepSpeed."""
    launcher = deepspeed(tmp_path)
    arguments = endless(raw, tmp_path, ddp_timeout=8, deepspeed=DEEPSPEED)
    running = hosts.both(launcher, *arguments)
    wait_for(tmp_path / "out" / "checkpoint-5", hosts, running)
    hosts.cable("down")
    assert wait(running, timeout=60) == [1, 1], hosts.log("a") + hosts.log("b")
    for name in ADDRESSES:
        [line] = hosts.lines(name)
        assert "contact with another rank was lost (Timed out waiting 8000ms" in line

    late = hosts.start("b", [launcher[0], "--node_rank", "1", *launcher[1:], "train", *arguments])
    assert wait([late]) == [2]
    [line] = hosts.lines("b")
    assert f"host-b cannot reach rank 0 at {ADDRESSES['a']}:{PORT} (" in line and "firewall" in line
