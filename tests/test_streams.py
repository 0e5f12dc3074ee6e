"""The alignment stream: what it pools, what it contrasts, what it leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.config import AlignmentConfig
from fastalign.data.parallel import Pair
from fastalign.data.sampling import Sampler
from fastalign.data.tokenization import SentenceTokenizer
from fastalign.streams.alignment import AlignmentStream

PAIRS = [  # one English sentence with its German and its French, and one of another meaning
    Pair("stelle wecker", "set alarm", "de", "en", 0),
    Pair("mets réveil", "set alarm", "fr", "en", 0),
    Pair("spiele musik", "play music", "de", "en", 1),
]


def stream(model_dir: Path, **settings: Any) -> AlignmentStream:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    config = AlignmentConfig(batch_size=3, temperature=0.5, **settings)
    sampler = Sampler([pair.direction for pair in PAIRS], "uniform", 0, "alignment")
    return AlignmentStream(PAIRS, [], SentenceTokenizer(tokenizer), sampler, config, [2], accumulation=1)


def by_hand(model_dir: Path, negatives: dict[int, list[int]]) -> float:
    """Both directions averaged; `negatives` lists what each anchor is contrasted with, itself included."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0, 1:]
        return states.mean(dim=0) / states.mean(dim=0).norm()

    sources = [vector(pair.source) for pair in PAIRS]
    targets = [vector(pair.target) for pair in PAIRS]
    losses = []
    for anchors, candidates in ((sources, targets), (targets, sources)):
        for i, others in negatives.items():
            scores = torch.stack([anchors[i] @ candidates[j] / 0.5 for j in others])
            losses.append(torch.logsumexp(scores, 0) - anchors[i] @ candidates[i] / 0.5)
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize(
    ("masked", "negatives"),
    [(True, {0: [0, 2], 1: [1, 2], 2: [0, 1, 2]}), (False, {0: [0, 1, 2], 1: [0, 1, 2], 2: [0, 1, 2]})],
)
def test_german_and_french_of_one_english_sentence_are_no_negatives(
    masked: bool, negatives: dict[int, list[int]], model_dir: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    one = stream(model_dir, mask_equal_meaning=masked)
    loss = one.loss(model, one.collate([0, 1, 2]))
    assert loss.item() == pytest.approx(by_hand(model_dir, negatives), rel=1e-4)


def test_micro_batches_are_the_rows_of_the_step_and_about_equal(model_dir: Path) -> None:
    one = stream(model_dir)
    one.rows_per_step, one.micro_batch_size = 11, 4
    batches = one.micro_batches(5, rank=1, world_size=2)
    assert [batch.items for batch in batches] == [3, 4, 4]
    rows = one.sampler.rows((5 * 2 + 1) * 11, (5 * 2 + 2) * 11)
    meanings = torch.cat([batch.inputs["meaning"] for batch in batches]).tolist()
    assert meanings == [PAIRS[row].meaning for row in rows]
