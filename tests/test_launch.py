"""What a launcher says of a rank, and the way to rank 0: real sockets of this machine."""

from __future__ import annotations

import os
import socket
import threading
import time

import psutil
import pytest
import torch

from fastalign.errors import ConfigError
from fastalign.training import launch
from fastalign.training.launch import INTERFACE, Launch, choose_interface, launch_of_environment, require_gpus
from tests.launches import free_port, place

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_RANK", "CROSS_RANK")


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*VARIABLES, "MASTER_ADDR", "MASTER_PORT", INTERFACE, "ACCELERATE_USE_CPU"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "3",
    "CROSS_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29500",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"MASTER_ADDR": "", "RANK": ""}, "WORLD_SIZE=4, but not RANK and MASTER_ADDR: start with torchrun"),
        ({"RANK": "4"}, "RANK=4, but there are 4 ranks, counted from 0"),
        ({"RANK": "first"}, "RANK='first', which cannot be"),
        ({"MASTER_PORT": "295000"}, "MASTER_PORT='295000', which cannot be"),
    ],
)
def test_an_environment_that_cannot_be(changes: dict, message: str, clean: pytest.MonkeyPatch) -> None:
    for name, value in {**DEEPSPEED, **changes, "LOCAL_RANK": "0"}.items():
        clean.setenv(name, value)
    with pytest.raises(ConfigError, match=message) as caught:
        launch_of_environment()
    assert caught.value.said_here is True  # though it is not rank 0


def test_the_environments_of_launchers(clean: pytest.MonkeyPatch) -> None:
    assert launch_of_environment() is None
    for name, value in DEEPSPEED.items():
        clean.setenv(name, value)
    found = launch_of_environment()
    assert found is not None and (found.rank, found.world_size, found.local_rank) == (3, 4, 1)
    assert (found.on_host, found.node, found.address, found.port) == (3, "1", "node-0", 29500)
    assert not found.serves and not found.speaks_first
    clean.setenv("RANK", "0")
    assert launch_of_environment().serves  # type: ignore[union-attr]
    clean.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")  # torchrun's own process listens
    assert not launch_of_environment().serves  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 2])
def test_more_ranks_than_gpus(count: int, clean: pytest.MonkeyPatch) -> None:
    clean.setattr(torch.cuda, "is_available", lambda: True)
    clean.setattr(torch.cuda, "device_count", lambda: count)
    gpus = "1 GPU" if count == 1 else "2 GPUs"
    with pytest.raises(
        ConfigError, match=rf"3 ranks were started on host-0, which has {gpus} .*node {count}, .*gpus {count}"
    ):
        require_gpus({}, place(0, 29500, world_size=3, on_host=3))
    require_gpus({}, place(0, 29500, world_size=4, on_host=count))
    require_gpus({"use_cpu": True}, place(0, 29500, world_size=3, on_host=3))
    clean.setattr(torch.cuda, "is_available", lambda: False)
    require_gpus({}, place(0, 29500, world_size=3, on_host=3))


def test_the_network_that_gloo_takes(clean: pytest.MonkeyPatch) -> None:
    """The one that leads to rank 0, where there are several hosts and the user names none."""
    own = [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and not entry.address.startswith("127.")
    ]
    if not own:
        pytest.skip("this machine has no network but the loopback")
    name, address = own[0]
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        one_host = Launch(1, 2, 1, 2, "0", "host", address, port, serves=False)
        choose_interface(one_host)
        assert INTERFACE not in os.environ
        two_hosts = Launch(1, 2, 0, 1, "1", "host", address, port, serves=False)
        choose_interface(two_hosts)
        assert os.environ[INTERFACE] == name
    clean.setenv(INTERFACE, "lo")
    choose_interface(two_hosts)
    assert os.environ[INTERFACE] == "lo"
    clean.setenv(INTERFACE, "nonet7")
    with pytest.raises(ConfigError, match=r"GLOO_SOCKET_IFNAME=nonet7: host has no such network; there are .*lo"):
        choose_interface(one_host)


def test_something_else_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ANSWER", 0.5)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(ConfigError, match=r"not there \(no answer"):
        launch.store_of(place(1, silent.getsockname()[1]), 5)
    assert time.monotonic() - started < 10


def test_it_waits_for_rank_0_and_says_so(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "SAID_AFTER", 0.3)
    port = free_port()
    listeners: list[socket.socket] = []
    timer = threading.Timer(1.5, lambda: listeners.append(socket.create_server(("127.0.0.1", port))))
    timer.start()
    try:
        launch._reach(place(1, port, on_host=1), 30)
    finally:
        timer.join()
        listeners[0].close()
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"host-1: rank 0 does not answer at 127.0.0.1:{port} yet (Connection refused); trying for 30 s"


@pytest.mark.parametrize("address", ["no-such-host.invalid", "a..b"])
def test_a_name_that_nobody_knows_is_not_tried_for_long(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "NO_WAY", 0.2)
    there = Launch(1, 2, 0, 1, "1", "host-1", address, 29500, serves=False)
    with pytest.raises(ConfigError, match=f"host-1 cannot reach rank 0 at {address}:29500") as caught:
        launch._reach(there, 300)
    assert caught.value.said_here is True
