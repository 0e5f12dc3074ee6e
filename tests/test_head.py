"""A head apart from its decoder is the model's own, or it is refused; tests/test_cross_entropy.py has the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from fastalign.errors import ModelError
from fastalign.model.early_exit import early_exit
from fastalign.model.head import through_head
from tests.families import batch, built


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.embed(input_ids).cumsum(1), self.embed(input_ids))


class Toy(nn.Module):
    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = LlamaConfig(hidden_size=8, num_hidden_layers=4, num_attention_heads=2, vocab_size=64)
        self.model = Decoder(self.config)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.head(*self.model(input_ids)),)

    def head(self, states: torch.Tensor, *_others: torch.Tensor) -> torch.Tensor:
        return states @ self.model.embed.weight.T


class MixesRows(Toy):
    def head(self, states, *_others):
        return states.cumsum(1) @ self.model.embed.weight.T


class TakesMoreThanTheStates(Toy):
    def head(self, states, *others):
        return (states + others[0]) @ self.model.embed.weight.T


class BypassesTheDecoder(Toy):
    def forward(self, input_ids):
        return (self.head(self.model.embed(input_ids).cumsum(1)),)


def logits_of(model: nn.Module) -> torch.Tensor:
    return through_head(model, lambda states, head: head(states.flatten(0, 1)), input_ids=batch()["input_ids"])


def test_an_honest_toy() -> None:
    model = Toy()
    assert torch.equal(logits_of(model), model(batch()["input_ids"])[0].flatten(0, 1))


@pytest.mark.parametrize(
    "kind", [MixesRows, TakesMoreThanTheStates, BypassesTheDecoder], ids=lambda kind: kind.__name__
)
def test_a_head_we_do_not_know_is_refused_with_the_key_that_helps(kind: type[Toy]) -> None:
    model = kind()
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(ModelError, match=r"head that is not one we know.*set task\.logits_memory: whole") as caught:
            logits_of(model)
        assert "\n" not in str(caught.value) and kind.__name__ in str(caught.value)
    assert model.training and "forward" not in vars(model) and "forward" not in vars(model.model)


def test_a_wrapper_that_kept_the_old_forward_is_noticed() -> None:
    class Keeps(nn.Module):
        def __init__(self, module: nn.Module):
            super().__init__()
            self.module, self.kept = module, module.forward

        def forward(self, **inputs: Any) -> Any:
            return self.kept(**inputs)

    with pytest.raises(ModelError, match="wraps it"):
        logits_of(Keeps(Toy()))
    with early_exit(built("llama"), 1), pytest.raises(ModelError, match="already open"):
        logits_of(built("llama"))
