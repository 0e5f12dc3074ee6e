"""The output folder: what is somebody's is never overwritten, and only one run writes there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastalign.config import config_from_dict, load_config, save_config
from fastalign.errors import ConfigError
from fastalign.training.output import clear, locked, require_free_folder
from fastalign.training.run import train

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    "name", ["checkpoint-3/x", "adapter_config.json", "adapter_model.safetensors", "summary.json", "stopped.json"]
)
def test_results_are_not_replaced_unasked(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("precious")
    with pytest.raises(ConfigError, match=r"holds results.*--overwrite"):
        require_free_folder(tmp_path, overwrite=False)
    require_free_folder(tmp_path, overwrite=True)
    assert path.read_text() == "precious"


def test_a_config_that_somebody_wrote_is_a_result_and_ours_is_not(raw_config: dict, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name_or_path: x}  # my own\n")
    with pytest.raises(ConfigError, match=r"holds results \(config\.yaml\)"):
        require_free_folder(tmp_path, overwrite=False)
    config = config_from_dict(raw_config)
    save_config(config, tmp_path / "config.yaml")
    require_free_folder(tmp_path, overwrite=False)
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin", "x.gguf"])
def test_another_model_is_left_alone_even_with_overwrite(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(ConfigError, match="holds a model"):
        require_free_folder(tmp_path, overwrite=True)


def test_the_folder_of_the_base_model(raw_config: dict, model_dir: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in model_dir.iterdir()}
    (tmp_path / "link").symlink_to(model_dir)
    for folder in (str(model_dir), str(tmp_path / "link")):
        raw_config["training"]["output_dir"] = folder
        with pytest.raises(ConfigError, match="the folder of the base model"):
            train(config_from_dict(raw_config), overwrite=True)
    assert {path: path.read_bytes() for path in model_dir.iterdir()} == before


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for folder, said in (
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below", "cannot"),
        (tmp_path / "loop" / "below", "cannot"),
        (Path("/proc/nowhere/out"), "cannot write"),
        (tmp_path / ("x" * 300), "cannot"),
    ):
        with pytest.raises(ConfigError, match=said):
            require_free_folder(folder, overwrite=True)


def test_clearing_removes_results_only(tmp_path: Path) -> None:
    kept = {"notes.txt", "checkpoints", "checkpoint-12-backup", "checkpoint-notes.txt"}
    for name in ("checkpoint-3/x", "adapter_config.json", "stopped.json", "notes.txt", "checkpoints/x"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoint-12-backup").mkdir()
    (tmp_path / "checkpoint-notes.txt").write_text("x")
    (tmp_path / "checkpoint-4").symlink_to(tmp_path / "checkpoint-12-backup")
    clear(tmp_path, from_step=9)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "checkpoint-3", "checkpoint-4", "adapter_config.json"}
    clear(tmp_path, from_step=3)
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "checkpoint-3", "adapter_config.json"}
    clear(tmp_path, from_step=None)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_config_that_somebody_wrote_is_kept_from_a_resume_too(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    require_free_folder(tmp_path, overwrite=False, resumes=True)
    (tmp_path / "config.yaml").write_text("training: {}")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        require_free_folder(tmp_path, overwrite=False, resumes=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_second_run_is_kept_out_until_the_first_is_gone(raw_config: dict, tmp_path: Path) -> None:
    """Also where the first one was killed."""
    folder = tmp_path / "out"
    folder.mkdir()
    hold = (
        "import sys, time, pathlib; from fastalign.training.output import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    other = subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, env=environment)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="another run is writing to"):
            train(config_from_dict(raw_config))
    finally:
        other.kill()
        other.wait()
    deadline = time.monotonic() + 5
    while True:
        try:
            with locked(folder) as lock:
                lock.acquire()  # it is held already
            break
        except ConfigError:
            assert time.monotonic() < deadline
    assert list(folder.iterdir()) == []
    with locked(tmp_path / "later") as lock:
        (tmp_path / "later").mkdir()
        lock.acquire()
        with pytest.raises(ConfigError), locked(tmp_path / "later"):
            pass
