"""The report: one file that is safe whatever text goes in, the same each time, and whole without matplotlib."""

from __future__ import annotations

import builtins
import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import pytest

from fastalign import report
from fastalign.errors import ConfigError, RunError
from fastalign.report.drawing import LIGHT
from fastalign.report.tables import number

STYLE = Path(report.__file__).with_name("page.css").read_text(encoding="utf-8")
VOID = {"meta", "link", "br"}
HOSTILE = (
    "</title></style></script></svg><script>alert(1)</script><img src=//evil.example/x onerror=alert(1)>",
    "\"' onclick='alert(1)' x=\"<b>&amp;&lt;",
    "nul \x00 bell \x07 escape \x1b[31m \x85 \ud800 \ufffe end",
    "שלום \u202e right to left without an end",
    "नमस्ते Привет ]]> <!-- $\\frac{1}{$ __ \r\n two lines",
    "https://evil.example/?a=1 url(//evil.example/x) javascript:alert(1)",
)


class Page(HTMLParser):
    """Reads a page, and fails where its tags do not nest."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.cells: list[tuple[dict[str, str], str]] = []  # attributes and text of what stands in a table
        self.text = ""
        self._open: list[str] = []
        self.source = path.read_bytes().decode("utf-8")
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), (tag, attrs)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag in ("td", "th"):
            self.cells.append((self.tags[-1][1], ""))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self._open):
            self.text += data
        if self._open and {"td", "th"} & set(self._open):
            attributes, text = self.cells[-1]
            self.cells[-1] = (attributes, text + data)

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def every_place(text: str) -> list[report.Part]:
    """Parts with `text` wherever text can stand."""
    cells: list[report.Cell | str | float | None] = [text, report.Cell(1.0, text, best=True)]
    return [
        report.Heading(text),
        report.Text(f"{text}\n\n{text}"),
        report.Facts({text: text}, text),
        report.Table([report.Column(text, text, unit=text), report.Column(text)], [cells], text),
        report.lines(
            [report.Series(text, [1, 2], [1, 2]), report.Series(text, [1, 2], [2, 1])],
            x_label=text, y_label=text, title=text, caption=text, marks={text: 1},
        ),
        report.bars([text, "b"], {text: [1, 2], "other": [None, 1]}, y_label=text, title=text, caption=text),
    ]  # fmt: skip


def three_plots() -> list[report.Part]:
    series = [report.Series("a", [0, 1, 2], [3, 2, 1], [2, 1, 0], [4, 3, 2]), report.Series("b", [0, 1, 2], [1, 1, 1])]
    return [
        report.lines(series, x_label="step", y_label="loss", title="Loss"),
        report.lines(series, x_label="step", y_label="loss", title="Loss"),
        report.bars(
            ["de", "fr"], {"plain": [10, None], "aligned": [20, 30]}, y_label="F1", title="F1",
            spread={"aligned": [(18, 23), None]}, points={"aligned": [[18, 20, 23], []]},
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_gets_out_of_its_place(text, tmp_path):
    plain = Page(report.write(tmp_path / "plain.html", "word", every_place("word"), lead="word"))
    page = Page(report.write(tmp_path / "report.html", text, every_place(text), lead=text))
    assert [tag for tag, _ in page.tags if tag not in ("path", "g", "use", "defs")] == [
        tag for tag, _ in plain.tags if tag not in ("path", "g", "use", "defs")
    ], "the text has made or ended an element"
    assert {name for _, attributes in page.tags for name in attributes if name.startswith("on")} == set()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", page.source)
    seen = "".join(page.text.split())
    start = "".join(text.split("\x00")[0].split())[:20]  # before what is replaced, and before what a plot cuts off
    assert seen.count(start) >= 19, "and all of it is shown"


def test_a_page_points_at_nothing_outside(tmp_path):
    parts = [*three_plots(), *every_place(HOSTILE[-1]), *every_place(HOSTILE[0])]
    page = Page(report.write(tmp_path / "report.html", "Title", parts))
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if name in ("src", "srcset", "href", "xlink:href", "action", "data", "poster", "ping"):
                assert value == "data:," or value.startswith("#"), (tag, name, value)
            if tag not in ("td", "th"):  # what data-sort holds is text
                assert re.findall(r"url\(\s*[\"']?(?!#)", value) == [], (tag, name, value)
    style = page.source.partition("<style>")[2].partition("</style>")[0]
    assert style.strip() == STYLE.strip() and "url(" not in style and "@import" not in style and "//" not in style
    policy = next(meta for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy")["content"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-") and "http" not in policy
    assert len(page.named("script")) == len(page.named("style")) == 1, "a style of a plot would be one of the page"
    assert page.named("metadata") == []


def test_ids_are_unique_and_what_refers_to_them_finds_them(tmp_path):
    page = Page(report.write(tmp_path / "report.html", "Title", [*three_plots(), *every_place("x")]))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) and len(page.named("svg")) == 5
    values = [value for _, attributes in page.tags for value in attributes.values()]
    used = {name for value in values for name in re.findall(r"url\(#([^)]+)\)", value)}
    used |= {value[1:] for _, a in page.tags for name, value in a.items() if name == "href" and value.startswith("#")}
    used |= {name for _, a in page.tags for name in a.get("aria-labelledby", "").split()}
    assert len(used) > 20 and used <= set(ids)


def test_plots_take_the_colours_of_the_page(tmp_path):
    page = Page(report.write(tmp_path / "report.html", "Title", three_plots()))
    drawn = "".join(re.findall(r"<svg.*?</svg>", page.source, re.DOTALL))
    assert re.findall(r"#[0-9a-fA-F]{6}\b|\brgb\(|fill: (?:white|black)", drawn) == []
    for colour in ("currentColor", "var(--s0)", "var(--s1)", "var(--rule)", "var(--page)"):
        assert f"stroke: {colour}" in drawn or f"fill: {colour}" in drawn
    assert [svg["role"] for svg in page.named("svg")] == ["img"] * 3
    assert "Curves of loss over step: a, b." in page.text and page.text.count("aligned") >= 2, "text stays text"


def colours(block: str) -> dict[str, str]:
    return dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_have_contrast(scheme):
    """Of at least what WCAG 2 asks: 4.5 for text, 3 for graphics."""
    light, dark = map(colours, STYLE.split("@media screen and (prefers-color-scheme: dark)")[:2])
    chosen = light if scheme == "light" else dark
    assert light.keys() == dark.keys() and light.items() >= LIGHT.items(), "files and pages have the same colours"
    for name, colour in chosen.items():
        high, low = sorted((luminance(colour), luminance(chosen["page"])), reverse=True)
        least = {"ink": 7, "muted": 4.5, "page": 1, "rule": 1.2, "soft": 1}.get(name, 3)
        assert (high + 0.05) / (low + 0.05) >= least, name


def test_the_same_parts_give_the_same_bytes(tmp_path):
    first = report.write(tmp_path / "a.html", "Title", [*three_plots(), *every_place("x")]).read_bytes()
    assert report.write(tmp_path / "b.html", "Title", [*three_plots(), *every_place("x")]).read_bytes() == first
    plot = three_plots()[0]
    assert isinstance(plot, report.Plot)
    for kind in ("png", "svg"):
        assert plot.save(tmp_path / f"a.{kind}").read_bytes() == plot.save(tmp_path / f"b.{kind}").read_bytes()


def test_cells_say_how_they_are_sorted_and_to_whom_they_belong(tmp_path):
    columns = [
        report.Column("language"),
        report.Column("F1", "slot F1", unit="%"),
        report.Column("n"),
        report.Column("?"),
    ]
    rows = [
        ["de", report.Cell(1234.56, "± 3", best=True), 12000, "b"],
        ["fr", float("nan"), None, 7],
        ["hi", report.Cell(None, "no rows", best=True), -3, True],
        ["sw", -0.04, 0, None],
        ["ru", float("-inf"), 5, "<"],
    ]
    page = Page(report.write(tmp_path / "report.html", "Title", [report.Table(columns, rows, "Caption")]))
    heads, cells = page.cells[:4], page.cells[4:]
    assert [head.get("class") for head, _ in heads] == [None, "number", "number", None]
    assert {(head["scope"], head["aria-sort"]) for head, _ in heads} == {("col", "none")}
    assert page.named("button") == [{"type": "button"}] * 4
    assert [text for _, text in heads] == ["language", "F1 %", "n", "?"]
    assert [(cell.get("data-sort"), text.strip()) for cell, text in cells[1::4]] == [
        ("1234.56", "1,234.6 ± 3"), (None, "–"), (None, "– no rows"), ("-0.04", "0.0"), ("-Infinity", "−∞"),
    ]  # fmt: skip
    assert [(cell.get("data-sort"), text) for cell, text in cells[2::4]] == [
        ("12000.0", "12,000"), (None, "–"), ("-3.0", "−3"), ("0.0", "0"), ("5.0", "5"),
    ]  # fmt: skip
    assert [(cell.get("data-sort"), text) for cell, text in cells[3::4]] == [
        ("b", "b"), ("7", "7"), ("yes", "yes"), (None, "–"), ("<", "<"),
    ]  # fmt: skip
    assert [cell["scope"] for cell, _ in cells[::4]] == ["row"] * 5
    assert len(page.named("strong")) == 1 and "slot F1" in page.text


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [(2e-5, None, "2e−05"), (0.12345, None, "0.1235"), (2e-5, 1, "0.0"), (-0.26, 1, "−0.3"), (7, 2, "7.00")],
)
def test_numbers_are_written_for_a_reader(value, digits, shown):
    assert number(value, digits) == shown


def test_yes_and_no_are_words(tmp_path):
    table = report.Table([report.Column("a"), report.Column("b")], [["x", True], ["y", False], ["z", None]], "C")
    page = Page(report.write(tmp_path / "report.html", "T", [table]))
    assert [(cell.get("data-sort"), text) for cell, text in page.cells[3::2]] == [
        ("yes", "yes"), ("no", "no"), (None, "–"),
    ]  # fmt: skip


def test_a_table_without_rows_says_so_and_a_ragged_one_is_refused(tmp_path):
    page = Page(report.write(tmp_path / "report.html", "T", [report.Table([report.Column("a")], [], "C")]))
    assert "There are no rows." in page.text
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        report.Table([report.Column("a"), report.Column("b")], [["x", 1], ["y"]], "C")


MISSING = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
BROKEN = AttributeError("module 'numpy' has no attribute '<b>'")  # as of a build for another numpy


@pytest.mark.parametrize(
    ("error", "advice"),
    [(MISSING, 'pip install "fastalign[report]"'), (BROKEN, "pip install --force-reinstall matplotlib")],
)
def test_without_matplotlib_the_page_has_its_tables(error, advice, monkeypatch, tmp_path):
    real = builtins.__import__

    def importing(name: str, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise error
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)
    table = report.Table([report.Column("a")], [["only cell"]], "C")
    page = Page(report.write(tmp_path / "report.html", "Title", [table, *three_plots()]))
    assert not report.plots_available() and page.named("svg") == page.named("figure") == page.named("b") == []
    assert "only cell" in page.text and page.text.count(advice) == 1
    plotless = Page(report.write(tmp_path / "report.html", "Title", [table]))
    assert "matplotlib" not in plotless.text
    plot = three_plots()[0]
    assert isinstance(plot, report.Plot)
    with pytest.raises(ConfigError, match=f"a.png cannot be drawn: .*{re.escape(advice)}"):
        plot.save(tmp_path / "a.png")


def test_bars_stand_side_by_side_in_their_groups():
    """Whatever is drawn over them."""
    values = {"a": [1, 2, 4], "b": [4, 2, 1]}
    over = {name: [(value - 1, value + 1) for value in row] for name, row in values.items()}
    page = report.bars(
        ["x", "y", "z"], values, spread=over, points={"a": [[1], [2], [4]]}, y_label="", title=""
    ).html("key")  # fmt: skip
    places = []
    for fill in ("var(--s0)", "url("):  # the second is hatched
        corner = r"([\d.]+) ([\d.]+)"
        outline = rf'<path d="M {corner}\s+L ([\d.]+) [\d.]+\s+L [\d.]+ ([\d.]+)[^"]*"[^>]*fill: {re.escape(fill)}'
        found = re.findall(outline, page)
        boxes = [tuple(map(float, box)) for box in found][:3]  # the fourth is the legend's
        places += [(left, right, bottom - top) for left, bottom, right, top in boxes]
    assert len(places) == 6 and len({round(right - left, 1) for left, right, _ in places}) == 1
    heights = [height / places[0][2] for _, _, height in places]
    assert heights == pytest.approx([1, 2, 4, 4, 2, 1], rel=1e-3)
    places.sort()
    assert all(right <= left for (_, right, _), (left, _, _) in itertools.pairwise(places)), "none overlap"


def test_every_name_is_in_the_legend():
    for name in ("_hidden", "$x_1$", "a_b"):
        series = [report.Series(name, [1], [1]), report.Series("other", [1], [2])]
        page = report.lines(series, x_label="x", y_label="y", title="t").html("key")
        assert re.search(rf"<text[^>]*>\W?{re.escape(name)}</text>", page), name


def test_a_plot_is_saved_as_png_and_svg(tmp_path):
    for place, plot in enumerate(three_plots()):
        assert isinstance(plot, report.Plot)
        png = plot.save(tmp_path / "new" / f"{place}.png").read_bytes()
        width = int.from_bytes(png[16:20], "big")
        assert png.startswith(b"\x89PNG") and abs(width - plot.width / 72 * 220) < 2
        assert b"<svg" in plot.save(tmp_path / f"{place}.svg").read_bytes()
        with pytest.raises(ValueError, match=r"as \.png or \.svg"):
            plot.save(tmp_path / "plot.pdf")


def test_drawing_leaves_the_users_matplotlib_alone(tmp_path):
    plot = three_plots()[2]
    usual = plot.html("key")
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "text.usetex": True, "lines.linewidth": 9}):
        before = matplotlib.rcParams.copy()
        assert plot.html("key") == usual, "and their settings do not show"
        assert matplotlib.rcParams.copy() == before


@pytest.mark.parametrize(
    "plot",
    [
        report.lines([], x_label="", y_label="", title=""),
        report.lines(
            [report.Series("_hidden", [1], [None]), report.Series("", [1], [float("inf")])],
            x_label="x", y_label="y", title="t",
        ),
        report.bars([], {}, y_label="", title=""),
        report.bars(["a"], {"x": [None]}, y_label="", title=""),
        report.bars([f"a long name of group {i}" for i in range(90)], {"x": [-1e12] * 90}, y_label="", title=""),
    ],
    ids=["no curves", "no points", "no bars", "no value", "many"],
)  # fmt: skip
@pytest.mark.filterwarnings("error")
def test_odd_plots_are_drawn_all_the_same(plot, tmp_path):
    Page(report.write(tmp_path / "report.html", "T", [plot]))


def test_what_is_missing_is_marked_and_marks_are_named():
    bars = report.bars(["a", "b"], {"x": [None, 1], "y": [float("nan"), float("inf")]}, y_label="", title="").html(
        "key"
    )
    assert len(re.findall(r"<text[^>]*>–</text>", bars)) == 3
    curve = report.lines([report.Series("x", [1, 2], [1, 2])], x_label="", y_label="", title="", marks={"here": 1.5})
    assert ">here</text>" in curve.html("key")


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="1 values of y for 2 of x"):
        report.Series("a", [1, 2], [1])
    with pytest.raises(ValueError, match="one border"):
        report.Series("a", [1], [1], low=[0])
    with pytest.raises(ValueError, match="1 values for 2 groups"):
        report.bars(["a", "b"], {"x": [1]}, y_label="", title="")
    with pytest.raises(ValueError, match="no bars of it"):
        report.bars(["a"], {"x": [1]}, spread={"y": [(0, 1)]}, y_label="", title="")
    with pytest.raises(ValueError, match="level 2 or 3"):
        report.Heading("a", 1)


@pytest.mark.parametrize("call", ["pathlib.Path.write_bytes", "os.replace"])
def test_a_page_is_replaced_as_a_whole_or_not_at_all(call, tmp_path, monkeypatch):
    path = report.write(tmp_path / "sub" / "report.html", "Old", [])

    def full(where: Path, _: object) -> None:
        where.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, full)
    with pytest.raises(RunError, match=r"report.html.*No space left on device"):
        report.write(path, "New", [])
    assert "Old" in path.read_text(encoding="utf-8") and [p.name for p in path.parent.iterdir()] == ["report.html"]
