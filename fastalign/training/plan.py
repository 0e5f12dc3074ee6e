"""What a run is going to do, step by step and row by row: checked, and said, before its first step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fastalign.data.streaming import BLOCK, StreamedRows
from fastalign.data.text import listed
from fastalign.errors import ConfigError
from fastalign.streams.base import Stream
from fastalign.training.schedule import Schedule

LANGUAGES_SHOWN = 12


def total_steps(schedule: Schedule, streams: Mapping[str, Stream], args: Any) -> int:
    """Optimizer steps of the run: `max_steps`, or those that `num_train_epochs` of the schedule's first stream take.

    Raises:
        ConfigError: a stream of the schedule gets no step.
    """
    steps = args.max_steps
    if steps <= 0:
        streamed = [name for name in schedule.streams if isinstance(streams[name].train, StreamedRows)]
        if streamed:
            raise ConfigError(
                f"{streamed[0]}.data.streaming: nobody knows how long a stream is; set training.max_steps"
            )
        epoch = streams[schedule.streams[0]].steps_per_epoch(args.world_size)
        steps = max(1, schedule.steps(math.ceil(args.num_train_epochs * epoch)))
    for name, count in schedule.counts(steps).items():
        if count == 0:
            raise ConfigError(
                f"schedule: none of the {steps} steps is one of the {name} stream (mode {schedule.mode}, ratio "
                f"{schedule.ratio:g}); change schedule.ratio, take more steps, or set schedule.mode: task_only"
            )
    return steps


def plan(schedule: Schedule, streams: Mapping[str, Stream], steps: int, world_size: int) -> dict[str, dict[str, Any]]:
    """Per stream of the schedule, and for each of its steps on all ranks together.

    Returns:
        ``{stream: {"rows", "languages": {language: rows}, "held_out", "steps", "rows_per_step", "micro_batch_size",
        "passes"}}``; passes: how often every row is read on average. Of a stream rows and passes are None, for nobody
        knows them, and the languages are those of the first rows.
    """
    planned = {}
    for name, count in schedule.counts(steps).items():
        stream = streams[name]
        per_step = stream.rows_per_step * world_size
        first = stream.train.sample if isinstance(stream.train, StreamedRows) else stream.train
        planned[name] = {
            "rows": None if isinstance(stream.sampler, StreamedRows) else len(stream.sampler),
            "languages": dict(Counter(map(stream.language, first))),
            "held_out": len(stream.held_out),
            "steps": count,
            "rows_per_step": per_step,
            "micro_batch_size": stream.micro_batch_size,
            "passes": None if isinstance(stream.sampler, StreamedRows) else count * per_step / len(stream.sampler),
        }
    return planned


def plan_lines(planned: Mapping[str, Mapping[str, Any]], streams: Mapping[str, Stream]) -> list[str]:
    """The plan of `plan` in words, and what in it may surprise."""
    lines = []
    for name, row in planned.items():
        noun = "pairs" if name == "alignment" else "rows"
        common = sorted(row["languages"].items(), key=lambda item: (-item[1], item[0]))
        shown = ", ".join(f"{language} {count:,}" for language, count in common[:LANGUAGES_SHOWN])
        more = f" and {len(common) - LANGUAGES_SHOWN} more" if len(common) > LANGUAGES_SHOWN else ""
        if row["rows"] is None:
            lines.append(
                f"{name}: {noun} are streamed (the first {BLOCK:,} rows have {shown}{more}), {row['held_out']:,} held "
                f"out; {row['steps']:,} steps of {row['rows_per_step']:,} {noun}"
            )
            continue
        lines.append(
            f"{name}: {row['rows']:,} {noun} ({shown}{more}), {row['held_out']:,} held out; {row['steps']:,} steps of "
            f"{row['rows_per_step']:,} {noun}: {row['passes']:.2g} passes"
        )
        if row["rows_per_step"] > row["rows"]:
            lines.append(
                f"{name}: a step takes {row['rows_per_step']:,} {noun} but there are {row['rows']:,}, so they repeat "
                "within a step" + ("; a repeated pair is no negative of itself" if name == "alignment" else "")
            )
        held_out = map(streams[name].language, streams[name].held_out)
        gone = sorted({*held_out} - row["languages"].keys())
        if gone:
            lines.append(f"{name}: no {noun} to train on in {listed(gone)}, only held-out ones")
    return lines
