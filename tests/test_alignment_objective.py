"""The alignment objective: which side anchors, which side learns, and who is nobody's negative."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastalign.objectives import info_nce

TEMPERATURE = 0.2


def states() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(6, 8, generator=generator)
    return source.requires_grad_(), (source.detach() + torch.randn(6, 8, generator=generator)).requires_grad_()


def alignment_loss(source: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
    """Sentences of two tokens, the first of which does not count."""
    hidden = torch.stack([torch.full((12, 8), 600.0), torch.cat([source, target])], dim=1)
    return info_nce.alignment_loss(hidden, torch.tensor([[0, 1]]).expand(12, 2), **options)


def one_way(anchors: torch.Tensor, candidates: torch.Tensor, same: torch.Tensor | None = None) -> torch.Tensor:
    """-log of the share that each anchor gives to its own candidate."""
    cosines = torch.nn.functional.cosine_similarity(anchors.unsqueeze(1), candidates.unsqueeze(0), dim=2)
    weights = (cosines / TEMPERATURE).exp()
    if same is not None:
        weights = weights * ~(same & ~torch.eye(len(anchors), dtype=torch.bool))
    return -(weights.diagonal() / weights.sum(1)).log().mean()


def test_direction_is_from_the_anchor_to_its_candidates():
    source, target = states()
    forward, backward = one_way(source, target), one_way(target, source)
    assert abs(forward - backward) > 1e-3
    expectations: dict[Any, torch.Tensor] = {
        "source_to_target": forward,
        "target_to_source": backward,
        "symmetric": (forward + backward) / 2,
    }
    for direction, expected in expectations.items():
        loss = alignment_loss(source, target, temperature=TEMPERATURE, direction=direction)
        torch.testing.assert_close(loss, expected)
        assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(alignment_loss(source, target, temperature=TEMPERATURE), (forward + backward) / 2)


@pytest.mark.parametrize("direction", ["source_to_target", "target_to_source", "symmetric"])
@pytest.mark.parametrize("side", ["source", "target"])
def test_detach_stops_the_gradient_on_that_side_only(direction, side):
    source, target = states()
    loss = alignment_loss(source, target, temperature=TEMPERATURE, direction=direction, detach=side)
    free = alignment_loss(source, target, temperature=TEMPERATURE, direction=direction)
    torch.testing.assert_close(loss, free)
    stopped, other = (source, target) if side == "source" else (target, source)
    [expected] = torch.autograd.grad(free, [other], retain_graph=True)
    loss.backward()
    assert stopped.grad is not None and stopped.grad.count_nonzero() == 0
    assert other.grad is not None and other.grad.abs().sum() > 0
    torch.testing.assert_close(other.grad, expected)


@pytest.mark.parametrize("direction", ["source_to_target", "target_to_source", "symmetric"])
def test_pairs_of_equal_meaning_are_not_told_apart(direction):
    source, target = states()
    meaning = torch.tensor([7, 1, 7, 3, 1, 2])
    same = meaning.unsqueeze(0) == meaning.unsqueeze(1)
    forward, backward = one_way(source, target, same), one_way(target, source, same)
    parts = {"source_to_target": forward, "target_to_source": backward, "symmetric": (forward + backward) / 2}
    loss = alignment_loss(source, target, temperature=TEMPERATURE, direction=direction, meaning=meaning)
    torch.testing.assert_close(loss, parts[direction])
    unmasked = alignment_loss(source, target, temperature=TEMPERATURE, direction=direction)
    assert loss < unmasked


def test_one_english_sentence_with_its_german_and_french():
    """Where the French twin of a pair moves, the German pair's share of the loss does not change."""
    source, target = (state.detach() for state in states())
    target[2] = target[0]
    moved = source.clone()
    moved[2] = -moved[2]
    meaning = torch.tensor([0, 1, 0, 3, 4, 5])

    def german(french: torch.Tensor) -> torch.Tensor:
        anchor = target[:1].clone().requires_grad_()
        targets = torch.cat([anchor, target[1:]])
        options: dict[str, Any] = {"temperature": TEMPERATURE, "direction": "target_to_source", "meaning": meaning}
        return torch.autograd.grad(alignment_loss(french, targets, **options), [anchor])[0]

    torch.testing.assert_close(german(source), german(moved))
    meaning = torch.arange(6)
    assert not torch.allclose(german(source), german(moved))


@pytest.mark.parametrize(
    "wrong", [{"direction": "both"}, {"direction": None}, {"detach": "sources"}, {"detach": False}, {"temperature": 0}]
)
def test_choices_that_do_not_exist(wrong):
    source, target = states()
    with pytest.raises(ValueError):
        alignment_loss(source, target, **{"temperature": TEMPERATURE, **wrong})
