"""The doctor's answer as text."""

from __future__ import annotations

import textwrap
from typing import Any

WIDTH = 118
PART, VERSION, STATE = 14, 16, 17


def table(found: dict[str, Any]) -> str:
    """The result of `doctor` as an aligned table, and what follows from it."""
    here = found["machine"]
    lines = [
        f"Python {here['python']} on {here['platform']}, {here['processors']} processors",
        here["executable"] or "",
        "",
        f"{'part':<{PART}}{'version':<{VERSION}}{'state':<{STATE}}what for, and what was found",
    ]
    for row in found["rows"]:
        head = f"{row['part']:<{PART}}{_fit(row['version'], VERSION)}{row['state']:<{STATE}}"
        text = ": ".join(filter(None, [row["use"], row["why"]]))
        if row["part"].startswith("gpu") and row["version"]:
            head, text = f"{row['part']:<{PART + VERSION}}{row['state']:<{STATE}}", f"{row['version']}; {text}"
        indent = " " * (PART + VERSION + STATE)
        lines += textwrap.wrap(text, WIDTH, initial_indent=head, subsequent_indent=indent) or [head.rstrip()]
        if row["mend"]:
            lines.append(f"{indent}mend: {row['mend']}")
    lines.append("")
    for sentence in found["conclusion"]:
        lines += [sentence] if sentence.startswith(" ") else textwrap.wrap(sentence, WIDTH)
    return "\n".join(lines)


def size(count: float | None) -> str:
    """``1.2 GB``, or that it is not known."""
    return "unknown" if count is None else f"{count / 1e9:.1f} GB"


def _fit(version: str | None, width: int) -> str:
    text = "-" if version is None else version
    return f"{text if len(text) < width else text[: width - 3] + '..':<{width}}"
