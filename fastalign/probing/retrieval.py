"""Retrieval accuracy: how often a sentence's nearest neighbour in the other language is its translation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from fastalign.data.parallel import Pair
from fastalign.data.tokenization import SentenceTokenizer
from fastalign.model.encode import encode

Scores = dict[str, float | dict[str, float]]


def retrieval(
    model: nn.Module,
    tokenizer: SentenceTokenizer,
    pairs: Sequence[Pair],
    layer: int,
    batch_size: int = 64,
) -> Scores:
    """Accuracy of cosine nearest neighbours, source to target, per direction.

    The candidates of a source are all targets of its direction. A candidate that means the same (equal
    `Pair.meaning`) counts as found. Every sentence is encoded once, however many pairs it is in.

    Returns:
        ``{"mean": mean over the directions, "languages": {direction: accuracy}}``, all from 0 to 1.
    """
    texts = list(dict.fromkeys(text for pair in pairs for text in (pair.source, pair.target)))
    vectors = F.normalize(encode(model, tokenizer, texts, layer, batch_size), dim=1)
    index = {text: i for i, text in enumerate(texts)}
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.direction].append(pair)
    languages = {}
    for direction, group in sorted(groups.items()):
        sources = vectors[[index[pair.source] for pair in group]]
        targets = vectors[[index[pair.target] for pair in group]]
        meaning = torch.tensor([pair.meaning for pair in group])
        found = (sources @ targets.T).argmax(dim=1)
        languages[direction] = (meaning[found] == meaning).float().mean().item()
    return {"mean": sum(languages.values()) / max(len(languages), 1), "languages": languages}


def choose_pairs(pairs: Sequence[Pair], per_direction: int) -> list[Pair]:
    """The first pairs of every direction, at most so many; directions with fewer than two are left out."""
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[pair.direction].append(pair)
    return [pair for group in groups.values() if len(group) > 1 for pair in group[:per_direction]]
