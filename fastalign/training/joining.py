"""Ranks find each other at the start of a run, on one host or several, and end together.

They meet in a small key-value store at rank 0 (torch's TCPStore, at the launcher's MASTER_ADDR and MASTER_PORT),
compare what they were given, and `meet` again where the next thing needs all of them. A rank that fails leaves its
reason there, so that the others end with that line at once, and do not wait for it in a collective until
`training.ddp_timeout` is over; launchers only end the ranks of their own host.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import distributed
from transformers import TrainerCallback

from fastalign import errors
from fastalign.config import Config, config_to_dict
from fastalign.data.text import listed
from fastalign.errors import ConfigError, FastalignError, RunError
from fastalign.training.checkpoint import how_to_continue
from fastalign.training.launch import (
    SAID_AFTER,
    Launch,
    choose_interface,
    first_line,
    launch_of_environment,
    on_cpu,
    require_gpus,
    store_of,
    tell,
    within,
)
from fastalign.training.record import versions

Run = TypeVar("Run", bound=Callable[..., Any])
Answer = TypeVar("Answer")
PATIENCE = 300.0  # seconds that ranks wait for each other at the start, at most
LAST_WORDS = 5.0  # seconds that a rank which ends has for the others
SAME = ("fastalign", "torch", "transformers", "accelerate", "peft", "deepspeed")  # they decide who waits for whom
_runs = itertools.count()  # of this process; all ranks make the same
_ranks: Ranks | None = None  # those of the run that is going on


def together(run: Run) -> Run:
    """`run`, whose first argument is a `Config`, begun when all ranks of a launch are there, and ended on all of them.

    Raises:
        ConfigError: the ranks cannot find each other, were given different things, or are more than there are GPUs.
        RunError: another rank was lost.
        FastalignError: of any kind, that has ended another rank before training began.
    """

    @functools.wraps(run)
    def begun(config: Config, *args: Any, **options: Any) -> Any:
        global _ranks
        launch = launch_of_environment()
        if launch is None:
            return run(config, *args, **options)
        limit = config.training.get("ddp_timeout")
        limit = float(limit) if isinstance(limit, (int, float)) and limit >= 1 else 1800.0  # that of transformers
        ranks = Ranks(launch, min(limit, PATIENCE), limit, config.output_dir)
        try:
            require_gpus(config.training, launch)
            if on_cpu(config.training):
                choose_interface(launch)
            ranks.meet(_given(config), first=True)
            _ranks = ranks
            return run(config, *args, **options)
        except Exception as error:
            end = ranks.end(error)
            if end is error:
                raise
            raise end from error
        finally:
            _ranks = None

    return cast("Run", begun)


def meet(facts: Mapping[str, Any] | None = None) -> None:
    """Wait until all ranks have come so far; they must agree in the values of `facts`. Nothing on a rank alone.

    Raises:
        FastalignError: that has ended another rank; RunError where one does not come.
        ConfigError: a fact is another one than on rank 0.
    """
    if _ranks is not None:
        _ranks.meet(facts)


def make_group(training: Mapping[str, Any]) -> None:
    """The process group of ranks on CPUs; on GPUs transformers makes it, as it does here, but without a timeout.

    Args:
        training: the effective ``training`` section.
    """
    meet()
    backend = training.get("ddp_backend") or "gloo"
    if _ranks is None or not on_cpu(training) or backend != "gloo" or distributed.is_initialized():
        return
    try:
        distributed.init_process_group(backend, timeout=timedelta(seconds=_ranks.limit))
    except RuntimeError as error:
        raise ConfigError(
            f"the ranks have met, but {_ranks.launch.host} gets no contact with all of them ({first_line(error)}): "
            "every port must be open between the hosts, and GLOO_SOCKET_IFNAME, if set, name the network they share"
        ) from error


class SameTimeout(TrainerCallback):
    """`training.ddp_timeout` for the groups that DeepSpeed makes for itself, too; left alone they have torch's own."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """By then there are all of them."""
        if _ranks is not None and distributed.is_initialized():
            from torch.distributed import distributed_c10d

            for group in [*distributed_c10d._world.pg_map]:
                distributed_c10d._set_pg_timeout(timedelta(seconds=args.ddp_timeout), group)


def told_to_all(error: FastalignError) -> FastalignError:
    """`error`, which has ended this rank before `together`, once the other ranks know it."""
    try:
        launch = launch_of_environment()
        if launch is not None:
            error.said_here = launch.speaks_first
            Ranks(launch, LAST_WORDS, LAST_WORDS, Path()).end(error)
    except ConfigError:
        pass  # they are not there; what is wrong here is the same
    return error


class Ranks:
    """The ranks of a launch, in contact through a store at rank 0.

    Args:
        launch: this one's place.
        patience: seconds to wait for the others at the start. limit: later on, as long as a collective would.
        folder: where the run keeps its checkpoints.

    Raises:
        ConfigError: rank 0 cannot be reached.
    """

    def __init__(self, launch: Launch, patience: float, limit: float, folder: Path):
        from torch.distributed import PrefixStore  # type: ignore[attr-defined] - not in every build

        self.launch, self.patience, self.limit, self.folder = launch, patience, limit, folder
        self._theirs: FastalignError | None = None  # what ended another rank, once known
        self._meetings = 0
        self._answers = True  # until the store does not
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"fastalign/{restart}/{next(_runs)}", store_of(launch, patience))

    def meet(self, facts: Mapping[str, Any] | None = None, *, first: bool = False) -> None:
        """As the function `meet`; `first`: nobody is known to be there yet."""
        number = self._meetings
        self._meetings += 1
        self.store.set(f"{number}/{self.launch.rank}", json.dumps([self.launch.host, facts], default=str))
        self.store.add(f"{number}", 1)
        self._wait(number, first)
        if facts is None:
            return
        host, theirs = json.loads(self.store.get(f"{number}/0"))
        mine = json.loads(json.dumps(facts, default=str))
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise ConfigError(
                    f"{key} is not the same on all ranks: {_shown(theirs.get(key))} on rank 0 ({host}), "
                    f"{_shown(mine.get(key))} on rank {self.launch.rank} ({self.launch.host}); all hosts need the same "
                    "configuration, data and versions"
                )
        self.meet()

    def end(self, error: Exception) -> Exception:
        """What this rank has to raise because of `error`, which the others can know then; one of each host says it."""
        if isinstance(error, RunError) and error.on_all_ranks:
            return error
        lost = error is not self._theirs and _is_lost(error)
        if error is not self._theirs:
            theirs = self._asked(self._reason_of_loss, None) if lost else None
            if theirs is not None:
                error, lost = theirs, False
            elif lost:
                error = RunError(
                    f"contact with another rank was lost ({first_line(error)}): if it has ended, its own output says "
                    f"why; else the network has failed; {how_to_continue(self.folder)}"
                )
            else:
                self._asked(functools.partial(self._leave, error), None)
        if isinstance(error, FastalignError):
            error.said_here = self._asked(self._is_to_say_it, self.launch.speaks_first)
        self._asked(lambda: self.store.add("ended", 1), None)
        if self.launch.serves and not lost:  # the store goes with this process
            self._asked(self._wait_for_all_ends, None)
        elif isinstance(error, FastalignError) and not error.said_here:
            time.sleep(1)  # a launcher ends all ranks after the first one, also the one that is about to say why
        return error

    def _wait(self, number: int, first: bool) -> None:
        started, pause, said = time.monotonic(), 0.01, not first or self.launch.rank > 0
        limit = self.patience if first else self.limit
        while (there := self.store.add(f"{number}", 0)) < self.launch.world_size:
            self._theirs = self._reason()
            if self._theirs is not None:
                raise self._theirs
            waited = time.monotonic() - started
            if waited > limit:
                raise self._missing(number, there, first)
            if waited > SAID_AFTER and not said:
                said = True
                tell(f"{there} of {self.launch.world_size} ranks are here; waiting for the others to start")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    def _missing(self, number: int, there: int, first: bool) -> FastalignError:
        size, where = self.launch.world_size, f"{self.launch.address}:{self.launch.port}"
        away = [f"{rank}" for rank in range(size) if not self.store.check([f"{number}/{rank}"])]
        if first:
            return ConfigError(
                f"{there} of {size} ranks have come to {where} in {self.patience:.0f} s; missing: {listed(away)}; "
                "start all hosts with the same number of ranks, address and port, each with its own node rank, and see "
                "the output of those that are missing"
            )
        return RunError(f"waited {self.limit:.0f} s (training.ddp_timeout) in vain for rank {listed(away)}")

    def _is_to_say_it(self) -> bool:
        """One rank of each host does: its first one, unless that does not know of it yet."""
        said = f"said/{self.launch.node}"
        if not self.launch.speaks_first:
            deadline = time.monotonic() + LAST_WORDS
            while self.store.add(said, 0) == 0 and time.monotonic() < deadline:
                time.sleep(0.05)
        return self.store.add(said, 1) == 1

    def _leave(self, error: Exception) -> None:
        """Say why this rank ends; the first that does so is heard."""
        if self.store.add("failures", 1) == 1:
            kind = type(error).__name__
            text = str(error) if isinstance(error, FastalignError) else f"{kind}: {first_line(error)}"
            self.store.set("failure", json.dumps([kind, self.launch.rank, self.launch.host, text]))

    def _reason(self) -> FastalignError | None:
        """What has ended another rank."""
        if not self.store.check(["failure"]):
            return None
        kind, rank, host, text = json.loads(self.store.get("failure"))
        known = getattr(errors, kind, RunError)
        return known(text if f"rank {rank} " in text else f"rank {rank} on {host}: {text}")

    def _reason_of_loss(self) -> FastalignError | None:
        """As `_reason`, of a rank that may be about to tell it."""
        for _ in range(20):
            if (found := self._reason()) is not None:
                return found
            time.sleep(0.1)
        return None

    def _wait_for_all_ends(self) -> None:
        deadline = time.monotonic() + LAST_WORDS
        while self.store.add("ended", 0) < self.launch.world_size and time.monotonic() < deadline:
            time.sleep(0.05)

    def _asked(self, ask: Callable[[], Answer], default: Answer) -> Answer:
        """The answer of the store, or `default` where it gives none in time: a cable that was pulled says nothing."""
        if self._answers:
            try:
                return within(2 * LAST_WORDS, ask)
            except (RuntimeError, TimeoutError):  # its process has gone
                self._answers = False
        return default


def _given(config: Config) -> dict[str, Any]:
    """What all ranks must have been given alike: every key of the configuration, and versions."""
    found = {
        f"{section}.{key}": value for section, keys in config_to_dict(config).items() for key, value in keys.items()
    }
    deepspeed = config.training.get("deepspeed")
    if isinstance(deepspeed, str) and Path(deepspeed).is_file():
        found["training.deepspeed"] = Path(deepspeed).read_text(encoding="utf-8", errors="replace")
    return {**found, **{f"the version of {name}": versions()[name] for name in SAME}}


def what_was_read(config: Config, files: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """For `meet`: what may differ though the ranks were given the same, because their hosts do.

    Args:
        config: with the effective ``training`` section.
        files: as `Tally.as_dict` gives them.
    """
    content = {key: [(file["sha256"] or file["name"])[:12] for file in read] for key, read in files.items()}
    return {
        "training.bf16": bool(config.training.get("bf16")),
        **{f"the content of {key}": found for key, found in content.items()},
    }


def _is_lost(error: Exception) -> bool:
    """Whether it comes of another rank's end, or of the network's."""
    signs = ("gloo/transport", "NCCL error", "NCCL communicator")
    return isinstance(error, distributed.DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
