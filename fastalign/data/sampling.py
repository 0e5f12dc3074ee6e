"""Which rows a stream reads at which step: a pure function of (seed, stream, position).

There is nothing to save and nothing to restore: after a crash, or on another rank, the rows of step k are computed
anew. Positions count rows over the whole run; an epoch is as many positions as there are rows. Within an epoch every
language gets its share (rows ** (1 / temperature), normalised), shuffled, so that batches mix languages; within a
language the rows come in shuffled passes, each row once per pass.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np


def stable_hash(*parts: object) -> int:
    """A 64-bit hash that is the same on every machine and in every process."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def held_out(key: str, share: float) -> bool:
    """Whether the hash of `key` falls into the held-out share; a pure function of the content."""
    return stable_hash("held-out", key) < share * 2**64


class Sampler:
    """An endless, mixed, reproducible order of rows.

    Args:
        languages: language (or language pair) of every row.
        temperature: 1 keeps the shares of the data, ``uniform`` (infinity) gives all languages the same.
        seed, name: of the run and of the stream; different ones give independent orders.
    """

    def __init__(self, languages: Sequence[str], temperature: float | Literal["uniform"], seed: int, name: str):
        groups: dict[str, list[int]] = defaultdict(list)
        for i, language in enumerate(languages):
            groups[language].append(i)
        self.names = sorted(groups)
        self._rows = [np.array(groups[language]) for language in self.names]
        self._seed, self._name, self._size = seed, name, len(languages)
        exponent = 0.0 if temperature == "uniform" else 1.0 / temperature
        self.quotas = _quotas([len(rows) for rows in self._rows], exponent)
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        self._pass = lru_cache(maxsize=2 * len(self.names) + 2)(self._build_pass)

    def __len__(self) -> int:
        """Positions in an epoch: the number of rows."""
        return self._size

    def rows(self, start: int, stop: int) -> list[int]:
        """Row numbers at the positions [start, stop)."""
        picked: list[int] = []
        while start < stop:
            epoch, offset = divmod(start, self._size)
            end = min(self._size, offset + stop - start)
            picked += self._epoch(epoch)[offset:end].tolist()
            start += end - offset
        return picked

    def _build_epoch(self, epoch: int) -> np.ndarray:
        order = np.repeat(np.arange(len(self.names)), self.quotas)
        self._generator("epoch", epoch).shuffle(order)
        rows = np.empty(self._size, dtype=np.int64)
        for group, quota in enumerate(self.quotas):
            size = len(self._rows[group])
            positions = np.arange(epoch * quota, (epoch + 1) * quota)
            picked = np.empty(quota, dtype=np.int64)
            for number in range(positions[0] // size, positions[-1] // size + 1):
                inside = positions // size == number
                picked[inside] = self._pass(group, number)[positions[inside] % size]
            rows[order == group] = picked
        return rows

    def _build_pass(self, group: int, number: int) -> np.ndarray:
        return self._generator("pass", self.names[group], number).permutation(self._rows[group])

    def _generator(self, *parts: object) -> np.random.Generator:
        return np.random.default_rng(stable_hash(self._seed, self._name, *parts))


def _quotas(sizes: list[int], exponent: float) -> list[int]:
    """Positions per epoch of each group: proportional to size ** exponent, at least 1, adding up to sum(sizes)."""
    if exponent == 1.0:
        return list(sizes)
    total = sum(sizes)
    weights = [math.exp(exponent * (math.log(size) - math.log(max(sizes)))) for size in sizes]
    spare = total - len(sizes)  # every group has one position for certain
    shares = [spare * weight / sum(weights) for weight in weights]
    quotas = [1 + int(share) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (int(shares[i]) - shares[i], i))
    for i in by_remainder[: total - sum(quotas)]:
        quotas[i] += 1
    return quotas
