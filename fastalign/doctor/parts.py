"""The parts that a run may need, and what is said of each: what it is used for here, why, and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from typing import Any

from fastalign.config.checks import installed_version
from fastalign.doctor.children import Answer

Rows = list[dict[str, Any]]
NO_TORCH = "needs torch, which is not usable here"


@dataclass(frozen=True)
class Part:
    """A library, or something that several libraries do together.

    Attributes:
        use: what it is for.
        package: what pip calls it; None for what is no library of its own.
        module: what it is imported as, where that differs.
        required: whether no run is possible without it.
        needs_torch: whether it cannot be tried without torch.
        aside: whether one device trains without it, so that it may be missing there.
    """

    use: str
    package: str | None = None
    module: str | None = None
    required: bool = False
    needs_torch: bool = True
    aside: bool = False


# In the order in which they are told.
PARTS: dict[str, Part] = {
    "torch": Part("everything", "torch", required=True, needs_torch=False),
    "transformers": Part("models, tokenizers, the training loop", "transformers", required=True),
    "peft": Part("LoRA adapters", "peft", required=True),
    "accelerate": Part("devices and number formats", "accelerate", required=True),
    "datasets": Part("data of a hub, parquet", "datasets", required=True),
    "hub": Part("models and data of a hub", "huggingface_hub", required=True, needs_torch=False),
    "attention": Part("model.attn_implementation"),
    "flash_attn": Part("model.attn_implementation=flash_attention_2", "flash-attn", "flash_attn", aside=True),
    "triton": Part("fused kernels on a GPU", "triton", needs_torch=False, aside=True),
    "kernels": Part("pooling and the contrastive loss", required=True),
    "bitsandbytes": Part("model.quantization=nf4, optimizers in 8 bits", "bitsandbytes"),
    "deepspeed": Part("training.deepspeed, ZeRO over several GPUs", "deepspeed", aside=True),
    "matplotlib": Part("plots", "matplotlib", needs_torch=False),
    "tensorboard": Part("training.report_to=tensorboard", "tensorboard", needs_torch=False),
    "wandb": Part("training.report_to=wandb", "wandb", needs_torch=False),
    "training": Part("a trial of everything together", required=True),
}


def oldest() -> dict[str, str]:
    """The oldest version of each package that fastalign asks for; empty where it is not installed itself."""
    try:
        asked = importlib.metadata.requires("fastalign") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = [re.match(r"([\w.-]+)\s*>=\s*([\d.]+)", line) for line in asked]
    return {match[1]: match[2] for match in found if match}


def untried(name: str) -> Answer:
    """Of a part that needs torch where that is not usable: whether it is there at all, which imports nothing."""
    part = PARTS[name]
    if part.package:
        try:
            there = importlib.util.find_spec(part.module or part.package) is not None
        except (ImportError, ValueError):
            there = False
        if not there:
            return Answer("missing")
    return Answer("not tried", NO_TORCH)


def row(name: str, answer: Answer, answers: dict[str, Answer], floors: dict[str, str]) -> dict[str, Any]:
    """What is said of a part: `part`, `version`, `state`, `use`, `why` and `mend`, a command or None."""
    part = PARTS[name]
    found = answer.facts.get("version") or (installed_version(part.package) if part.package else "")
    state, why = answer.state, answer.why
    if state == "missing":
        found = None
    elif state == "ok":
        why = said(name, answer.facts, answers)
        least = floors.get(part.package or "")
        if least and found and _numbers(found) < _numbers(least):
            state, why = "broken", f"older than {least}, the oldest that fastalign was tried with"
        elif answer.facts.get("problem"):
            state, why = "broken", answer.facts["problem"]
    if state == "missing" and part.aside and not _useful(name, answers):
        state, why = "not needed here", f"not installed; {_why_aside(name)}"
    told = {"part": name, "version": found, "state": state, "use": part.use, "why": why}
    return {**told, "mend": _mend(name, state, answer, answers, floors)}


def said(name: str, facts: dict[str, Any], answers: dict[str, Answer]) -> str:
    """Details of a part that is ok."""
    if name == "torch":
        return f"{facts['build']} build, CPU threads: {facts['threads']}"
    if name == "attention":
        taken = dict.fromkeys(facts["taken"].values())
        choice = ", ".join(f"{kind} {case}" for case, kind in facts["taken"].items())
        choice = f"{next(iter(taken))} with and without padding" if len(taken) == 1 else choice
        return (
            f"auto takes sdpa{f', here {choice}' if choice else ''}; kinds of sdpa that work in {facts['dtype']}: "
            f"{', '.join(facts['works'])}; eager is always there"
        )
    if name == "hub":
        kept = facts["token"]
        return f"access token: {f'there ({kept})' if kept else 'none, which only gated or private models need'}"
    if name == "kernels":
        which = {"triton": "Triton kernels", "torch": "PyTorch twins"}[facts["backend"]]
        return f"{which} ({facts['why']}); loss and gradient of a small batch agree with fp64"
    if name == "triton":
        if not gpus(answers):
            return "works; not used without a GPU"
        if facts["compiler"] is None:
            return "importable, but there is no C compiler, which it needs: install gcc, or name one in CC"
        return f"C compiler: {facts['compiler']}; tried with the kernels"
    if name == "bitsandbytes":
        return f"4 bits and back, product and gradient tried on {facts['device']}"
    if name == "deepspeed":
        return "importable" if len(gpus(answers)) > 1 else "importable; not needed on one device"
    if name == "flash_attn":
        return "not used unless asked for, sdpa has a flash kernel of its own"
    if name == "training":
        return f"steps of a tiny model, in {facts['dtype']} on {facts['device']}; the adapter was saved"
    return ""


def gpus(answers: dict[str, Answer]) -> list[dict[str, Any]]:
    """The GPUs that torch sees."""
    return answers["torch"].facts.get("gpus", []) if "torch" in answers else []


def requirement(package: str, floors: dict[str, str]) -> str:
    """What to give pip."""
    return f'"{package}>={floors[package]}"' if package in floors else package


def _useful(name: str, answers: dict[str, Answer]) -> bool:
    return {"triton": len(gpus(answers)) > 0, "deepspeed": len(gpus(answers)) > 1}.get(name, False)


def _why_aside(name: str) -> str:
    return {
        "triton": "without a GPU the PyTorch twins run",
        "deepspeed": "one device needs no ZeRO",
        "flash_attn": "sdpa is used",
    }[name]


def _mend(name: str, state: str, answer: Answer, answers: dict[str, Answer], floors: dict[str, str]) -> str | None:
    part = PARTS[name]
    if state == "missing" and part.package:
        return f"pip install {requirement(part.package, floors)}"
    if state != "broken":
        return None
    if answer.late:
        return "fastalign doctor --timeout 300, if this machine is only slow"
    if part.package is None:
        return None
    if part.aside and not _useful(name, answers):
        return f"pip uninstall -y {part.package}"
    # torch's libraries are packages of their own
    alone = "" if name == "torch" else "--no-deps "
    return f"pip install --force-reinstall {alone}{requirement(part.package, floors)}"


def _numbers(text: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", text)
    return tuple(map(int, found[0].split("."))) if found else ()
