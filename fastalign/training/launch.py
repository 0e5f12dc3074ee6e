"""What a launcher has told this process: its rank, its place on the host, and where rank 0 is; and the way there."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from errno import EHOSTUNREACH, ENETUNREACH
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psutil
import torch

from fastalign.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

Answer = TypeVar("Answer")
SAID_AFTER = 10.0  # seconds of waiting until it is said what for
ANSWER = 30.0  # seconds until a store that can be reached, but says nothing, counts as something else
NO_WAY = 10.0  # seconds until a name that nobody knows, or a host without a route, counts as a mistake
INTERFACE = "GLOO_SOCKET_IFNAME"  # the network of ranks on the CPU; NCCL has a variable and a choice of its own


@dataclass(frozen=True)
class Launch:
    """A process of several.

    Attributes:
        rank, world_size: its number among all, and how many these are.
        local_rank: its number on this host.
        on_host: processes on this host, as far as the launcher tells.
        node: what ranks of one host have in common, and no others.
        host: name of this host.
        address, port: where rank 0 listens.
        serves: whether this process does so; else it is rank 0, or the launcher itself.
    """

    rank: int
    world_size: int
    local_rank: int
    on_host: int
    node: str
    host: str
    address: str
    port: int
    serves: bool

    @property
    def speaks_first(self) -> bool:
        """Whether it is the first rank of its host."""
        return self.local_rank == 0


def launch_of_environment() -> Launch | None:
    """None for a process that is alone. ConfigError where variables are missing or make no sense."""
    world_size = _number("WORLD_SIZE", 1)
    if world_size < 2:
        return None
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise said_here(
            f"the environment says WORLD_SIZE={world_size}, but not {' and '.join(missing)}: start with torchrun, "
            "deepspeed or accelerate launch, which set all of them, or unset WORLD_SIZE to train alone"
        )
    rank = _number("RANK", 0)
    if rank >= world_size:
        raise said_here(f"the environment says RANK={rank}, but there are {world_size} ranks, counted from 0")
    local_rank = _number("LOCAL_RANK", rank)
    # Of torchrun and accelerate, and of deepspeed.
    on_host = max(_number("LOCAL_WORLD_SIZE", _number("LOCAL_SIZE", 1)), local_rank + 1)
    node = os.environ.get("GROUP_RANK") or os.environ.get("CROSS_RANK") or str(rank - local_rank)
    return Launch(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        on_host=on_host,
        node=node,
        host=socket.gethostname(),
        address=os.environ["MASTER_ADDR"],
        port=_number("MASTER_PORT", 0),
        serves=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not text.isdecimal() or (name == "MASTER_PORT" and int(text) > 65535):
        raise said_here(f"the environment says {name}={text!r}, which cannot be; launchers set it")
    return int(text)


def said_here(text: str) -> ConfigError:
    """An error that the other ranks cannot know of: the first one of each host says it."""
    error = ConfigError(text)
    error.said_here = os.environ.get("LOCAL_RANK", "0") == "0"
    return error


def on_cpu(training: Mapping[str, Any]) -> bool:
    """Whether ranks with this ``training`` section run on CPUs."""
    asked = training.get("use_cpu") or os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    return bool(asked) or not torch.cuda.is_available()


def require_gpus(training: Mapping[str, Any], launch: Launch) -> None:
    """ConfigError where a host has more ranks than GPUs: two ranks cannot share one."""
    count = 0 if on_cpu(training) else torch.cuda.device_count()
    if count and launch.on_host > count:
        gpus = "1 GPU" if count == 1 else f"{count} GPUs"
        raise ConfigError(
            f"{launch.on_host} ranks were started on {launch.host}, which has {gpus} that can be seen: start {count} "
            f"(torchrun --nproc_per_node {count}, deepspeed --num_gpus {count}, or slots={count} in the hostfile), or "
            "set training.use_cpu: true"
        )


def choose_interface(launch: Launch) -> None:
    """Have ranks on CPUs of several hosts talk over the network that leads to rank 0, unless the user names one.

    Left to itself gloo takes the address of the host's name, which often is that of the loopback.

    Raises:
        ConfigError: the user names one that this host does not have.
    """
    addresses = {name: {entry.address for entry in entries} for name, entries in psutil.net_if_addrs().items()}
    named = [name for name in os.environ.get(INTERFACE, "").split(",") if name]
    for name in named:
        if name not in addresses:
            raise ConfigError(
                f"GLOO_SOCKET_IFNAME={name}: {launch.host} has no such network; there are {sorted(addresses)}"
            )
    if named or launch.on_host == launch.world_size:
        return
    with socket.create_connection((launch.address, launch.port), timeout=10) as connection:
        own = connection.getsockname()[0]
    for name, known in addresses.items():
        if own in known and not own.startswith("127.") and own != "::1":
            os.environ[INTERFACE] = name


def store_of(launch: Launch, patience: float) -> TCPStore:
    """The key-value store at rank 0, once it is there. ConfigError where it cannot be reached in `patience` seconds."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined] - not in every build

    if not launch.serves:
        _reach(launch, patience)

    def connect() -> TCPStore:
        return TCPStore(
            launch.address,
            launch.port,
            is_master=launch.serves,
            timeout=timedelta(seconds=ANSWER),
            wait_for_workers=False,
            multi_tenant=True,  # torch has one of its own at this port
            use_libuv=sys.platform != "win32",
        )

    try:
        return within(2 * ANSWER, connect)
    except (RuntimeError, ValueError, TimeoutError) as error:
        where = f"{launch.address}:{launch.port}"
        if "EADDRINUSE" in str(error):
            raise said_here(
                f"port {launch.port} of {launch.host} is taken, perhaps by another run: give all hosts another one "
                "(--master_port)"
            ) from None
        who = "rank 0 cannot listen there; is it an address of this host?" if launch.serves else "rank 0 is not there"
        raise said_here(f"MASTER_ADDR and MASTER_PORT say {where}, but {who} ({first_line(error)})") from None


def _reach(launch: Launch, patience: float) -> None:
    """Wait until rank 0 listens: it may still be starting. ConfigError where it cannot be reached."""
    started, said = time.monotonic(), False
    where = f"{launch.address}:{launch.port}"
    while True:
        try:
            socket.create_connection((launch.address, launch.port), timeout=5).close()
            return
        except (OSError, UnicodeError) as error:  # the latter for what can be no name at all
            number = getattr(error, "errno", None)
            no_way = isinstance(error, (socket.gaierror, UnicodeError)) or number in (EHOSTUNREACH, ENETUNREACH)
            reason = getattr(error, "strerror", None) or str(error)
        waited = time.monotonic() - started
        if waited > (min(NO_WAY, patience) if no_way else patience):
            raise said_here(
                f"{launch.host} cannot reach rank 0 at {where} ({reason}, tried for {waited:.0f} s): see that rank 0 "
                "has been started, that MASTER_ADDR and MASTER_PORT are those of its host, and that no firewall is "
                "between; where hosts have several networks, take the address in the one that they share, which "
                "NCCL_SOCKET_IFNAME (on CPUs GLOO_SOCKET_IFNAME) names"
            )
        if waited > SAID_AFTER and not said and launch.speaks_first:
            said = True
            tell(f"{launch.host}: rank 0 does not answer at {where} yet ({reason}); trying for {patience:.0f} s")
        time.sleep(0.5)


def within(seconds: float, call: Callable[[], Answer]) -> Answer:
    """What `call` returns. TimeoutError where it takes longer; it is left alone then, since nothing can end it."""
    found: list[tuple[Answer | None, Exception | None]] = []

    def run() -> None:
        try:
            found.append((call(), None))
        except Exception as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not found:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    answer, error = found[0]
    if error is not None:
        raise error
    return cast("Answer", answer)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, without the file of its source."""
    line = (str(error).splitlines() or [""])[0]
    return line.rpartition("] ")[2][:200] if "gloo/transport" in line else line[:200]


def tell(line: str) -> None:
    """Of one rank to the user, on stderr."""
    print(line, file=sys.stderr, flush=True)
