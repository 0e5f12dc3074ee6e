"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from fastalign.errors import RunError


def write_aside(path: Path, content: bytes) -> Path:
    """Write a file beside its place and then move it there, so that nobody sees half of it.

    Raises:
        RunError: it cannot be written; what stood there before stays.
    """
    aside = path.with_name(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_bytes(content)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        why = getattr(error, "strerror", None) or str(error)
        raise RunError(f"cannot write {str(path)!r} ({why}); free room there or choose another place") from None
    return path
