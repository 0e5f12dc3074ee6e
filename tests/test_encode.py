"""Sentence vectors and layer names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastalign.data.tokenization import SentenceTokenizer
from fastalign.errors import ConfigError
from fastalign.model.encode import encode, resolve_layer

TEXTS = ["set alarm", "play music tomorrow", "off", "light on kitchen rain seven"]


@pytest.fixture(scope="module")
def model(model_dir: Path):
    return AutoModelForCausalLM.from_pretrained(model_dir)


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path):
    return AutoTokenizer.from_pretrained(model_dir)


def by_hand(model, tokenizer, text: str, layer: int, first: int) -> torch.Tensor:
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        states = model(**ids, output_hidden_states=True).hidden_states[layer]
    return states[0, first:].mean(dim=0)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_vectors_are_means_without_the_bos_whatever_the_batch(model, tokenizer, batch_size: int) -> None:
    vectors = encode(model, tokenizer, TEXTS, layer=2, batch_size=batch_size)
    expected = torch.stack([by_hand(model, tokenizer, text, 2, first=1) for text in TEXTS])
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    assert vectors.dtype == torch.float32


def test_the_papers_pooling_keeps_the_bos(model, tokenizer) -> None:
    vectors = encode(model, SentenceTokenizer(tokenizer, skip_first_token=False), TEXTS, layer=3)
    expected = torch.stack([by_hand(model, tokenizer, text, 3, first=0) for text in TEXTS])
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)


def test_the_mode_of_the_model_is_left_alone(model, tokenizer) -> None:
    for training in (True, False):
        model.train(training)
        encode(model, tokenizer, TEXTS[:1], layer=1)
        assert model.training is training


def test_no_texts_and_no_such_layer(model, tokenizer) -> None:
    assert len(encode(model, tokenizer, [], layer=1)) == 0
    with pytest.raises(ConfigError):
        encode(model, tokenizer, TEXTS, layer=5)


@pytest.mark.parametrize(
    ("spec", "depth", "layer"),
    [("middle", 32, 16), ("middle", 28, 14), (16, 32, 16), (0.5, 7, 4), (0.01, 8, 1), (0.99, 8, 8)],
)
def test_layer_names(spec: int | float | str, depth: int, layer: int) -> None:
    assert resolve_layer(spec, depth) == layer


@pytest.mark.parametrize("spec", [0, 33, -1])
def test_layers_out_of_range(spec: int) -> None:
    with pytest.raises(ConfigError, match=r"1\.\.32"):
        resolve_layer(spec, 32)
