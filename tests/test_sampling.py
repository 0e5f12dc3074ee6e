"""The order of rows: every row once per pass, languages by their quotas, and a pure function of its arguments."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from fastalign.data.sampling import Sampler, held_out, stable_hash
from fastalign.errors import DataError

UNEVEN = ["de"] * 7 + ["fr"] * 50 + ["kk"] * 2 + ["no"] * 41


def epoch_of(sampler: Sampler, number: int) -> list[int]:
    return sampler.rows(number * len(sampler), (number + 1) * len(sampler))


@pytest.mark.parametrize("temperature", [1, 1.0])
def test_every_row_once_per_epoch_at_temperature_1(temperature):
    sampler = Sampler(UNEVEN, temperature, 0, "task")
    orders = [epoch_of(sampler, number) for number in range(5)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5


@pytest.mark.parametrize("temperature", ["uniform", 0.5, 1.0, 1.7, 5.0, float("inf")])
def test_every_row_once_per_pass_whatever_the_temperature(temperature):
    """A language's rows come in passes over the language, also where a pass ends in the middle of an epoch."""
    sampler = Sampler(UNEVEN, temperature, 3, "x")
    drawn = [row for number in range(40) for row in epoch_of(sampler, number)]
    for language in set(UNEVEN):
        own = [i for i, name in enumerate(UNEVEN) if name == language]
        stream = [row for row in drawn if UNEVEN[row] == language]
        passes = [stream[i : i + len(own)] for i in range(0, len(stream) - len(own) + 1, len(own))]
        assert all(sorted(one) == own for one in passes) and passes
        if len(own) > 5:
            assert len({tuple(one) for one in passes}) == len(passes), "each pass has its own order"


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        ("uniform", [25, 25, 25, 25]),
        (float("inf"), [25, 25, 25, 25]),
        (1.0, [7, 50, 2, 41]),
        # rows ** (1 / 2): 2.646, 7.071, 1.414, 6.403 of 17.534
        (2.0, [15, 40, 8, 37]),
        (0.01, [1, 97, 1, 1]),  # the largest alone, but every language once
    ],
)
def test_quotas_follow_the_temperature_and_add_up(temperature, expected):
    sampler = Sampler(UNEVEN, temperature, 0, "x")
    assert sampler.names == ["de", "fr", "kk", "no"]
    assert sampler.quotas == expected
    for number in range(3):
        counts = Counter(UNEVEN[row] for row in epoch_of(sampler, number))
        assert [counts[name] for name in sampler.names] == expected


def test_quotas_are_the_exact_shares_to_within_one():
    import random

    generator = random.Random(0)
    for _ in range(300):
        sizes = [generator.choice([1, 2, 5, 30, 400]) for _ in range(generator.randint(1, 12))]
        temperature = generator.choice([0.3, 1.0, 1.3, 3.0, 50.0])
        languages = [f"{i:02}" for i, size in enumerate(sizes) for _ in range(size)]
        quotas = Sampler(languages, temperature, 0, "x").quotas
        weights = [size ** (1 / temperature) for size in sizes]
        shares = [len(languages) * weight / sum(weights) for weight in weights]
        assert sum(quotas) == len(languages) and min(quotas) >= 1
        lifted = sum(1 for share in shares if share < 1)  # these get one position, at the cost of the largest
        assert all(abs(quota - max(share, 1)) <= 1 + lifted for quota, share in zip(quotas, shares, strict=True))
        if not lifted:
            assert all(abs(quota - share) < 1 for quota, share in zip(quotas, shares, strict=True))


def test_languages_are_mixed_within_a_batch():
    sampler = Sampler(["de"] * 500 + ["fr"] * 500 + ["sw"] * 20, "uniform", 0, "x")
    batches = [sampler.rows(i * 30, (i + 1) * 30) for i in range(34)]
    languages = [{"de" if row < 500 else "fr" if row < 1000 else "sw" for row in batch} for batch in batches]
    assert all(len(names) == 3 for names in languages)


def test_any_range_is_the_same_part_of_the_same_order():
    sampler = Sampler(UNEVEN, 1.5, 0, "x")
    whole = sampler.rows(0, 1000)
    assert len(whole) == 1000
    for start, stop in ((0, 1), (99, 101), (250, 777), (5, 5), (999, 1000)):
        assert Sampler(UNEVEN, 1.5, 0, "x").rows(start, stop) == whole[start:stop]
    assert [row for start in range(0, 1000, 7) for row in sampler.rows(start, min(start + 7, 1000))] == whole
    assert sampler.rows(0, 1000) == whole, "nothing is remembered that changes it"
    far = 10**12
    assert sampler.rows(far, far + 250) == Sampler(UNEVEN, 1.5, 0, "x").rows(far, far + 250)


def test_ranks_read_disjoint_parts():
    """As streams ask for them: rank r of W takes the r-th part of every step."""
    sampler = Sampler(UNEVEN, 1.0, 0, "x")
    world, size = 4, 5
    parts = [
        [
            row
            for step in range(5)
            for row in sampler.rows((step * world + rank) * size, (step * world + rank + 1) * size)
        ]
        for rank in range(world)
    ]
    assert sorted(row for part in parts for row in part) == list(range(100))


def test_seed_name_and_epoch_give_other_orders():
    orders = [tuple(Sampler(UNEVEN, 1.0, seed, name).rows(0, 100)) for seed in (0, 1) for name in ("task", "alignment")]
    assert len(set(orders)) == 4
    assert sum(i == row for i, row in enumerate(orders[0])) < 10, "it is shuffled"
    sampler = Sampler(UNEVEN, 1.0, 0, "x")
    languages = [[UNEVEN[row] for row in epoch_of(sampler, number)] for number in range(2)]
    assert languages[0] != languages[1]


def test_one_language_and_one_row():
    assert Sampler(["de"], "uniform", 0, "x").rows(3, 6) == [0, 0, 0]
    assert sorted(Sampler(["de"] * 3, "uniform", 0, "x").rows(0, 3)) == [0, 1, 2]
    with pytest.raises(DataError, match="x: there are no rows"):
        Sampler([], 1.0, 0, "x")


def test_the_order_is_the_same_in_every_process():
    code = (
        "from fastalign.data.sampling import Sampler, stable_hash, held_out\n"
        f"s = Sampler({UNEVEN!r}, 1.5, 7, 'alignment')\n"
        "print(s.rows(350, 650), stable_hash('a', 1), [held_out(str(i), 0.3) for i in range(50)])"
    )
    outputs = set()
    for seed in ("0", "1", "random"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        outputs.add(run.stdout)
    here = Sampler(UNEVEN, 1.5, 7, "alignment").rows(350, 650)
    held = [held_out(str(i), 0.3) for i in range(50)]
    assert outputs == {f"{here} {stable_hash('a', 1)} {held}\n"}


def test_stable_hash():
    assert stable_hash("a", 1) == stable_hash("a", "1") != stable_hash("a1")
    assert stable_hash("größe", 1) == 5_316_501_246_609_696_237, (
        "a change would reshuffle everything and mix held-out rows in"
    )
    stable_hash("\ud800")  # a lone surrogate has a hash, too


def test_held_out_takes_its_share():
    keys = [f"row {i}" for i in range(10_000)]
    assert sum(held_out(key, 0.1) for key in keys) == pytest.approx(1000, abs=120)  # 4 standard deviations
    assert not any(held_out(key, 0.0) for key in keys) and all(held_out(key, 1.0) for key in keys)
    assert all(held_out(key, 0.2) for key in keys if held_out(key, 0.1)), "a larger share keeps the smaller one"


@pytest.mark.parametrize("temperature", ["uniform", 1.0])
def test_many_rows_and_a_tiny_language_in_no_time(temperature):
    """Under uniform sampling a language of three rows goes through tens of thousands of passes in an epoch."""
    languages = ["de"] * 100_000 + ["kk"] * 3 + ["fr"] * 20_000
    started = time.perf_counter()
    sampler = Sampler(languages, temperature, 0, "x")
    drawn = epoch_of(sampler, 0)
    assert time.perf_counter() - started < 3  # measured: 0.1 s
    assert len(drawn) == 120_003
    counts = Counter(row for row in drawn if 100_000 <= row < 100_003)
    assert max(counts.values()) - min(counts.values()) <= 1
    started = time.perf_counter()
    for step in range(200):
        sampler.rows(step * 32, step * 32 + 32)
    assert time.perf_counter() - started < 0.5, "an epoch is made once"
