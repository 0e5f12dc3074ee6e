"""Which stream runs when."""

from __future__ import annotations

import pytest

from fastalign.training.schedule import Schedule


@pytest.mark.parametrize(
    ("ratio", "order"),
    [(1, "tatatata"), (2, "taataata"), (3, "taaataaa"), (0.5, "ttattatt"), (1 / 3, "tttattta"), (1.5, "tataatat")],
)
def test_alternate_keeps_the_ratio_and_begins_with_the_task(ratio: float, order: str) -> None:
    schedule = Schedule("alternate", ratio)
    assert "".join(name[0] for step in range(8) for name, _ in schedule.at(step)) == order


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 1, 1.5, 2, 7])
def test_every_stream_counts_its_own_steps_without_gaps(ratio: float) -> None:
    schedule = Schedule("alternate", ratio)
    counts = {"task": 0, "alignment": 0}
    for step in range(200):
        [(name, index)] = schedule.at(step)
        assert index == counts[name]
        counts[name] += 1
    assert counts["alignment"] == pytest.approx(counts["task"] * ratio, abs=1 + ratio)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.75, 1, 1.5, 2, 7])
@pytest.mark.parametrize("task_steps", [1, 2, 5, 40])
def test_steps_hold_exactly_the_task_steps_asked_for(ratio: float, task_steps: int) -> None:
    schedule = Schedule("alternate", ratio)
    assert schedule.task_steps(schedule.steps(task_steps)) == task_steps


def test_other_modes() -> None:
    assert Schedule("joint").at(3) == [("alignment", 3), ("task", 3)]
    assert Schedule("task_only").at(3) == [("task", 3)]
    assert Schedule("align_only").at(3) == [("alignment", 3)]
    assert [Schedule(mode).steps(5) for mode in ("joint", "task_only", "align_only")] == [5, 5, 5]  # type: ignore[arg-type]


def test_streams_that_are_trained_on() -> None:
    used = {
        mode: list(Schedule(mode).streams)  # type: ignore[arg-type]
        for mode in ("alternate", "joint", "task_only", "align_only")
    }
    assert used == {
        "alternate": ["task", "alignment"],
        "joint": ["task", "alignment"],
        "task_only": ["task"],
        "align_only": ["alignment"],
    }
