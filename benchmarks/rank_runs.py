"""Runs of the trainer on several ranks, one after another in one launch, watched step by step.

As a script it is run by a launcher, on every rank, for bench_ranks.py: `torchrun ... rank_runs.py PLAN RESULTS`, two
JSON files. `forget`, what one run has to leave behind for the next one, is for the tests, too.
"""

from __future__ import annotations

import gc
import io
import json
import os
import sys
import time
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

MESSAGE = "Invalidate trace cache"  # DeepSpeed's, where zero_optimization.log_trace_cache_warnings is set


class Traffic(TorchDispatchMode):
    """Counts the collectives of this rank: ``{operation: [calls, bytes in, bytes out]}``.

    In: what the rank gives. Out: what it has afterwards. What is done in place is both. The operations are PyTorch's
    own (c10d), in which torch.distributed, DeepSpeed and the C++ code of DDP all end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            sizes = [sum(_bytes(part) for part in tree_leaves(argument)) for argument in args[:2]]
            given = sizes[1] or sizes[0]  # else the second argument is the group
            counts = self.found.setdefault(func._schema.name.removeprefix("c10d::"), [0, 0, 0])
            for i, more in enumerate((1, given, sizes[0])):
                counts[i] += more
        return func(*args, **(kwargs or {}))


def _bytes(part: Any) -> int:
    return part.numel() * part.element_size() if isinstance(part, torch.Tensor) else 0


class Watch(TrainerCallback):
    """Of every optimizer step either the time, or the collectives and DeepSpeed's messages.

    Counting takes time of its own, so that a run is either counted or timed. A step is from its first forward to
    the end of the update, when all ranks have agreed on whether to go on.
    """

    def __init__(self, *, counts: bool) -> None:
        self._counts = counts
        self.ms: list[float] = []
        self.traffic: list[dict[str, list[int]]] = []
        self.messages: list[int] = []
        self.parameters: list[dict[str, Any]] = []
        self.buffers = 0
        self._model: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._model = model = kwargs["model"]
        self.buffers = sum(_bytes(buffer) for buffer in model.buffers())
        for name, weight in model.named_parameters():
            size = {"numel": getattr(weight, "ds_numel", weight.numel()), "itemsize": weight.element_size()}
            self.parameters.append({"name": name, "trained": weight.requires_grad, **size})

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._open = ExitStack()
        if self._counts:
            self._said = self._open.enter_context(redirect_stdout(io.StringIO()))
            self._traffic = self._open.enter_context(Traffic())
        _wait()
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait()
        self.ms.append((time.perf_counter() - self._begun) * 1e3)
        self._open.close()
        if self._counts:
            self.traffic.append(self._traffic.found)
            self.messages.append(self._said.getvalue().count(MESSAGE))

    def release(self) -> None:
        """Give the memory of the weights back: DeepSpeed never lets go of a model that it has wrapped."""
        for weight in self._model.parameters():
            for part in (weight, *([weight.ds_tensor] if hasattr(weight, "ds_tensor") else [])):
                part.data = part.data.new_empty(0)
        self._model = None


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def forget() -> None:
    """What accelerate and transformers keep for the life of a process: whether it is DeepSpeed, and how."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    gc.collect()


def watched(case: dict[str, Any], *, counts: bool) -> dict[str, Any]:
    """Train as the configuration of a case says, and what was seen of it, the adapter aside."""
    from fastalign.config import config_from_dict
    from fastalign.training.run import train

    watch = Watch(counts=counts)
    summary = train(config_from_dict(case["config"]), overwrite=True, callbacks=[watch])
    watch.release()
    forget()
    losses = {name: [part["loss_first"], part["loss_last"]] for name, part in summary["streams"].items()}
    return {"losses": losses, **{name: part for name, part in vars(watch).items() if not name.startswith("_")}}


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(plan["threads"])
    counted = {case["name"]: watched(case, counts=True) for case in plan["cases"]}
    timed: dict[str, list[dict[str, Any]]] = {case["name"]: [] for case in plan["cases"] if case["timed"]}
    order, end = [case for case in plan["cases"] if case["timed"]], time.perf_counter() + plan["seconds"]
    for done in range(plan["rounds"]):
        if done >= plan["least"] and not _all_go_on(time.perf_counter() < end):
            break
        for case in order:
            timed[case["name"]].append(watched(case, counts=False))
        order = order[1:] + order[:1]
    if os.environ["RANK"] == "0":
        found = {"counted": counted, "timed": timed, "backend": torch.distributed.get_backend()}
        Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


def _all_go_on(mine: bool) -> bool:
    """The same on all ranks, whose clocks differ."""
    every = [mine]
    torch.distributed.broadcast_object_list(every, src=0)
    return every[0]


if __name__ == "__main__":
    main()
