"""What every plot has in common: its colours, how it gets into a page or a file, and whether it can be drawn at all."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.errors import ConfigError
from fastalign.report.files import write_aside
from fastalign.report.svg import inline
from fastalign.report.text import escape, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is drawn in: ink, page, rule, then one for each series. The light ones are page.css's too; each has a contrast of
# at least 3 with the page, and they stay apart in the common kinds of colour blindness.
LIGHT = {
    "ink": "#1f2328",
    "page": "#ffffff",
    "rule": "#d5d9de",
    "s0": "#1f5fa8",
    "s1": "#c9590c",
    "s2": "#0d9d63",
    "s3": "#a181aa",
    "s4": "#33363b",
    "s5": "#6c2b07",
}
# On a page: a stand-in that is found again in the SVG, and what takes its place there.
STAND_INS = {name: f"#0101{place:02x}" for place, name in enumerate(LIGHT, 1)}
ON_PAGE = {STAND_INS[name]: "currentColor" if name == "ink" else f"var(--{name})" for name in LIGHT}

WIDTH, HEIGHT, LEGEND_LINE, LETTER = 400.0, 220.0, 14.0, 5.5  # points; LETTER: width of one at FONT_SIZE
FONT_SIZE = 9.0
SCRIPTS = (  # for files; a browser finds its own
    "Noto Sans", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Telugu", "Noto Sans Thai",
    "Noto Sans Arabic", "Noto Sans Hebrew", "Noto Sans Ethiopic", "Noto Sans CJK SC", "Noto Sans CJK JP",
    "Noto Sans CJK KR",
)  # fmt: skip

Colours = Mapping[str, str]


@dataclass(frozen=True)
class Plot:
    """A plot, made by `lines` or `bars`. Nothing is drawn before `html` or `save`.

    Attributes:
        title: what it shows, in a few words.
        about: its axes and series in a sentence, for those who do not see it.
        caption: a sentence or two below it.
        width, height: in points.
        draw: draws it into axes, in colours by the names of `LIGHT`.
    """

    title: str
    about: str
    caption: str
    width: float
    height: float
    draw: Callable[[Axes, Colours], None]

    def html(self, key: str) -> str:
        """The plot with its title and caption; nothing where there is no matplotlib."""
        if not plots_available():
            return ""
        with _settings([]):
            figure = self._figure(STAND_INS)
            drawn = _bytes(figure, "svg", transparent=True).decode()
        svg = inline(drawn, key, ON_PAGE, self.title, self.about)
        caption = f'<figcaption dir="auto">{escape(self.caption)}</figcaption>\n' if self.caption else ""
        return (
            f'<figure class="plot">\n<p class="caption" id="{key}-caption" dir="auto">{escape(self.title)}</p>\n'
            f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{key}-caption">\n{svg}\n</div>\n'
            f"{caption}</figure>\n"
        )

    def save(self, path: str | Path) -> Path:
        """Write the plot with its title into a file.

        Args:
            path: ends in .png or .svg; its folder is made if it is not there. Letters that no font here has are boxes
                in a .png.

        Raises:
            ConfigError: there is no matplotlib; see `plots_available`.
            RunError: the file cannot be written.
        """
        path = Path(path)
        if path.suffix not in (".png", ".svg"):
            raise ValueError(f"a plot is saved as .png or .svg, not as {path.name!r}")
        why_not = why_no_plots()
        if why_not:
            raise ConfigError(f"{path.name} cannot be drawn: {why_not}")
        with _settings(SCRIPTS):
            figure = self._figure(LIGHT)
            figure.suptitle(wrapped(self.title, int(self.width / LETTER)), x=0.01, ha="left", fontsize=FONT_SIZE + 1.5)
            content = _bytes(figure, path.suffix[1:], dpi=220)
        return write_aside(path, content)

    def _figure(self, colours: Colours) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure((self.width / 72, self.height / 72), layout="constrained", facecolor=colours["page"])
        axes = figure.subplots()
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(colours["ink"])
        axes.tick_params(colors=colours["ink"], width=0.8, length=3)
        axes.xaxis.label.set_color(colours["ink"])
        axes.yaxis.label.set_color(colours["ink"])
        axes.set_axisbelow(True)
        self.draw(axes, colours)
        names = axes.get_legend_handles_labels()[1]
        if len(names) > 1:
            axes.legend(
                loc="lower left", bbox_to_anchor=(0, 1), ncols=_legend_columns(names, self.width), frameon=False,
                labelcolor=colours["ink"], handlelength=2.8, columnspacing=1.4, borderaxespad=0.2, borderpad=0.2,
            )  # fmt: skip
        return figure


def plots_available() -> bool:
    """Whether plots can be drawn: matplotlib is there and can be imported."""
    return not why_no_plots()


def why_no_plots() -> str:
    """What is in the way of plots and what to install; empty where they can be drawn."""
    try:
        import matplotlib.figure  # noqa: F401
    except Exception as error:  # one that does not fit what it was built for raises anything
        if isinstance(error, ModuleNotFoundError) and error.name == "matplotlib":
            return 'matplotlib is not installed; install it with pip install "fastalign[report]"'
        return f"matplotlib cannot be imported ({error!r}); mend it with pip install --force-reinstall matplotlib"
    return ""


def _settings(fonts: Sequence[str]) -> Any:
    """A context with matplotlib's own settings in place of the user's, which come back at its end.

    Args:
        fonts: for what DejaVu Sans, which matplotlib brings, does not have.
    """
    import matplotlib.style
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist} if fonts else set()
    ours: dict[str, Any] = {
        "font.family": ["DejaVu Sans", *(name for name in fonts if name in installed)],
        "font.size": FONT_SIZE,
        "hatch.linewidth": 0.8,
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "fastalign",  # ids are the same each time
        "text.parse_math": False,  # a $ is a $
    }
    return matplotlib.style.context(["default", ours])


def _bytes(figure: Figure, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # A browser has other fonts, and joins their letters.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from|Matplotlib currently does not support")
        figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None, **how)
    return file.getvalue()


def _legend_columns(names: Sequence[str], width: float) -> int:
    return max(1, int((width - 45) / (max(map(len, names)) * LETTER + 45)))


def plot_height(names: Sequence[str], width: float) -> float:
    """In points, for a legend of these names."""
    lines_of_legend = math.ceil(len(names) / _legend_columns(names, width)) if len(names) > 1 else 0
    return HEIGHT + LEGEND_LINE * lines_of_legend
