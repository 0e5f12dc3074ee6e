"""Plots of the numbers in benchmarks/results/<device>/*.csv, one PNG beside each: python benchmarks/plots.py [FOLDER]

Of every case, provider and mode it takes the last row, so of the newest run that had it. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import harness

Row = Mapping[str, str]
# A provider has the same colour in every plot.
COLOURS = {"ours": "#c1272d", "twin": "#e9967a", "eager": "#4c72b0", "compile": "#8c8c8c", "inf-cl": "#55a868"}
COLOURS |= {"sentence-transformers": "#8172b2", "fused": "#c1272d", "dense": "#dd8452", "panels": "#937860"}
COLOURS |= {"cached": "#c1272d", "checkpointed": "#4c72b0"}
COLOURS |= {"all_layers": "#4c72b0", "reference": "#8c8c8c", "no_head": "#55a868"}
COLOURS |= {"whole": "#4c72b0", "labels": "#8c8c8c", "linear": "#55a868"}
PANELS = {"p50_ms": "ms, p50 (p10 to p90)", "roofline": "share of measured roofline", "peak_bytes": "peak MB, extra"}


def newest(path: Path) -> list[Row]:
    """The last row of every case, provider and mode that has a time, or the memory of a step."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if any(map(row.get, ("p50_ms", "median_ms", "total_bytes")))]
    return [*{(row.get("case"), row["provider"], row.get("mode")): row for row in rows}.values()]


def distinct(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def bars(axis: Any, rows: Sequence[Row], column: str, title: str) -> None:
    """A group of bars per case, a bar per provider; nothing where the cell is empty."""
    cases, providers = distinct(rows, "case"), distinct(rows, "provider")
    height = 0.8 / len(providers)
    for row in rows:
        if row[column]:
            place = cases.index(row["case"]) + height * providers.index(row["provider"])
            value = float(row[column]) / (1e6 if column == "peak_bytes" else 1)
            spread = None
            if column == "p50_ms":
                spread = [[max(0, value - float(row["p10_ms"]))], [max(0, float(row["p90_ms"]) - value)]]
            axis.barh(place, value, height, color=COLOURS.get(row["provider"]), xerr=spread, ecolor="#00000060")
    axis.set_yticks([place + 0.4 - height / 2 for place in range(len(cases))], cases, fontsize=7)
    axis.invert_yaxis()
    axis.set_xscale("linear" if column == "roofline" else "log" if axis.patches else "linear")
    axis.set_xlabel(title)


def of_kernel(figure: Any, rows: Sequence[Row]) -> None:
    """A row of panels per mode: time, share of the roofline, memory."""
    modes = distinct(rows, "mode")
    groups = len(distinct(rows, "case")) * len(distinct(rows, "provider"))
    figure.set_size_inches(15, len(modes) * (1.2 + 0.16 * groups))
    grid = figure.subplots(len(modes), len(PANELS), sharey="row", squeeze=False)
    for axes, mode in zip(grid, modes, strict=True):
        of_mode = [row for row in rows if row["mode"] == mode]
        for axis, (column, title) in zip(axes, PANELS.items(), strict=True):
            bars(axis, of_mode, column, title)
        axes[0].set_title(mode, loc="left")
    legend(figure, distinct(rows, "provider"))


def of_regimes(figure: Any, rows: Sequence[Row]) -> None:
    """Time by N: as launched (dashed) and as a replayed graph; a panel per precision."""
    kinds = distinct(rows, "precision")
    figure.set_size_inches(6 * len(kinds), 4.5)
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for provider in distinct(rows, "provider"):
            if provider == "ours":  # is one of the regimes
                continue
            for column, style in ("graph_ms", "-"), ("p50_ms", "--"):
                found = [row for row in rows if (row["provider"], row["precision"]) == (provider, kind) and row[column]]
                points = sorted((int(row["sources"]), float(row[column])) for row in found)
                axis.plot(*zip(*points, strict=True), style, color=COLOURS.get(provider)) if points else None
        axis.set(xscale="log", yscale="log", xlabel="N", ylabel="ms, forward and backward", title=kind)
    legend(figure, [provider for provider in distinct(rows, "provider") if provider != "ours"])


def of_step(figure: Any, rows: Sequence[Row]) -> None:
    """Time, where it was measured, and memory of a whole training step."""
    figure.set_size_inches(10, 3)
    for axis, (column, scale, title) in zip(
        figure.subplots(1, 2), (("median_ms", 1.0, "ms, median"), ("peak_bytes", 1e6, "peak MB, extra")), strict=True
    ):
        found = [row for row in rows if row[column]]
        names = [" ".join(filter(None, (row["provider"], row.get("case")))) for row in found]
        colours = [COLOURS.get(row["provider"], "#8c8c8c") for row in found]
        axis.barh(names, [float(row[column]) / scale for row in found], color=colours)
        axis.invert_yaxis()
        axis.set_xlabel(title)


def legend(figure: Any, providers: Sequence[str]) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=COLOURS.get(provider), label=provider) for provider in providers]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def draw(path: Path) -> Path | None:
    """The plot of one CSV; None where it has no rows to plot."""
    from matplotlib.figure import Figure

    rows = newest(path)
    if not rows:
        return None
    figure = Figure(layout="constrained", dpi=120)
    if path.stem == "info_nce_regimes":
        of_regimes(figure, rows)
    elif "mode" in rows[0]:
        of_kernel(figure, rows)
    else:
        of_step(figure, rows)
    about = (", ".join(distinct(rows, column)) for column in ("device", "torch", "commit"))
    figure.suptitle("{}: {}; torch {}; commit {}".format(path.stem, *about), fontsize=9)
    target = path.with_suffix(".png")
    figure.savefig(target)
    return target


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", help="for example benchmarks/results/cpu; default: this device's"
    )
    folder = parser.parse_args(arguments).folder or harness.folder()
    tables = sorted(folder.glob("*.csv"))
    if not tables:
        print(f"no CSV in {folder}", file=sys.stderr)
        return 2
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots: matplotlib is not installed")
        return 0
    for table in tables:
        print(draw(table) or f"nothing to plot in {table}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
