"""The demo's results for people: the table of the command line and ``report.html``."""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastalign import report

TITLES = {"task_only": "task only", "aligned": "aligned", "shuffled": "shuffled pairs"}
HOW = (
    "A tiny model read plain text in six languages, then learnt voice commands from English rows only: once without "
    "alignment, once with alignment steps in between, with equally many task updates. Tested on commands whose "
    "sentence patterns and values it has seen neither with labels nor with a translation."
)
Scores = dict[str, dict[str, list[float]]]  # arm, language, one value a seed; in percent


def table(result: Mapping[str, Any]) -> str:
    """What the command line prints."""
    found, intents = _retrieval(result), _intents(result)
    arms = [*intents]
    heads = ["start", *(TITLES[arm] for arm in arms)]
    width = max(12, *(len(head) + 2 for head in heads))
    lines = [
        "",
        *textwrap.wrap(HOW, 100),
        "",
        f"{'':<10}{'translation found, %':>{width * len(heads)}}{'intent right, %':>{width * len(arms)}}",
        f"{'language':<10}" + "".join(f"{head:>{width}}" for head in [*heads, *heads[1:]]),
    ]
    for language in result["languages"]:
        cells = [found[arm].get(language) for arm in ("before", *arms)] + [intents[arm][language] for arm in arms]
        lines.append(f"{language:<10}" + "".join(f"{_cell(values):>{width}}" for values in cells))
    return "\n".join([*lines, *_remarks(result)])


def write_page(out: Path, result: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> None:
    """``report.html``, and ``intents.png`` where there is matplotlib."""
    found, intents = _retrieval(result), _intents(result)
    languages = result["languages"]
    bars = report.bars(
        languages,
        {TITLES[arm]: [_mean(scores[language]) for language in languages] for arm, scores in intents.items()},
        points={TITLES[arm]: [scores[language] for language in languages] for arm, scores in intents.items()}
        if len(result["seeds"]) > 1
        else None,
        y_label="intent right, %",
        title="Intents by language",
        caption=f"Labels were English only. {_seeds(result['seeds'])}",
    )
    parts = [
        report.Text(HOW),
        report.Heading("Intents"),
        _score_table("Share of test commands whose intent is right", intents, languages),
        bars,
        report.Text("\n\n".join(_remarks(result))),
        report.Heading("Retrieval"),
        _score_table(
            f"Share of held-out sentences whose translation into English is found by cosine at layer {result['layer']}",
            found,
            [language for language in languages if language in found["before"]],
        ),
        report.Heading("Training"),
        *[_curve(curves, name) for name in ("task_loss", "alignment_loss")],
        report.Facts({"seeds": ", ".join(map(str, result["seeds"])), **result["versions"]}, "How it was made"),
    ]
    report.write(out / "report.html", "fastalign demo", parts, lead="Labels in English; what of the other languages?")
    if report.plots_available():
        bars.save(out / "intents.png")


def _score_table(caption: str, scores: Scores, languages: Sequence[str]) -> report.Table:
    columns = [report.Column("language"), *(report.Column(TITLES.get(arm, arm), unit="%") for arm in scores)]
    rows = []
    for language in languages:
        means = [_mean(values[language]) for values in scores.values()]
        cells = [
            report.Cell(mean, note=_spread(values[language]), best=mean == max(means))
            for mean, values in zip(means, scores.values(), strict=True)
        ]
        rows.append([language, *cells])
    return report.Table(columns, rows, caption)


def _curve(curves: Sequence[Mapping[str, Any]], name: str) -> report.Plot:
    """A loss over the steps, mean over the seeds, with their range as a band."""
    points: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in curves:
        if row["name"] == name:
            points[row["arm"]][row["step"]].append(row["value"])
    series = [
        report.Series(
            TITLES[arm],
            [*steps],
            [_mean(values) for values in steps.values()],
            [min(values) for values in steps.values()],
            [max(values) for values in steps.values()],
        )
        for arm, steps in points.items()
    ]
    title = name.replace("_", " ").capitalize()
    caption = "The steps of an aligned run are those of both streams." if name == "task_loss" else ""
    return report.lines(series, x_label="step", y_label="loss", title=title, caption=caption)


def _intents(result: Mapping[str, Any]) -> Scores:
    scores: Scores = {}
    for arm in result["runs"][0]["arms"]:
        runs = [run["arms"][arm]["intent_accuracy"] for run in result["runs"]]
        scores[arm] = {language: [100 * run[language] for run in runs] for language in result["languages"]}
    return scores


def _retrieval(result: Mapping[str, Any]) -> Scores:
    arms = result["runs"][0]["arms"]
    first = next(iter(arms))
    wanted = {"before": (first, "before"), **{arm: (arm, "after") for arm in arms}}
    scores: Scores = {}
    for name, (arm, when) in wanted.items():
        runs = [run["arms"][arm]["retrieval"][when]["languages"] for run in result["runs"]]
        scores[name] = {language: [100 * run[language] for run in runs] for language in runs[0]}
    return scores


def _remarks(result: Mapping[str, Any]) -> list[str]:
    intents = _intents(result)
    plain, aligned = intents["task_only"], intents["aligned"]
    others = [language for language in result["languages"] if language != "en"]
    unhelped = [language for language in others if _mean(aligned[language]) <= _mean(plain[language])]
    remarks = [f"No better with alignment here: {', '.join(unhelped)}."] if unhelped else []
    chance = "Six intents, so chance is about 17%."
    return [*remarks, chance]


def _cell(values: Sequence[float] | None) -> str:
    return "-" if values is None else f"{_mean(values):.0f}" + (f" {_spread(values)}" if len(values) > 1 else "")


def _spread(values: Sequence[float]) -> str:
    """Half the range of the seeds; nothing for one seed."""
    return f"± {(max(values) - min(values)) / 2:.0f}" if len(values) > 1 else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _seeds(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"One run, of seed {seeds[0]}."
    return f"Bars: mean over the seeds {', '.join(map(str, seeds))}; dots: each of them."
