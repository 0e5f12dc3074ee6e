"""The page: puts parts into one file that asks nothing of the network."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fastalign.report.drawing import Plot, why_no_plots
from fastalign.report.files import write_aside
from fastalign.report.text import escape

HERE = Path(__file__).parent


class Part(Protocol):
    """What a page is made of."""

    def html(self, key: str) -> str:
        """Its markup, in which every id begins with `key`."""
        ...


def write(path: str | Path, title: str, parts: Sequence[Part], *, lead: str = "") -> Path:
    """Write a page. The same parts give the same bytes.

    Args:
        path: of the file; its folder is made if it is not there.
        title: of the page.
        parts: from top to bottom. Where there is no matplotlib, plots are left out and the page says so.
        lead: what the page shows, in a sentence or two below its title.

    Returns:
        The path.

    Raises:
        RunError: the file cannot be written; an older one stays as it was.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # Only our own script runs, and nothing is fetched, even if some text found its way out of its element.
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    why_not = why_no_plots() if any(isinstance(part, Plot) for part in parts) else ""
    notice = f'<p class="notice">The plots are left out, as {escape(why_not)} and write the page again.</p>\n'
    body = "".join(part.html(f"part-{place}") for place, part in enumerate(parts, 1))
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n'
        f'<main>\n<h1 dir="auto">{escape(title)}</h1>\n'
        + (f'<p class="lead" dir="auto">{escape(lead)}</p>\n' if lead else "")
        + (notice if why_not else "")
        + f"{body}</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )
    return write_aside(Path(path), page.encode())
