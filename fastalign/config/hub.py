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
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from fastalign.config.keys import Config

Run = TypeVar("Run", bound=Callable[..., Any])
_VARIABLE = "HF_HUB_OFFLINE"  # read by peft at each call, and by child processes
_own: list[tuple[Any, str, Any]] = []  # the settings as the user has them, while `offline` is in force


@contextlib.contextmanager
def offline(active: bool = True) -> Iterator[None]:
    """No library may reach a hub, except inside `asking_hub`.

    Args:
        active: False to let them, without telemetry: for a run that sends its results to a hub.
    """
    settings = _settings()
    outermost = not _own
    if outermost:
        _own.extend(settings)
    try:
        with _changed(settings, offline=True if active else None):
            yield
    finally:
        if outermost:
            _own.clear()


@contextlib.contextmanager
def asking_hub() -> Iterator[None]:
    """The hub may be asked, unless the user's own settings forbid it; without telemetry and counters."""
    settings = _settings()
    own = {(id(module), name): value for module, name, value in _own}
    with _changed(settings, offline=None):
        for module, name, _ in settings:
            if name.endswith("OFFLINE") and own:
                setattr(module, name, own[id(module), name])
        if may_ask_hub():
            os.environ.pop(_VARIABLE, None)
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
def _changed(settings: list[tuple[Any, str, Any]], offline: bool | None) -> Iterator[None]:
    """Offline or as it is, no telemetry, no counters; everything is put back at the end."""
    variable = os.environ.get(_VARIABLE)
    wanted = {"HF_HUB_DISABLE_TELEMETRY": True, "HF_UPDATE_DOWNLOAD_COUNTS": False}
    if offline is not None:
        wanted |= {_VARIABLE: offline, "HF_DATASETS_OFFLINE": offline}
        os.environ[_VARIABLE] = "1"
    try:
        for module, name, _ in settings:
            if name in wanted:
                setattr(module, name, wanted[name])
        yield
    finally:
        for module, name, value in settings:
            setattr(module, name, value)
        if variable is None:
            os.environ.pop(_VARIABLE, None)
        else:
            os.environ[_VARIABLE] = variable
