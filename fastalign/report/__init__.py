"""The one writer of reports: a page of tables and plots in a single HTML file that asks nothing of the network.

    from fastalign import report

    loss = report.lines([report.Series("task", steps, losses)], x_label="step", y_label="loss", title="Loss")
    table = report.Table([report.Column("language"), report.Column("F1", unit="%")], [["de", 71.3]], "Slots found")
    report.write("report.html", "My run", [report.Heading("Results"), table, loss])

A page is a sequence of parts. To add a kind of part, write a frozen dataclass with a method ``html(key)`` that returns
its markup: every text that it is given goes through `text.escape` (or `text.isolated`), and every id in it begins with
``key``, which no other part of the page has. Its style is in page.css, with the colours of the variables there, so
that it is light and dark. A part may not refer to anything outside of the file; the page's policy would stop it.

Plots need matplotlib, which is imported when the first one is drawn. Without it they can be made and handed to `write`
all the same; the page then holds its tables and says what to install. So the tables should hold all that matters.
"""

from __future__ import annotations

from fastalign.report.drawing import Plot, plots_available
from fastalign.report.page import Part, write
from fastalign.report.parts import Facts, Heading, Text
from fastalign.report.plots import Series, bars, lines
from fastalign.report.tables import Cell, Column, Table

__all__ = [
    "Cell",
    "Column",
    "Facts",
    "Heading",
    "Part",
    "Plot",
    "Series",
    "Table",
    "Text",
    "bars",
    "lines",
    "plots_available",
    "write",
]
