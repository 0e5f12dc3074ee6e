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

from fastalign.errors import DataError


def stable_hash(*parts: object) -> int:
    """A 64-bit hash that is the same on every machine and in every process."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


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
        if not languages:
            raise DataError(f"{name}: there are no rows to draw from")
        groups: dict[str, list[int]] = defaultdict(list)
        for i, language in enumerate(languages):
            groups[language].append(i)
        self.names = sorted(groups)
        self._rows = [np.array(groups[language]) for language in self.names]
        self._seed, self._name, self._size = seed, name, len(languages)
        exponent = 0.0 if temperature == "uniform" else 1.0 / temperature
        self.quotas = _quotas([len(rows) for rows in self._rows], exponent)
        self._epoch = lru_cache(maxsize=2)(self._build_epoch)
        self._block = lru_cache(maxsize=2 * len(self.names))(self._build_block)

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
            rows[order == group] = self._language_rows(group, epoch * quota, (epoch + 1) * quota)
        return rows

    def _language_rows(self, group: int, start: int, stop: int) -> np.ndarray:
        """Rows of one language at its own positions [start, stop)."""
        size = len(self._rows[group]) * self._passes_per_block(group)
        parts = []
        for number in range(start // size, -(-stop // size)):
            first = number * size
            parts.append(self._block(group, number)[max(start - first, 0) : stop - first])
        return np.concatenate(parts)

    def _passes_per_block(self, group: int) -> int:
        """Passes that are shuffled at once: of a language with three rows there may be thousands in an epoch."""
        return max(1, 1024 // len(self._rows[group]))

    def _build_block(self, group: int, number: int) -> np.ndarray:
        passes = np.tile(self._rows[group], (self._passes_per_block(group), 1))
        return self._generator("pass", self.names[group], number).permuted(passes, axis=1).ravel()

    def _generator(self, *parts: object) -> np.random.Generator:
        return np.random.default_rng(stable_hash(self._seed, self._name, *parts))


def _quotas(sizes: list[int], exponent: float) -> list[int]:
    """Positions per epoch of each group: proportional to size ** exponent, at least 1, adding up to sum(sizes)."""
    total = sum(sizes)
    weights = [math.exp(exponent * (math.log(size) - math.log(max(sizes)))) for size in sizes]
    shares = [total * weight / sum(weights) for weight in weights]
    quotas = [max(1, int(share)) for share in shares]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (quotas[i] - shares[i], i))
    while (missing := total - sum(quotas)) > 0:
        for i in by_remainder[:missing]:
            quotas[i] += 1
    for _ in range(-missing):  # the small ones took more than their share
        quotas[max(range(len(sizes)), key=lambda i: quotas[i])] -= 1
    return quotas
