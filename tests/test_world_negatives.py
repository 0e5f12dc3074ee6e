"""`alignment.negatives: world`: the pairs of all ranks contrast with each other, exactly as on one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from fastalign.objectives.info_nce import alignment_loss_of_vectors
from fastalign.streams.base import with_other_ranks
from tests.rank_cases import SGD, Runs

SIZES = (3, 1, 4)  # pairs of each rank


def _rank(rank: int, folder: str) -> None:
    """Each rank's vectors among those of all: what is gathered, and the gradient that it leaves with this rank."""
    store = dist.FileStore(f"{folder}/store", len(SIZES))  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=len(SIZES))
    parts = torch.load(f"{folder}/parts.pt")
    own = parts[rank].requires_grad_()
    everyone = with_other_ranks(own, dim=-2)
    sources, targets = everyone[0]
    alignment_loss_of_vectors(sources, targets, temperature=0.1).backward()
    torch.save({"everyone": everyone.detach(), "gradient": own.grad}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_each_rank_gets_its_part_of_the_whole_gradient(tmp_path: Path) -> None:
    """Also where the ranks have unequally many pairs."""
    torch.manual_seed(0)
    parts = [torch.randn(1, 2, size, 8) for size in SIZES]
    torch.save(parts, tmp_path / "parts.pt")
    multiprocessing.start_processes(_rank, (str(tmp_path),), nprocs=len(SIZES), start_method="fork")  # type: ignore[attr-defined]
    whole = torch.cat(parts, dim=-2).requires_grad_()
    alignment_loss_of_vectors(*whole[0], temperature=0.1).backward()
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(len(SIZES))]
    assert all(torch.equal(part["everyone"], whole) for part in found)
    torch.testing.assert_close(torch.cat([part["gradient"] for part in found], dim=-2), whole.grad)


EVALUATED = {"eval_share": 0.4}
# Settings of the alignment on one rank and on two, which must train the same adapter.
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one forward on each": ({"micro_batch_size": 8}, {"micro_batch_size": 4}),
    "two ranks accumulate": ({"micro_batch_size": 8}, {"micro_batch_size": 3}),
    "one rank accumulates": ({"micro_batch_size": 3}, {"micro_batch_size": 4}),
    "one way, two layers": (
        {"micro_batch_size": 8, "direction": "target_to_source", "detach": "source", "layer": [1, 3]},
        {"micro_batch_size": 3, "direction": "target_to_source", "detach": "source", "layer": [1, 3]},
    ),
}
WRAPPERS = ("ddp", "zero2-offload", "zero3")
EVALUATING = {**SGD, "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}


@pytest.fixture(scope="module")
def runs(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(model_dir, data_dir, tmp_path_factory.mktemp("world"))
    for wrapper in WRAPPERS:
        for name, (_, two) in PAIRS.items():
            made.add(f"{wrapper} {name}", wrapper, "alternate", alignment={**EVALUATED, **two}, **EVALUATING)
    made.add("rank", "ddp", "alternate", alignment={**EVALUATED, "negatives": "rank"}, **EVALUATING)
    return made.launch()


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_two_ranks_with_half_the_pairs_are_one_with_all(runs: Runs, wrapper: str, name: str) -> None:
    one = runs.one("alternate", alignment={**EVALUATED, **PAIRS[name][0]}, **EVALUATING)
    assert runs.error(f"{wrapper} {name}", one) < 1e-5
    wanted, ours = (json.loads((out / "summary.json").read_text()) for out in (one, runs.two(f"{wrapper} {name}")))
    for stream, row in wanted["streams"].items():
        for key in ("loss_first", "loss_last", "tokens"):
            assert ours["streams"][stream][key] == pytest.approx(row[key], rel=1e-4)
    for key in ("eval_alignment_loss", "eval_retrieval"):
        assert ours["evaluation"][key] == pytest.approx(wanted["evaluation"][key], rel=1e-4)


@pytest.mark.slow
def test_negatives_of_the_rank_train_something_else(runs: Runs) -> None:
    one = runs.one("alternate", alignment={**EVALUATED, "micro_batch_size": 8}, **EVALUATING)
    assert runs.error("rank", one) > 1e-2
