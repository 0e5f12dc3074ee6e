"""What may be asked of a hub, and when: nothing, but for the model and the data that a run names.

Left to themselves, the libraries ask for more. Seen from a training on local files: bitsandbytes, when peft imports
it, fetches native code for the CPU through `kernels`; datasets reports every parquet file it opens to a counter;
huggingface_hub fetches a list of coding agents for the header of its requests. Others ask under conditions: peft for
the base model's config when it saves embeddings, transformers for kernels of a model's layers or of its attention.
They are stopped by these libraries' own settings, and the settings are put back.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from fastalign.config.keys import Config

Run = TypeVar("Run", bound=Callable[..., Any])
_VARIABLE = "HF_HUB_OFFLINE"  # read by peft at each call, and by child processes
_lock = threading.RLock()  # for all that follows, since the settings are those of all threads
# (thread, offline) of each use that has not ended, in the order of their beginnings
_inside: list[tuple[int, bool]] = []
_own: list[tuple[Any, str, Any]] = []  # the settings as the user has them, while there is any
_own_variable: list[str | None] = []


@contextlib.contextmanager
def offline(active: bool = True) -> Iterator[None]:
    """No library may reach a hub, except inside `asking_hub`, also where threads overlap.

    Args:
        active: False to let them, without telemetry: for a run that sends its results to a hub.
    """
    with _guarded(offline=True if active else None):
        yield


@contextlib.contextmanager
def asking_hub() -> Iterator[None]:
    """The hub may be asked, unless the user's own settings forbid it; without telemetry and counters."""
    with _guarded(offline=False):
        yield


def offline_run(train: Run) -> Run:
    """`train`, whose first argument is a `Config`, in `offline`; not where the run is to send its results to a hub."""

    @functools.wraps(train)
    def run(config: Config, *args: Any, **options: Any) -> Any:
        reporters = config.training.get("report_to") or ()
        reporters = [reporters] if isinstance(reporters, str) else reporters
        sends = bool(config.training.get("push_to_hub")) or not {"all", "trackio"}.isdisjoint(reporters)
        with offline(active=not sends):
            return train(config, *args, **options)

    return cast("Run", run)


def may_ask_hub() -> bool:
    """Whether the user's own settings let the hub be asked."""
    with _lock:
        return not (_own or _settings())[0][2]


def _settings() -> list[tuple[Any, str, Any]]:
    """(module, name, value) of the libraries' own settings, which they read once; huggingface_hub's is the first."""
    import datasets.config
    from huggingface_hub import constants

    names = [
        (constants, _VARIABLE),
        (constants, "HF_HUB_DISABLE_TELEMETRY"),
        (datasets.config, _VARIABLE),
        (datasets.config, "HF_DATASETS_OFFLINE"),
        (datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS"),
    ]
    return [(module, name, getattr(module, name)) for module, name in names]


@contextlib.contextmanager
def _guarded(offline: bool | None) -> Iterator[None]:
    """Offline, or as the user has it, or as it is; the last of overlapping uses puts the user's settings back."""
    thread = threading.get_ident()
    with _lock:
        if not _inside:
            _own[:], _own_variable[:] = _settings(), [os.environ.get(_VARIABLE)]
        if offline is None:
            offline = next((off for owner, off in reversed(_inside) if owner == thread), False)
        use = (thread, offline)
        _inside.append(use)
        _apply()
    try:
        yield
    finally:
        with _lock:
            _inside[:] = [other for other in _inside if other is not use]
            _apply()
            if not _inside:
                _own.clear()


def _apply() -> None:
    """Sets what the uses ask for: offline while each thread's latest does, no telemetry, no counters."""
    wanted: dict[str, bool] = {}
    variable = _own_variable[0]
    if _inside:
        wanted = {"HF_HUB_DISABLE_TELEMETRY": True, "HF_UPDATE_DOWNLOAD_COUNTS": False}
        if all(dict(_inside).values()):
            wanted |= {_VARIABLE: True, "HF_DATASETS_OFFLINE": True}
            variable = "1"
        elif may_ask_hub():
            variable = None
    for module, name, value in _own:
        setattr(module, name, wanted.get(name, value))
    if variable is None:
        os.environ.pop(_VARIABLE, None)
    else:
        os.environ[_VARIABLE] = variable
