"""What a user can get wrong, as exceptions: what is wrong, where, and how to mend it.

Each class also derives from the built-in that a caller of the Python API would expect, so
``except ValueError`` keeps working. The command line turns every one of them into a single line on
stderr and exit code 2, a RunError into one and exit code 1; anything else is a bug.
"""

from __future__ import annotations

import os
import re

TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}")
PASSWORD = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")  # the user and password of a URL

LONGEST = 1000


def mask_tokens(text: str) -> str:
    """`text` with *** for access tokens of a hub, also those of the environment."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        token = os.environ.get(name, "").strip()
        if len(token) >= 20 and not re.search(r"\s", token):  # anything else is no token, and may be innocent words
            text = text.replace(token, "***")
    return TOKEN.sub("***", text)


def mask_secrets(text: str) -> str:
    """`text` with *** for access tokens and for the passwords of URLs."""
    return PASSWORD.sub("***", mask_tokens(text))


def printable(text: str) -> str:
    """`text` with the escapes of Python for whatever could drive a terminal or end a line."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


class FastalignError(Exception):
    """Base of everything that is told in one line, which holds no secret and nothing that drives a terminal.

    `said_here`: whether this rank of several says it; None where nobody has decided that: then the first one does.
    """

    said_here: bool | None = None

    def __init__(self, message: str):
        message = printable(mask_secrets(" ".join(message.split())))
        if len(message) > LONGEST:  # it quotes something long; what is wrong comes first, how to mend it last
            message = f"{message[: LONGEST // 2]} [...] {message[-LONGEST // 2 :]}"
        super().__init__(message)


class ConfigError(FastalignError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or at odds with another one."""


class DataError(FastalignError, ValueError):
    """A data file is missing, unreadable, of an unknown kind, or holds nothing that can be used."""


class ModelError(FastalignError, RuntimeError):
    """A model cannot be reached, is not a decoder, or does not work the way we rely on."""


class RunError(FastalignError, RuntimeError):
    """A run that began well cannot go on: memory or disk is full, or its numbers are no longer finite.

    `on_all_ranks`: every rank raises it, so that one of them is enough to say it.
    """

    def __init__(self, message: str, *, on_all_ranks: bool = False):
        super().__init__(message)
        self.on_all_ranks = on_all_ranks
