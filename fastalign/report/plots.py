"""Plots: curves and grouped bars.

Series differ in more than colour: by marker and dashes, or by hatching.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastalign.report.drawing import FONT_SIZE, LETTER, WIDTH, Colours, Plot, plot_height
from fastalign.report.text import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SERIES_COLOURS = 6
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (6, 2, 1.2, 2)), (0, (3, 1.5)), (0, (9, 2)))
HATCHES = (None, "///", "\\\\\\", "xxx", "---", "|||")
MARKED = 24  # points of a curve up to which each has a marker
LONGEST_NAME, LONGEST_GROUP = 48, 24  # characters
WIDEST = 6000.0  # points


@dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
        x, y: of equal length; a None, NaN or infinity in y is a gap.
        low, high: of equal length too, the borders of a band around it.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None

    def __post_init__(self) -> None:
        if (self.low is None) != (self.high is None):
            raise ValueError(f"series {self.name!r} has one border of a band without the other")
        for name in ("y", "low", "high"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.x):
                raise ValueError(f"series {self.name!r}: {len(values)} values of {name} for {len(self.x)} of x")


def lines(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str,
    caption: str = "",
    marks: Mapping[str, float] | None = None,
) -> Plot:
    """Curves over a common x, such as losses over steps.

    Args:
        marks: places on x that a vertical line shows, by what is written there.
    """
    series = tuple(series)
    names = [one_line(one.name, LONGEST_NAME) for one in series]
    marks = dict(marks or {})

    def draw(axes: Axes, colours: Colours) -> None:
        from matplotlib.ticker import MaxNLocator

        for place, (one, name) in enumerate(zip(series, names, strict=True)):
            colour = colours[f"s{place % SERIES_COLOURS}"]
            x, y = list(map(float, one.x)), _finite(one.y)
            if one.low is not None and one.high is not None:
                axes.fill_between(x, _finite(one.low), _finite(one.high), color=colour, alpha=0.2, linewidth=0)
            axes.plot(
                x, y, color=colour, linewidth=1.6, label=_shown(name), marker=MARKERS[place % len(MARKERS)],
                markersize=4, markevery=max(1, len(x) // MARKED), linestyle=DASHES[place % len(DASHES)],
            )  # fmt: skip
        for name, x in marks.items():
            axes.axvline(x, color=colours["ink"], linewidth=0.9, linestyle=(0, (2, 2)))
            axes.annotate(
                one_line(name, LONGEST_NAME), (x, 1), xycoords=("data", "axes fraction"), xytext=(3, -2),
                textcoords="offset points", va="top", color=colours["ink"], fontsize=FONT_SIZE - 1,
            )  # fmt: skip
        axes.grid(color=colours["rule"], linewidth=0.7)
        axes.set_xlabel(one_line(x_label, LONGEST_NAME))
        axes.set_ylabel(one_line(y_label, LONGEST_NAME))
        if all(float(x).is_integer() for one in series for x in one.x):
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))

    about = f"Curves of {y_label} over {x_label}: {', '.join(one.name for one in series)}."
    return Plot(title, about, caption, WIDTH, plot_height(names, WIDTH), draw)


def bars(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    y_label: str,
    title: str,
    spread: Mapping[str, Sequence[tuple[float, float] | None]] | None = None,
    points: Mapping[str, Sequence[Sequence[float]]] | None = None,
    caption: str = "",
) -> Plot:
    """Groups of bars, such as a score per language for two arms.

    Args:
        groups: what stands below each group.
        series: by name, a value for each group; None, NaN and infinity leave a dash where the bar would be.
        spread: by name, from where to where an error bar goes, for each group.
        points: by name, single values that are drawn over the bar, for each group.
    """
    groups, series = tuple(groups), dict(series)
    spread, points = dict(spread or {}), dict(points or {})
    for what in (series, spread, points):
        for name, values in what.items():
            if len(values) != len(groups) or name not in series:
                raise ValueError(f"series {name!r}: {len(values)} values for {len(groups)} groups, or no bars of it")
    names = {name: one_line(name, LONGEST_NAME) for name in series}
    labels = [one_line(group, LONGEST_GROUP) for group in groups]
    width = min(WIDEST, max(WIDTH, 60 + len(groups) * (10 + 9 * len(series))))
    longest = max(map(len, labels), default=0) * LETTER
    slanted = longest > 0.92 * (width - 50) / max(1, len(groups))

    def draw(axes: Axes, colours: Colours) -> None:
        thick = 0.8 / max(1, len(series))
        for place, (name, values) in enumerate(series.items()):
            fill, ink = colours[f"s{place % SERIES_COLOURS}"], colours["ink"]
            x = [group + (place - (len(series) - 1) / 2) * thick for group in range(len(groups))]
            y = _finite(values)
            axes.bar(
                x, y, 0.92 * thick, color=fill,
                edgecolor=colours["page"], linewidth=0, hatch=HATCHES[place % len(HATCHES)], label=_shown(names[name]),
            )  # fmt: skip
            for at, value in zip(x, y, strict=True):
                if math.isnan(value):
                    axes.annotate("–", (at, 0), ha="center", va="bottom", color=ink)
            for at, ends in zip(x, spread.get(name, [None] * len(x)), strict=True):
                if ends is None or not all(map(math.isfinite, ends)):
                    continue
                for colour, stroke in ((colours["page"], 2.6), (ink, 1.1)):  # a rim, to be seen on a dark bar
                    axes.errorbar(
                        at, sum(ends) / 2, abs(ends[1] - ends[0]) / 2, fmt="none", color=colour, elinewidth=stroke,
                        capsize=2 + (stroke - 1.1) / 2, capthick=stroke,
                    )  # fmt: skip
            for at, singles in zip(x, points.get(name, [()] * len(x)), strict=True):
                axes.plot(
                    [at] * len(singles), _finite(singles), linestyle="none", marker="o", markersize=3,
                    color=colours["page"], markeredgecolor=ink, markeredgewidth=0.9,
                )  # fmt: skip
        axes.axhline(0, color=colours["ink"], linewidth=0.8)
        axes.grid(axis="y", color=colours["rule"], linewidth=0.7)
        axes.tick_params(axis="x", length=0)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_xticks(
            range(len(groups)), labels, rotation=40 if slanted else 0, ha="right" if slanted else "center",
            rotation_mode="anchor" if slanted else None,
        )  # fmt: skip
        axes.set_ylabel(one_line(y_label, LONGEST_NAME))

    about = f"Bars of {y_label} for {', '.join(groups)}: {', '.join(series)}."
    height = plot_height(list(names.values()), width) + (0.6 * longest if slanted else 0)
    return Plot(title, about, caption, width, height, draw)


def _finite(values: Sequence[float | None]) -> list[float]:
    return [float(value) if value is not None and math.isfinite(value) else math.nan for value in values]


def _shown(name: str) -> str:
    """A name that the legend shows: it leaves out those that begin with an underscore."""
    return f"\u200b{name}" if name.startswith("_") or not name else name
