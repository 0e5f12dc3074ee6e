"""Checkpoints are whole or not there: writing, finding, replacing and deleting them."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from fastalign.config import config_from_dict
from fastalign.errors import ConfigError, RunError
from fastalign.training import checkpoint as module
from fastalign.training.checkpoint import (
    checkpoint_to_resume,
    last_checkpoint,
    restore,
    rotate,
    save_final,
    staged,
    why_not_whole,
    write_text,
)
from fastalign.training.run import train


@pytest.fixture(scope="module")
def finished(model_dir: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The configuration of a run, and its output folder with checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    raw = {
        "model": {"name_or_path": str(model_dir)},
        "task": {"data": str(data_dir / "task.jsonl")},
        "alignment": {"data": str(data_dir / "pairs.jsonl"), "batch_size": 8},
        "training": {
            "output_dir": str(folder),
            "max_steps": 4,
            "save_steps": 2,
            "eval_strategy": "no",
            "use_cpu": True,
        },
    }
    train(config_from_dict(raw))
    return raw, folder


@pytest.fixture
def run(finished: tuple[dict, Path], tmp_path: Path) -> tuple[dict, Path]:
    """The same, to be broken."""
    raw = copy.deepcopy(finished[0])
    raw["training"] |= {"output_dir": str(tmp_path / "out"), "resume_from_checkpoint": True}
    shutil.copytree(finished[1], tmp_path / "out")
    return raw, tmp_path / "out"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """A bit in the midst of the largest member of the archive."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        *((name, Path.unlink) for name in ("trainer_state.json", "adapter_model.safetensors", "adapter_config.json")),
        *((name, Path.unlink) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")),
        *((name, cut) for name in ("trainer_state.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth")),
        ("optimizer.pt", flip),
    ],
)
def test_a_checkpoint_that_lacks_a_piece_is_left_out(
    name: str, harm: Callable[[Path], None], run: tuple[dict, Path], capsys: pytest.CaptureFixture
) -> None:
    raw, folder = run
    newest = folder / "checkpoint-4"
    assert why_not_whole(newest) is None and last_checkpoint(folder) == newest
    harm(newest / name)
    assert last_checkpoint(folder) == folder / "checkpoint-2"
    assert checkpoint_to_resume(config_from_dict(raw)) == folder / "checkpoint-2"
    assert f"{newest} is left out: " in capsys.readouterr().err

    raw["training"]["resume_from_checkpoint"] = str(newest)
    if name != "trainer_state.json" or newest.joinpath(name).exists():
        with pytest.raises(ConfigError, match=f"cannot be used: .*; {folder / 'checkpoint-2'} is whole"):
            checkpoint_to_resume(config_from_dict(raw))


def test_any_flipped_bit_of_a_pickle_is_a_reason_and_no_traceback(run: tuple[dict, Path]) -> None:
    """zipfile raises a different error for nearly every field."""
    path = run[1] / "checkpoint-4" / "scheduler.pt"
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        why_not_whole(path.parent)


def test_every_rank_needs_its_random_state(run: tuple[dict, Path]) -> None:
    folder = run[1] / "checkpoint-4"
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "ranks": 2}))
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    assert "random states" in str(why_not_whole(folder))
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert why_not_whole(folder) is None
    (folder / "latest").write_text("global_step4")
    assert "DeepSpeed" in str(why_not_whole(folder))


def test_the_best_checkpoint_is_found_where_the_folder_was_moved_to(raw_config: dict, tmp_path: Path) -> None:
    raw = copy.deepcopy(raw_config)
    raw["training"] |= {
        "max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_task_loss", "save_total_limit": 3,
        "learning_rate": 1e-4,
    }  # fmt: skip
    train(config_from_dict(raw))
    (tmp_path / "out").rename(tmp_path / "moved")
    raw["training"] |= {
        "output_dir": str(tmp_path / "moved"), "max_steps": 4, "resume_from_checkpoint": True,
        "greater_is_better": True,  # so that the first one stays the best
    }  # fmt: skip
    train(config_from_dict(raw))
    state = json.loads((tmp_path / "moved" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(tmp_path / "moved" / "checkpoint-2")
    best, saved = (tmp_path / "moved" / f"{name}adapter_model.safetensors" for name in ("checkpoint-2/", ""))
    assert best.read_bytes() == saved.read_bytes()


def test_pickled_weights_are_refused(run: tuple[dict, Path]) -> None:
    _, folder = run
    newest = folder / "checkpoint-4"
    (newest / "adapter_model.safetensors").rename(newest / "adapter_model.bin")
    assert "not safetensors" in str(why_not_whole(newest))


def test_where_none_is_whole_nothing_is_started_over_in_silence(run: tuple[dict, Path]) -> None:
    raw, folder = run
    for checkpoint in folder.glob("checkpoint-*"):
        cut(checkpoint / "optimizer.pt")
    with pytest.raises(ConfigError, match=r"no checkpoint in .* is whole; remove them to start over"):
        train(config_from_dict(raw))


def test_below_a_step(run: tuple[dict, Path]) -> None:
    _, folder = run
    assert last_checkpoint(folder, below=4) == folder / "checkpoint-2"
    assert last_checkpoint(folder, below=2) is None and last_checkpoint(folder / "nowhere") is None


def test_folders_of_other_names_are_no_checkpoints(run: tuple[dict, Path]) -> None:
    _, folder = run
    for name in ("checkpoint-9-backup", "checkpoint-", "checkpoint-x"):
        shutil.copytree(folder / "checkpoint-4", folder / name)
    (folder / "checkpoint-99").write_text("a file")
    assert last_checkpoint(folder) == folder / "checkpoint-4"


def test_nothing_is_there_before_all_of_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged(tmp_path, "checkpoint-1") as staging:
        (staging / "checkpoint-1").mkdir()
        (staging / "checkpoint-1" / "file").write_text("half")
        assert not (tmp_path / "checkpoint-1").exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    with staged(tmp_path, "checkpoint-1") as staging:
        (staging / "checkpoint-1").mkdir()
        (staging / "checkpoint-1" / "file").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "file").read_text() == "whole"


def test_the_one_that_is_replaced_stays_until_the_other_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any rename, there is one or the other after `restore`."""
    target = tmp_path / "checkpoint-1"

    def save(text: str) -> None:
        with staged(tmp_path, "checkpoint-1") as staging:
            (staging / "checkpoint-1").mkdir()
            (staging / "checkpoint-1" / "file").write_text(text)

    save("old")
    rename, calls = Path.rename, []

    class Killed(BaseException):
        """Nothing of ours catches it."""

    def dying(path: Path, to: Path) -> Path:
        calls.append(path)
        if len(calls) == 2:
            raise Killed
        return rename(path, to)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(Killed):
            save("new")
    assert not target.exists()
    restore(tmp_path)
    assert (target / "file").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    save("new")
    assert (target / "file").read_text() == "new" and len(list(tmp_path.iterdir())) == 1


def test_restore_removes_only_what_a_killed_run_leaves(tmp_path: Path) -> None:
    for name in (".saving/checkpoint-3", ".deleting-checkpoint-1", ".replaced-checkpoint-2", "checkpoint-2", ".mine"):
        (tmp_path / name).mkdir(parents=True)
    restore(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", ".mine"}
    restore(tmp_path / "nowhere")


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 9])
@pytest.mark.parametrize("best", [None, "checkpoint-2", "checkpoint-10"])
def test_rotation_keeps_what_transformers_keeps(limit: int | None, best: str | None, tmp_path: Path) -> None:
    left = []
    for name, tidy in (("ours", rotate), ("theirs", rotate_checkpoints)):
        folder = tmp_path / name
        for step in (2, 4, 10):
            (folder / f"checkpoint-{step}").mkdir(parents=True)
        path = str(folder / best) if best else None
        if tidy is rotate:
            rotate(folder, limit, "checkpoint-10", path)
        else:
            rotate_checkpoints(str(folder), limit, path)
        left.append({path.name for path in folder.iterdir()})
    assert left[0] == left[1]


def test_rotation_keeps_what_was_just_saved_whatever_the_clock_says(tmp_path: Path) -> None:
    for step, seconds in ((2, 900), (4, 100)):  # the clock was set back in between
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (seconds, seconds))
    rotate(tmp_path, 1, "checkpoint-4", None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_what_is_being_deleted_is_no_checkpoint_any_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)  # killed here
    rotate(tmp_path, 1, "checkpoint-4", None)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_the_best_checkpoint_is_known_by_its_final_name(raw_config: dict, tmp_path: Path) -> None:
    raw = copy.deepcopy(raw_config)
    raw["training"] |= {
        "max_steps": 6, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "load_best_model_at_end": True, "metric_for_best_model": "eval_task_loss", "save_total_limit": 2,
    }  # fmt: skip
    train(config_from_dict(raw))
    states = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("checkpoint-*/trainer_state.json")]
    assert len(states) == 2
    for state in states:
        best = Path(state["best_model_checkpoint"])
        assert best.parent == tmp_path / "out" and best.name == f"checkpoint-{state['best_global_step']}"
    newest = max(states, key=lambda state: state["global_step"])
    assert (Path(newest["best_model_checkpoint"]) / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "out" / "adapter_model.safetensors"
    ).read_bytes()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_checkpoint_is_pushed_to_a_hub_from_its_final_place(
    raw_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    class AskToPush(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.push_to_hub = True

    monkeypatch.setattr(
        Trainer, "_push_from_checkpoint", lambda _, folder: pushed.append((folder, Path(folder).exists()))
    )
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda _: None)
    monkeypatch.setattr(Trainer, "push_to_hub", lambda *_, **__: None)
    raw = copy.deepcopy(raw_config)
    raw["training"] |= {"save_strategy": "steps", "save_steps": 2}
    train(config_from_dict(raw), callbacks=[AskToPush()])
    assert pushed == [(str(tmp_path / "out" / f"checkpoint-{step}"), True) for step in (2, 4)]


def test_the_final_results_leave_a_readme_alone(tmp_path: Path) -> None:
    def save(folder: str) -> None:
        Path(folder).mkdir(parents=True)
        for name in ("README.md", "adapter_model.safetensors"):
            (Path(folder) / name).write_text("new")
        (Path(folder) / "templates").mkdir()

    (tmp_path / "README.md").write_text("mine")
    for _ in range(2):
        save_final(save, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "templates").is_dir()
    assert (tmp_path / "adapter_model.safetensors").read_text() == "new" and not (tmp_path / ".saving").exists()


def test_a_text_is_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_text(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with (
        pytest.raises(RunError, match=r"No space left on device .* there is no checkpoint yet"),
        module.disk_errors(tmp_path),
    ):
        write_text(path, "new")
    assert path.read_text() == "old"
