"""What follows from all parts together: the device, the disk, what will be used, and what keeps a run from working."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from fastalign.doctor.children import Answer
from fastalign.doctor.parts import PARTS, Rows, gpus, requirement
from fastalign.doctor.words import size

BUILDS = "https://pytorch.org/get-started/locally"
LITTLE = 10e9  # bytes of disk; a model of a billion parameters takes 2 GB in bf16, and a run has checkpoints
SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def device_rows(answers: dict[str, Answer], driver: Sequence[dict[str, str]]) -> Rows:
    """A row for each GPU, or one that says why there is none."""
    torch = answers["torch"]
    if not gpus(answers):
        return [_no_gpu(torch, driver)]
    rows = []
    for index, gpu in enumerate(gpus(answers)):
        bf16 = {"native": "bf16 native", "emulated": "bf16 emulated, slow", "none": "no bf16"}[gpu["bf16"]]
        why = f"compute capability {gpu['capability']}, {size(gpu['total'])}, {size(gpu['free'])} free, {bf16}"
        if driver:
            why += f", driver {driver[0]['driver']}"
        state, mend = "ok", None
        if gpu["problem"]:
            state, why = "broken", f"{gpu['problem']}; {why}"
            if "no kernel image" in gpu["problem"]:
                mend = f"take a build of torch for this GPU: {BUILDS}"
        rows.append(_row(f"gpu {index}", gpu["name"], state, why, mend))
    return rows


def disk_rows(here: dict[str, Any], answers: dict[str, Answer]) -> Rows:
    """Memory, the disk of this folder and of the cache, and whether a hub may be asked."""
    memory = here["memory"]
    rows = [
        _row("memory", "", "ok", f"{size(memory['total'])}, {size(memory['free'])} free"),
        _disk("this folder", here["disk"], "results are written here, if the config names no other folder"),
    ]
    cache = answers["hub"].facts.get("cache") if "hub" in answers else None
    if cache:
        rows.append(_disk("cache", cache, f"models and data of a hub: {cache['folder']}"))
    offline = ", ".join(here["offline"])
    said = f"{offline} set: only folders and what the cache holds" if offline else "may be asked for models and data"
    return [*rows, _row("network", "", "not tried", said)]


def problems(rows: Rows) -> list[str]:
    """What no run is possible without, and is not ok."""
    bad = [row for row in rows if row["state"] in ("missing", "broken") and _required(row)]
    return [f"{row['part']}: {'; '.join(filter(None, [row['state'], row['why']]))}" for row in bad]


def conclusion(
    rows: Rows,
    answers: dict[str, Answer],
    here: dict[str, Any],
    driver: Sequence[dict[str, str]],
    floors: dict[str, str],
    wrong: list[str],
) -> list[str]:
    """A few sentences; commands stand on lines of their own, indented."""
    states = {row["part"]: row["state"] for row in rows}
    if wrong:
        return _cannot(rows, states, floors)
    lines = []
    training = answers["training"].facts if "training" in answers else {}
    if training:
        which = {"triton": "the Triton kernels", "torch": "the PyTorch twins of the kernels"}[training["kernels"]]
        attention = " and sdpa attention" if states.get("attention") == "ok" else ""
        dtype = SHORT.get(training["dtype"], training["dtype"])
        lines.append(f"Fine-tuning will run on the {training['device']} in {dtype} with {which}{attention}.")
    found = gpus(answers)
    if not found:
        lines.append(
            "There is no GPU for PyTorch here. Small models work on a CPU, such as that of `fastalign demo`; for "
            "models of billions of parameters take a machine with a GPU."
        )
    elif found[0]["bf16"] != "native":
        lines.append(
            "This GPU does not compute in bf16 itself, so that fp32 is taken; training.fp16=true takes half the time "
            "and less memory."
        )  # fmt: skip
    if len(found) > 1:
        lines.append(
            f"fastalign train uses one of the {len(found)} GPUs; all of them: "
            f"torchrun --nproc_per_node {len(found)} -m fastalign train config.yaml"
        )
    if "bitsandbytes" in states:
        state = states["bitsandbytes"]
        can = f"no, bitsandbytes is {state}"
        if state == "ok":
            can = f"yes, tried on {answers['bitsandbytes'].facts['device']}"
        lines.append(f"A base in 4 bits (model.quantization=nf4): {can}.")
    return lines


def _cannot(rows: Rows, states: dict[str, str], floors: dict[str, str]) -> list[str]:
    bad = [row["part"] for row in rows if row["state"] in ("missing", "broken") and _required(row)]
    lines = [f"Fine-tuning will not run here. What keeps it from running: {', '.join(bad)}."]
    absent = [PARTS[name].package for name in bad if name in PARTS and states[name] == "missing"]
    if absent:
        lines += ["Mend it with:", f"  pip install {' '.join(requirement(name, floors) for name in absent if name)}"]
    # The libraries that a run needs import those that it could do without, and fail with them.
    aside = [row for row in rows if row["state"] == "broken" and not _required(row) and row["mend"]]
    if aside and not absent:
        lines += ["First mend what the others may have failed with:", *[f"  {row['mend']}" for row in aside]]
    elif not absent:
        mends = [row["mend"] for row in rows if row["part"] in bad and row["mend"]]
        lines += ["First:", f"  {mends[0]}"] if mends else []
    return lines


def _no_gpu(torch: Answer, driver: Sequence[dict[str, str]]) -> dict[str, Any]:
    names = ", ".join(gpu["name"] for gpu in driver)
    if torch.state != "ok":
        why = f"the driver sees {names}, torch cannot use it" if driver else "torch cannot tell"
        return _row("gpu", None, "not tried", why)
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    build = torch.facts["build"]
    if torch.facts["device"] == "mps":
        return _row("gpu", None, "ok", "Apple's, through mps; nobody has tried fastalign on it")
    if driver and build == "CPU":
        why = f"the driver sees {names}, but this torch is a build for the CPU"
        mend = "pip install --force-reinstall torch" if sys.platform == "linux" else f"take one for CUDA: {BUILDS}"
        return _row("gpu", None, "broken", why, mend)
    if driver and hidden is not None and hidden.strip() in ("", "-1"):
        return _row("gpu", None, "not needed here", f"CUDA_VISIBLE_DEVICES={hidden!r} hides {names}")
    if driver:
        why = f"the driver ({driver[0]['driver']}) sees {names}, torch does not: {torch.facts['why_no_gpu']}"
        return _row("gpu", None, "broken", why, "update the driver, or take a build of torch for an older CUDA")
    return _row("gpu", None, "missing", "no NVIDIA GPU is visible: training runs on the CPU")


def _disk(name: str, disk: dict[str, Any], why: str) -> dict[str, Any]:
    free = disk["free"]
    if not disk["writable"]:
        return _row(name, "", "broken", f"not writable; {why}")
    little = ", which is little" if free is not None and free < LITTLE else ""
    return _row(name, "", "ok", f"{size(free)} free{little}; {why}")


def _row(name: str, version: str | None, state: str, why: str, mend: str | None = None) -> dict[str, Any]:
    return {"part": name, "version": version, "state": state, "use": "", "why": why, "mend": mend}


def _required(row: dict[str, Any]) -> bool:
    """GPUs that do not compute are, since training takes the first one."""
    return row["part"] == "gpu 0" or (row["part"] in PARTS and PARTS[row["part"]].required)
