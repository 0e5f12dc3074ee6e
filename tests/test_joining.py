"""Ranks find each other and end together: real sockets and real processes, without a launcher, on this machine."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from fastalign.errors import ConfigError, DataError, FastalignError, RunError
from fastalign.training import joining
from fastalign.training.joining import Ranks
from tests.forks import Fork, Forks
from tests.launches import environment, free_port, place

SAVING = ("training.save_strategy=steps", "training.save_steps=2")


@pytest.fixture
def config_file(raw_config: dict, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config), encoding="utf-8")
    return path


@pytest.fixture
def homes(raw_config: dict, tmp_path: Path) -> list[Path]:
    """Working folders of two hosts: the same model, data, and config with relative paths."""
    raw = copy.deepcopy(raw_config)
    raw["model"]["name_or_path"], raw["training"]["output_dir"] = "model", "out"
    made = []
    for name in ("a", "b"):
        folder = tmp_path / name
        shutil.copytree(raw_config["model"]["name_or_path"], folder / "model")
        for section in ("task", "alignment"):
            data = Path(raw_config[section]["data"])
            shutil.copy(data, folder / data.name)
            raw[section]["data"] = data.name
        (folder / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
        made.append(folder)
    return made


def start(
    forks: Forks, arguments: list[list[str]], *, on_host: int = 2, folders: list[Path] | None = None
) -> list[Fork]:
    """A process for each rank."""
    port = free_port()
    started = []
    for rank, argv in enumerate(arguments):
        variables = environment(place(rank, port, world_size=len(arguments), on_host=on_host))
        folder = {} if folders is None else {"folder": str(folders[rank])}
        started.append(forks.start(argv, environment=variables, **folder))
    return started


def ends(started: list[Fork], code: int) -> list[list[str]]:
    """The lines of fastalign of each, once all have ended with this exit code, and none with a traceback."""
    codes = [fork.wait() for fork in started]
    outputs = [fork.output for fork in started]
    assert codes == [code] * len(started), outputs
    assert not any("Traceback" in output for output in outputs), outputs
    return [[line for line in output.splitlines() if line.startswith("fastalign:")] for output in outputs]


def test_ranks_meet_train_and_tell_once(forks: Forks, config_file: Path, tmp_path: Path) -> None:
    started = start(forks, [["train", str(config_file)]] * 2)
    assert ends(started, 0) == [[], []]
    assert "results in" in started[0].output and started[1].output.strip() == ""
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["ranks"] == 2


def test_two_commands_that_only_look(forks: Forks, config_file: Path) -> None:
    for argv in (["train", str(config_file), "--dry-run"], ["memory", str(config_file)]):
        started = start(forks, [argv] * 2)
        assert ends(started, 0) == [[], []]
        assert started[0].output and not started[1].output


def test_a_mistake_of_all_is_said_once_on_each_host(forks: Forks, config_file: Path) -> None:
    mistaken = ["train", str(config_file), "alignment.layer=99"]
    first, second = ends(start(forks, [mistaken] * 2), 2)
    assert len(first) == 1 and second == [] and "alignment.layer: 99 is outside" in first[0] and "rank" not in first[0]
    first, second = ends(start(forks, [mistaken] * 2, on_host=1), 2)
    assert len(first) == len(second) == 1


def test_a_config_that_one_host_does_not_have_ends_the_other(forks: Forks, config_file: Path, tmp_path: Path) -> None:
    for wrong in (0, 1):
        arguments = [["train", str(config_file)], ["train", str(config_file)]]
        arguments[wrong][1] = str(tmp_path / "gone.yaml")
        lines = ends(start(forks, arguments, on_host=1), 2)
        assert len(lines[wrong]) == len(lines[1 - wrong]) == 1
        assert "gone.yaml' does not exist" in lines[wrong][0] and "rank" not in lines[wrong][0]
        assert f"rank {wrong} on {socket.gethostname()}: config file" in lines[1 - wrong][0]


def test_ranks_that_were_given_different_configs(forks: Forks, config_file: Path) -> None:
    arguments = [["train", str(config_file)], ["train", str(config_file), "training.learning_rate=0.5"]]
    [[line], others] = ends(start(forks, arguments), 2)
    assert "training.learning_rate is not the same on all ranks: 0.01 on rank 0" in line and "0.5 on rank 1" in line
    assert others == [] and not line.startswith("fastalign: rank")  # it says already which one


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda home: (home / "task.jsonl").unlink(), "rank 1 on .*: task.data: file 'task.jsonl' does not exist"),
        (
            lambda home: (home / "model" / "config.json").unlink(),
            "rank 1 on .*: .*model' holds no usable config",
        ),
        (
            lambda home: (home / "model" / "model.safetensors").unlink(),
            "rank 1 on .*: .* no usable model",
        ),
        (lambda home: (home / "pairs.jsonl").open("a").write("\n"), "the content of alignment.data is not the same"),
    ],
    ids=["data gone", "model gone", "weights gone", "other data"],
)
def test_what_one_host_lacks_ends_all_at_once(
    harm: Callable[[Path], Any], what: str, forks: Forks, homes: list[Path]
) -> None:
    harm(homes[1])
    started = time.monotonic()
    first, second = ends(start(forks, [["train", "config.yaml"]] * 2, on_host=1, folders=homes), 2)
    assert time.monotonic() - started < 60  # not training.ddp_timeout, which is half an hour
    assert len(first) == len(second) == 1
    assert re.search(what, first[0]), first
    assert not [*homes[0].glob("out/*")]


def test_checkpoints_need_one_folder_that_all_hosts_see(forks: Forks, homes: list[Path]) -> None:
    train = ["train", "config.yaml"]
    first, second = ends(start(forks, [[*train, *SAVING]] * 2, on_host=1, folders=homes), 2)
    assert "'out' is another folder on" in first[0] and "save_strategy: no" in second[0]
    assert not any((home / "out").exists() for home in homes)
    assert ends(start(forks, [train] * 2, on_host=1, folders=homes), 0) == [[], []]
    assert (homes[0] / "out" / "adapter_model.safetensors").exists()
    assert not [path for path in (homes[1] / "out").rglob("*") if path.is_file()]
    os.symlink(homes[0] / "shared", homes[1] / "shared")
    (homes[0] / "shared").mkdir()
    shared = [*train, *SAVING, "training.output_dir=shared/out"]
    assert ends(start(forks, [shared] * 2, on_host=1, folders=homes), 0) == [[], []]
    assert {path.name for path in (homes[0] / "shared" / "out" / "checkpoint-4").glob("rng_state_*")} == {
        "rng_state_0.pth",
        "rng_state_1.pth",
    }
    assert not [*homes[0].rglob(".fastalign-*")]


# While it trains


def test_a_rank_that_is_killed_ends_the_other_soon(forks: Forks, config_file: Path, tmp_path: Path) -> None:
    endless = ["train", str(config_file), *SAVING, "training.max_steps=100000", "training.disable_tqdm=true"]
    started = start(forks, [endless] * 2, on_host=1)
    started[0].wait_for("step 1 of", timeout=60)
    while not [*(tmp_path / "out").glob("checkpoint-*")]:
        time.sleep(0.05)
    started[1].signal(signal.SIGKILL)
    began = time.monotonic()
    [[line]] = ends(started[:1], 1)
    assert time.monotonic() - began < 30
    assert "contact with another rank was lost" in line and "continue with training.resume_from_checkpoint=true" in line


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_as_long_as_is_asked_for(forks: Forks, config_file: Path) -> None:
    """On the CPU, where transformers leaves `training.ddp_timeout` out."""
    endless = ["train", str(config_file), "training.max_steps=100000", "training.ddp_timeout=4"]
    started = start(forks, [endless] * 2, on_host=1)
    started[0].wait_for("step 1 of", timeout=60)
    started[1].signal(signal.SIGSTOP)
    try:
        [[line]] = ends(started[:1], 1)
        assert "Timed out waiting 4000ms" in line
    finally:
        started[1].signal(signal.SIGKILL)


def test_a_rank_whose_disk_is_full_says_so_on_all_hosts(forks: Forks, config_file: Path) -> None:
    port = free_port()
    argv = ["train", str(config_file), *SAVING]
    full = {"at": r"torch\.save .*rng_state_1", "file_size": 100}
    started = [
        forks.start(argv, environment=environment(place(rank, port, on_host=1)), **(full if rank else {}))
        for rank in (0, 1)
    ]
    [[first], [second]] = ends(started, 1)
    assert second.startswith("fastalign: cannot write to ")
    assert f"rank 1 on {socket.gethostname()}: cannot write to " in first


# The way to rank 0


def test_rank_0_is_not_there(forks: Forks, config_file: Path) -> None:
    """Of two ranks of another host one says so."""
    port = free_port()
    argv = ["train", str(config_file), "training.ddp_timeout=1"]
    places = [environment(place(rank, port, world_size=4)) for rank in (2, 3)]
    started = [forks.start(argv, environment=variables) for variables in places]
    [[line], others] = ends(started, 2)
    assert others == [] and f"cannot reach rank 0 at 127.0.0.1:{port} (Connection refused" in line


def test_the_others_are_not_there(forks: Forks, config_file: Path) -> None:
    argv = ["train", str(config_file), "training.ddp_timeout=1"]
    variables = environment(place(0, free_port(), world_size=3, on_host=1))
    [[line]] = ends([forks.start(argv, environment=variables)], 2)
    assert "1 of 3 ranks have come to 127.0.0.1:" in line and "missing: 1, 2;" in line


def test_the_port_is_taken(forks: Forks, config_file: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        variables = environment(place(0, port))
        [[line]] = ends([forks.start(["train", str(config_file)], environment=variables)], 2)
    assert f"port {port} of {socket.gethostname()} is taken" in line


# In one process: the store between two threads


@pytest.fixture
def pair() -> Iterator[Callable[[Callable[[Ranks], Any], Callable[[Ranks], Any]], list[Any]]]:
    """Runs a function for each of two ranks, on two hosts, and gives what they return or raise."""

    def run(*parts: Callable[[Ranks], Any]) -> list[Any]:
        port, number = free_port(), next(joining._runs)

        def one(rank: int) -> Any:
            try:
                ranks = Ranks(place(rank, port, on_host=1), 20, 20, Path("nowhere"))
                return parts[rank](ranks)
            except Exception as error:
                return error

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
            patch.setattr(joining, "_runs", iter([number] * 2))
            return [*pool.map(one, range(2))]

    yield run


def test_versions_have_to_be_the_same(pair: Any) -> None:
    key = "the version of torch"
    first, second = pair(lambda r: r.meet({key: "2.13.0"}), lambda r: r.end(_raised(r.meet, {key: "2.12.0"})))
    assert isinstance(first, ConfigError) and isinstance(second, ConfigError) and str(first) == str(second)
    assert '"2.13.0" on rank 0 (host-0), "2.12.0" on rank 1 (host-1)' in str(first)
    assert {f"the version of {name}" for name in ("fastalign", "torch", "deepspeed")} <= joining._given(
        _config()
    ).keys()


@pytest.mark.parametrize("error", [DataError("a: b"), RunError("c"), KeyError("d")])
def test_the_others_get_the_reason_with_its_kind(error: Exception, pair: Any) -> None:
    def fails(ranks: Ranks) -> Exception:
        return ranks.end(error)

    theirs, own = pair(lambda ranks: ranks.end(_raised(ranks.meet)), fails)
    assert own is error
    assert type(theirs) is (type(error) if isinstance(error, FastalignError) else RunError)
    assert str(theirs).startswith("rank 1 on host-1: ") and str(error) in str(theirs)
    assert theirs.said_here and (own.said_here if isinstance(own, FastalignError) else True)


def test_an_error_that_all_ranks_know_is_left_as_it_is(pair: Any) -> None:
    error = RunError("the loss is nan", on_all_ranks=True)

    def ends_too(ranks: Ranks) -> Exception:
        ranks.meet()
        return ranks.end(error)

    for end in pair(ends_too, ends_too):
        assert end is error and end.said_here is None


def test_a_store_that_is_gone_is_a_rank_that_is_lost(pair: Any) -> None:
    def stays(ranks: Ranks) -> Exception:
        ranks.meet()
        time.sleep(0.5)
        return ranks.end(_raised(ranks.meet))

    _, found = pair(lambda ranks: ranks.meet(), stays)
    assert isinstance(found, RunError) and "contact with another rank was lost" in str(found) and found.said_here


def test_a_rank_that_never_comes_is_named(pair: Any) -> None:
    def waits(ranks: Ranks) -> Exception:
        ranks.limit = 0.5
        ranks.meet()
        started = time.monotonic()
        error = _raised(ranks.meet)
        assert time.monotonic() - started < 10
        return error

    found, _ = pair(waits, lambda ranks: [ranks.meet(), time.sleep(1)])
    assert isinstance(found, RunError) and "in vain for rank 1" in str(found)


def _raised(call: Callable[..., Any], *args: Any) -> Exception:
    with pytest.raises(Exception) as caught:
        call(*args)
    return caught.value


def _config() -> Any:
    from fastalign.config import config_from_dict

    return config_from_dict({"model": {"name_or_path": "model"}})
