"""Many runs on several ranks in one launch: importing the libraries takes longer than a run of a tiny model.

As a module it is run by a launcher, on every rank: it trains the configurations of a JSON file one after another, in
one process group. `on_ranks` and `Runs` are the other side, for tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from transformers import set_seed

from benchmarks.rank_runs import forget
from fastalign.config import config_from_dict
from fastalign.model.loading import add_adapter, load_model
from fastalign.objectives.cross_entropy import ChunkedCrossEntropy
from fastalign.training import trainer
from fastalign.training.run import train
from fastalign.training.zero import preset

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
    "PYTHONUNBUFFERED": "1",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
DEEPSPEED = ["deepspeed", "--num_accelerators", "2", "--module"]
SEED = 3
SGD = {"optim": "sgd", "learning_rate": 0.1}


def on_ranks(cases: Mapping[str, Mapping[str, Any]], folder: Path, launcher: Sequence[str] = TORCHRUN) -> None:
    """Train these configurations on two ranks; what fails is told by the test that misses its results.

    Args:
        cases: by name, ``{"config": nested dictionary, "break": name in fastalign.training.trainer, or absent}``. What
            is named there does nothing during that run, which may fail.
        folder: for the list of cases, and what the ranks print.
    """
    (folder / "cases.json").write_text(json.dumps(list(cases.values())), encoding="utf-8")
    with (folder / "log").open("w") as log:
        command = [*launcher, "tests.rank_cases", str(folder / "cases.json")]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=ENVIRONMENT, cwd=ROOT, timeout=600)


def configured(
    model_dir: Path, data_dir: Path, out: Path, ranks: int, mode: str, alignment: Mapping[str, Any], **training: Any
) -> dict[str, Any]:
    """A run of 4 steps whose rows of a step are the same on 1 and on 2 ranks."""
    accumulation = training.get("gradient_accumulation_steps", 1)
    return {
        "model": {"name_or_path": str(model_dir)},
        "adapter": {"r": 4, "alpha": 8.0},
        "task": {"data": str(data_dir / "task.jsonl"), "eval_share": 0},
        "alignment": {
            "data": str(data_dir / "pairs.jsonl"), "layer": 2, "eval_share": 0, "negatives": "world",
            "batch_size": 8 // ranks, "micro_batch_size": 4 // ranks, **alignment,
        },
        "schedule": {"mode": mode},
        "training": {
            "output_dir": str(out), "max_steps": 4, "per_device_train_batch_size": 4 // ranks // accumulation,
            "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0.0, "seed": SEED, "use_cpu": True,
            "save_strategy": "no", "disable_tqdm": True, **training,
        },
    }  # fmt: skip


def wrapped(wrapper: str) -> dict[str, Any]:
    """The key of ``training``. The tiny model's parameters are all below the size from which ZeRO-3 parts them."""
    if wrapper == "ddp":
        return {}
    settings = preset(wrapper)
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if "zero3" in wrapper else {}
    return {"deepspeed": settings}


class Runs:
    """Runs on one rank, here, and the same on two, and how far they are apart."""

    def __init__(self, model_dir: Path, data_dir: Path, folder: Path):
        self._model_dir, self._data_dir, self.folder = model_dir, data_dir, folder
        self._cases: dict[str, dict[str, Any]] = {}
        self._one: dict[str, Path] = {}
        set_seed(SEED)
        config = config_from_dict(self._config("none", 1, "alternate"))
        start = add_adapter(load_model(config.model), config.adapter).state_dict()
        self._start = {name.replace(".default", ""): tensor.clone() for name, tensor in start.items()}

    def add(self, name: str, wrapper: str, mode: str, *, broken: str | None = None, **settings: Any) -> None:
        """A case for two ranks: `alignment` and `adapter` are for these sections, other settings for ``training``."""
        config = self._config(f"two/{name}", 2, mode, **settings, **wrapped(wrapper))
        self._cases[name] = {"config": config, **({"break": broken} if broken else {})}

    def launch(self, launcher: Sequence[str] = TORCHRUN) -> Runs:
        on_ranks(self._cases, self.folder, launcher)
        return self

    def two(self, name: str) -> Path:
        """The results of a case; the test that needs them fails with what the ranks printed where there are none."""
        out = self.folder / "two" / name
        assert (out / "adapter_model.safetensors").is_file(), (self.folder / "log").read_text(errors="replace")[-3000:]
        return out

    def one(self, mode: str, **settings: Any) -> Path:
        """The results of a run on one rank; the same one is run once."""
        key = f"{mode} {settings}"
        if key not in self._one:
            name = f"one/{len(self._one)}"
            train(config_from_dict(self._config(name, 1, mode, **settings)))
            self._one[key] = self.folder / name
        return self._one[key]

    def error(self, name: str, one: Path) -> float:
        """How far the adapter of two ranks is from that of one, relative to what the run has changed in it."""
        ours, wanted = (load_file(out / "adapter_model.safetensors") for out in (self.two(name), one))
        assert ours.keys() == wanted.keys()
        apart = sum(float((ours[key] - wanted[key]).double().square().sum()) for key in wanted)
        moved = sum(float((self._start[key] - wanted[key]).double().square().sum()) for key in wanted)
        return (apart / moved) ** 0.5

    def failed(self, name: str) -> bool:
        return not (self.folder / "two" / name / "adapter_model.safetensors").exists()

    def _config(
        self, name: str, ranks: int, mode: str, alignment: Any = None, adapter: Any = None, **training: Any
    ) -> dict[str, Any]:
        out = self.folder / name
        raw = configured(self._model_dir, self._data_dir, out, ranks, mode, alignment or {}, **training)
        raw["adapter"] |= adapter or {}
        return raw


def main() -> None:
    torch.set_num_threads(1)
    # A tiny model's logits would all be one chunk: three rows a chunk, so that ranks have unequally many.
    ChunkedCrossEntropy.row_bytes = lambda self, states, head: self.memory // 3  # type: ignore[method-assign]
    for case in json.loads(Path(sys.argv[-1]).read_text(encoding="utf-8")):
        broken = case.get("break")
        try:
            with mock.patch.object(trainer, broken, lambda model: torch.zeros(())) if broken else nullcontext():
                train(config_from_dict(case["config"]))
        except RuntimeError:
            if not broken:
                raise
        forget()


if __name__ == "__main__":
    main()
