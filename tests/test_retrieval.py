"""Retrieval accuracy, on vectors that are known."""

from __future__ import annotations

import pytest
import torch

import fastalign.probing.retrieval as module
from fastalign.data.parallel import Pair

VECTORS = {
    "eins": [1.0, 0.1], "one": [2.0, 0.0], "zwei": [0.1, 1.0], "two": [0.0, 3.0], "drei": [0.9, 1.0],
    "three": [5.0, -5.0], "un": [1.0, 0.0], "deux": [1.0, 0.2],
}  # fmt: skip


@pytest.fixture(autouse=True)
def known_vectors(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def encode(model, tokenizer, texts, layer, batch_size):
        calls.append(list(texts))
        return torch.tensor([VECTORS[text] for text in texts])

    monkeypatch.setattr(module, "encode", encode)
    return calls


def pairs(*rows: tuple[str, str, str, int]) -> list[Pair]:
    return [Pair(source, target, language, "en", meaning) for source, target, language, meaning in rows]


def test_accuracy_per_language_and_their_mean(known_vectors: list[list[str]]) -> None:
    german = [("eins", "one", "de", 0), ("zwei", "two", "de", 1), ("drei", "three", "de", 2)]
    french = [("un", "one", "fr", 0), ("deux", "two", "fr", 1)]
    scores = module.retrieval(None, None, pairs(*german, *french), layer=1)  # type: ignore[arg-type]
    assert scores["languages"] == {"de": pytest.approx(2 / 3), "fr": pytest.approx(1 / 2)}
    assert scores["mean"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    [texts] = known_vectors
    assert len(texts) == len(set(texts)) == 8  # every sentence once


def test_a_neighbour_of_equal_meaning_counts() -> None:
    rows = [("eins", "one", "de", 0), ("un", "one", "de", 0), ("zwei", "two", "de", 1)]
    assert module.retrieval(None, None, pairs(*rows), layer=1)["mean"] == 1.0  # type: ignore[arg-type]


def test_choose_pairs_caps_each_direction_and_drops_single_ones() -> None:
    chosen = module.choose_pairs(pairs(*[("x", str(i), "de", i) for i in range(5)], ("y", "z", "fr", 9)), 3)
    assert [pair.target for pair in chosen] == ["0", "1", "2"]
