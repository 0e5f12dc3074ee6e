"""Ranks as a launcher would start them, for tests that start them themselves."""

from __future__ import annotations

import socket

from fastalign.training.launch import Launch


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def place(rank: int, port: int, *, world_size: int = 2, on_host: int = 2) -> Launch:
    """A rank as torchrun would start it, on hosts with `on_host` ranks each."""
    node, local_rank = divmod(rank, on_host)
    return Launch(rank, world_size, local_rank, on_host, f"{node}", f"host-{node}", "127.0.0.1", port, rank == 0)


def environment(of: Launch) -> dict[str, str]:
    numbers = {
        "RANK": of.rank,
        "WORLD_SIZE": of.world_size,
        "LOCAL_RANK": of.local_rank,
        "LOCAL_WORLD_SIZE": of.on_host,
        "GROUP_RANK": of.node,
        "MASTER_PORT": of.port,
    }
    return {"MASTER_ADDR": of.address, **{name: str(number) for name, number in numbers.items()}}
