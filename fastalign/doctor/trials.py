"""What is tried of each part, in a child process: libraries are imported inside the functions, and anything may happen.

Each trial returns what it found, and raises where the part does not do what a run would ask of it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastalign.doctor.machine import usage

if TYPE_CHECKING:
    import torch

Facts = dict[str, Any]
TRIALS: dict[str, Callable[[], Facts]] = {}
MODULES: dict[str, str] = {}  # of each part that is a library: what it is imported as
GRACE = 5  # seconds after which a child ends itself, should its parent be gone


def answer(name: str, limit: float) -> None:
    """Run a trial, print its outcome as JSON on stdout, and end the process before any library can say goodbye."""
    faulthandler.dump_traceback_later(limit + GRACE, exit=True)
    channel = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        found = {"state": "ok", "why": "", "facts": TRIALS[name]()}
    except BaseException as error:  # whatever it is, it is what the user came here to learn
        root = MODULES.get(name)
        missing = isinstance(error, ModuleNotFoundError) and error.name is not None and error.name == root
        found = {"state": "missing" if missing else "broken", "why": "" if missing else _reason(error), "facts": {}}
    with os.fdopen(channel, "w", encoding="utf-8") as stream:
        json.dump(found, stream)
    os._exit(0)


def _reason(error: BaseException) -> str:
    """The error at the bottom of a chain, and the library that raised it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    where, trace = "", error.__traceback__
    while trace is not None:
        library = str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0]
        if library and not library.startswith(("importlib", "_frozen_importlib")):
            where = library
        trace = trace.tb_next
    said = f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"
    return said if where in ("", "fastalign", "__main__") else f"{said} (in {where})"


def _trial(name: str, module: str | None = None) -> Callable[[Callable[[], Facts]], Callable[[], Facts]]:
    def register(function: Callable[[], Facts]) -> Callable[[], Facts]:
        TRIALS[name] = function
        if module:
            MODULES[name] = module
        return function

    return register


def _imports(name: str, *modules: str) -> None:
    """Registers the trial of a part that only has to be importable, by all these modules."""

    @_trial(name, modules[0].split(".")[0])
    def trial() -> Facts:
        first, *_ = [importlib.import_module(module) for module in modules]
        return {"version": str(version)} if (version := getattr(first, "__version__", None)) else {}


_imports("accelerate", "accelerate")
_imports("datasets", "datasets")
_imports("deepspeed", "deepspeed")
_imports("peft", "peft")
_imports("wandb", "wandb")
_imports("tensorboard", "tensorboard", "tensorboard.summary.writer.event_file_writer")
_imports("matplotlib", "matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg")


@_trial("torch", "torch")
def _torch() -> Facts:
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    found = {
        "version": str(torch.__version__),
        "build": built if torch.version.cuda or torch.version.hip else "CPU",
        "threads": torch.get_num_threads(),
        "device": str(_device()),
        "gpus": [],
        "why_no_gpu": None,
    }
    a = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    if torch.cuda.is_available():
        found["gpus"] = [_gpu(index, a) for index in range(torch.cuda.device_count())]
    elif torch.version.cuda or torch.version.hip:
        try:
            torch.cuda.init()
        except Exception as error:
            found["why_no_gpu"] = _reason(error)
    if not torch.allclose((a @ a).double(), a.double() @ a.double(), rtol=1e-3, atol=1e-3):
        raise ArithmeticError("a product of two matrices is wrong")
    return found


def _gpu(index: int, a: torch.Tensor) -> Facts:
    """One GPU: what it is, and the obstacle in a product of two matrices, None where there is none."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    found: Facts = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "total": properties.total_memory,
        "free": None,
        "bf16": "none",
        "problem": None,
    }
    try:
        with torch.cuda.device(index):
            found["free"] = torch.cuda.mem_get_info(index)[0]
            if torch.cuda.is_bf16_supported(including_emulation=False):
                found["bf16"] = "native"
            elif torch.cuda.is_bf16_supported():
                found["bf16"] = "emulated"
            b = a.to(f"cuda:{index}")
            if not torch.allclose((b @ b).cpu().double(), a.double() @ a.double(), rtol=0.05, atol=0.5):
                found["problem"] = "a product of two matrices is wrong"
    except Exception as error:
        found["problem"] = _reason(error)
    return found


def _device() -> torch.device:
    """The one that transformers' Trainer takes."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@_trial("transformers", "transformers")
def _transformers() -> Facts:
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401 - what they need is loaded with them

    return {"version": transformers.__version__}


@_trial("triton", "triton")
def _triton() -> Facts:
    import triton

    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    return {"version": triton.__version__, "compiler": compiler}


@_trial("kernels", "fastalign_kernels")
def _kernels() -> Facts:
    from fastalign.model.device import kernels

    device = _device()
    return {**kernels(device), "problem": kernel_problem(device)}


def kernel_problem(device: torch.device) -> str | None:
    """Loss and gradient of a small batch of token states against the same in fp64 on the CPU; None if they agree."""
    import torch

    from fastalign_kernels import pooled_info_nce

    def loss_and_gradient(hidden: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = hidden.detach().requires_grad_()
        loss = pooled_info_nce(hidden, mask, temperature=0.1, skip_first=True, symmetric=True)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    hidden = torch.randn(16, 12, 256, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.arange(1, 17).unsqueeze(1)).long()
    try:
        found = loss_and_gradient(hidden.to(device), mask.to(device))
        expected = loss_and_gradient(hidden.double(), mask)
    except Exception as error:
        return _reason(error)
    errors = [((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
    return None if max(errors) < 1e-4 else f"wrong results: off by {max(errors):.1e}"


@_trial("attention", "torch")
def _attention() -> Facts:
    """Which kinds of scaled_dot_product_attention work forward and backward, and which one PyTorch takes."""
    import torch
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    device = _device()
    dtype = torch.bfloat16 if _has_bf16(device) else torch.float32
    kinds: dict[str, Any] = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    states = torch.randn(2, 2, 16, 64, generator=torch.Generator().manual_seed(0)).to(device, dtype).requires_grad_()
    causal = torch.ones(16, 16, dtype=torch.bool, device=device).tril().expand(2, 1, 16, 16)
    found: Facts = {"dtype": str(dtype).removeprefix("torch."), "works": [], "taken": {}}
    for case, options in {"without padding": {"is_causal": True}, "with padding": {"attn_mask": causal}}.items():
        for name, kind in kinds.items():
            with contextlib.suppress(Exception), sdpa_kernel(kind):
                functional.scaled_dot_product_attention(states, states, states, **options).sum().backward()
                found["works"] += [name] if name not in found["works"] else []
        with contextlib.suppress(Exception):  # not public, but the only one that knows
            choice = int(getattr(torch, "_fused_sdp_choice")(states, states, states, **options))  # noqa: B009
            found["taken"][case] = next(name for name, kind in kinds.items() if int(kind) == choice)
    if not found["works"]:
        raise RuntimeError("no kind of scaled_dot_product_attention works")
    return found


@_trial("flash_attn", "flash_attn")
def _flash_attn() -> Facts:
    import torch

    flash_attn = importlib.import_module("flash_attn")

    if torch.cuda.is_available():
        states = torch.randn(1, 16, 2, 64, device="cuda", dtype=torch.float16)
        flash_attn.flash_attn_func(states, states, states, causal=True)
    return {"version": flash_attn.__version__}


def _has_bf16(device: torch.device) -> bool:
    from fastalign.model.loading import has_bf16

    return has_bf16(device)


@_trial("bitsandbytes", "bitsandbytes")
def _bitsandbytes() -> Facts:
    """A layer in 4 bits: what it holds against what was put in, its product and gradient against what it holds."""
    import torch

    bnb: Any = importlib.import_module("bitsandbytes")  # its types are not those of its code

    device = _device()
    dtype = torch.bfloat16 if _has_bf16(device) else torch.float32
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 128, generator=generator)
    layer = bnb.nn.Linear4bit(128, 64, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    if hasattr(layer, "support_avx512bf16_for_cpu"):
        layer.support_avx512bf16_for_cpu = False  # as `fastalign.model.loading` does
    layer = layer.to(device)
    held = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double().cpu()
    states = torch.randn(8, 128, generator=generator).to(device, dtype).requires_grad_()
    product = layer(states)
    product.sum().backward()
    assert states.grad is not None
    pairs = {
        "quantisation": (held, weight.double(), 0.2),
        "product": (product.detach(), states.detach().double().cpu() @ held.T, 0.02),
        "gradient": (states.grad, held.sum(0).expand(8, -1), 0.02),
    }
    for name, (a, b, most) in pairs.items():
        error = ((a.double().cpu() - b).norm() / b.norm()).item()
        if not error < most:
            raise ArithmeticError(f"wrong results on {device}: {name} off by {error:.1e}")
    return {"version": bnb.__version__, "device": str(device)}


@_trial("hub", "huggingface_hub")
def _hub() -> Facts:
    """Where models and data are kept, and whether there is a token; not what it is."""
    import huggingface_hub
    from huggingface_hub import constants

    named = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip()]
    saved = Path(constants.HF_TOKEN_PATH)
    token = named[0] if named else str(saved) if saved.is_file() else None
    return {"version": huggingface_hub.__version__, "token": token, "cache": usage(Path(constants.HF_HUB_CACHE))}


@_trial("training")
def _training() -> Facts:
    from fastalign.doctor.tiny_run import tiny_run

    return tiny_run(_device())
