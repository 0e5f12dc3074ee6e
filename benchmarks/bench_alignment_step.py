"""One alignment training step, ours and three other ways, in one interleaved run.

A step is forward and backward of InfoNCE (source to target, temperature 0.1) on the mean-pooled states of
layer l, for LoRA adapters (r 8, every linear layer but the head) on a frozen Llama with random weights; fp32
on the CPU, bf16 on a GPU, adapters included. No optimizer. The ways:

- ours: `pooled_at` and `alignment_loss`: one forward of both sides that stops after layer l.
- all_layers: what transformers offers: the causal model with `output_hidden_states=True`, both sides in one
  forward, `hidden_states[l]`; all layers and the head run. Pooling and loss in plain PyTorch, in fp32.
- no_head: the same, but only the decoder inside the causal model is called.
- reference: how the code of Liu & Niehues (2025, arXiv 2502.14830) does it, reproduced in these points: two
  forwards, one a side, that stop after layer l (with our `early_exit`, so that only what differs differs);
  pooling, cosine and softmax in the dtype of the model; the cosine by broadcasting to (N, N, D); the LM head
  on the middle states of side 0, under grad, its logits cast to fp32, used by nothing and dropped when the
  forward returns. Not reproduced: padding each side to its own length, checkpointing, DeepSpeed.

All sentences are equally long, so nothing is padded; every token is pooled, as in the paper. So all four
compute the same, which is checked first, in fp32: the loss and every LoRA gradient against those of
all_layers, within 1e-4 relative, else no speeds and exit code 1.

Time: median over the rounds; a ratio is the median of ours / theirs within a round. Peak memory: above what
was in use before the step. On a GPU what the allocator gave out; on the CPU the rise of the resident set of a
process of its own for each way that does a single step, so what happens on first use only is included.

The last line is `ratio_all_layers=0.xx ratio_reference=0.xx ratio_no_head=0.xx`, the one before it the same
for memory; with --json, stdout is JSON only. Rows go to the end of results/<device>/alignment_step.csv.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a step take seconds where others use the machine, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from harness import DEVICE, HERE, ON_GPU, append_rows, interleaved_ms, peak_bytes, provenance
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.model.early_exit import early_exit
from fastalign.model.encode import pooled_at
from fastalign.objectives.info_nce import alignment_loss

TEMPERATURE, TOLERANCE = 0.1, 1e-4
HEAD_DIM = 64
DEFAULTS = {"layers": 16, "hidden": 512, "vocab": 32000, "pairs": 32, "tokens": 32, "layer": 0, "rounds": 7}
SECONDS = 40.0  # for the rounds: on a busy machine there are fewer

Batch = dict[str, torch.Tensor]  # input_ids, attention_mask, pool_mask: (2N, T), sources in the first half


def ours(model: Any, batch: Batch, layer: int) -> torch.Tensor:
    source, target = pooled_at(model, [layer], batch)[0].chunk(2)
    return alignment_loss(source, target, temperature=TEMPERATURE, direction="source_to_target")


def all_layers(model: Any, batch: Batch, layer: int) -> torch.Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    output = model(**inputs, output_hidden_states=True, use_cache=False)
    mask = batch["pool_mask"].unsqueeze(-1)
    pooled = (output.hidden_states[layer].float() * mask).sum(1) / mask.sum(1)
    source, target = F.normalize(pooled, dim=1).chunk(2)
    return F.cross_entropy(source @ target.T / TEMPERATURE, torch.arange(len(source), device=DEVICE))


def no_head(model: Any, batch: Batch, layer: int) -> torch.Tensor:
    return all_layers(model.get_base_model().model, batch, layer)


def reference(model: Any, batch: Batch, layer: int) -> torch.Tensor:
    states, pooled = [], []
    for ids, attention, mask in zip(*(part.chunk(2) for part in batch.values()), strict=True):
        with early_exit(model, layer):
            states.append(model(input_ids=ids, attention_mask=attention).last_hidden_state)
        mask = mask.unsqueeze(-1).to(states[-1].dtype)
        pooled.append((states[-1] * mask).sum(1) / mask.sum(1))
    size = len(pooled[0])
    anchors, candidates = pooled[0].unsqueeze(1), pooled[1].unsqueeze(0)
    cosines = F.cosine_similarity(anchors.expand(-1, size, -1), candidates.expand(size, -1, -1), dim=-1)
    loss = -F.log_softmax(cosines / TEMPERATURE, dim=1).diagonal().mean()
    _logits = model.get_base_model().lm_head(states[0]).float()  # alive until the return
    return loss


WAYS: dict[str, Callable[[Any, Batch, int], torch.Tensor]] = {
    way.__name__: way for way in (ours, all_layers, reference, no_head)
}
OTHERS = [way for way in WAYS if way != "ours"]


class Case:
    """The adapted model, in fp32, and a batch: the same every time."""

    def __init__(self, options: argparse.Namespace):
        if options.threads:
            torch.set_num_threads(options.threads)
        torch.manual_seed(0)
        config = LlamaConfig(
            num_hidden_layers=options.layers,
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 11 // 4,
            num_attention_heads=options.hidden // HEAD_DIM,
            vocab_size=options.vocab,
        )
        # not the usual start, where B and with it the gradient of A is zero
        lora = LoraConfig(
            r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False
        )
        with DEVICE:
            self.model = get_peft_model(LlamaForCausalLM(config), lora)  # type: ignore[arg-type]
            input_ids = torch.randint(3, options.vocab, (2 * options.pairs, options.tokens))
            ones = torch.ones_like(input_ids)
        self.batch = {"input_ids": input_ids, "attention_mask": ones, "pool_mask": ones}
        self.layer: int = options.layer
        self.trained = {name: w for name, w in self.model.named_parameters() if w.requires_grad}

    def step(self, way: str) -> torch.Tensor:
        """The loss; the gradients stay until `gradients` takes them."""
        loss = WAYS[way](self.model, self.batch, self.layer)
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {name: weight.grad for name, weight in self.trained.items() if weight.grad is not None}
        for weight in self.trained.values():
            weight.grad = None
        return found

    def disagreements(self) -> list[str]:
        """Where a loss or a gradient differs from that of all_layers by more than the tolerance."""
        expected, wrong = {"loss": self.step("all_layers"), **self.gradients()}, []
        for way in WAYS:
            actual = {"loss": self.step(way), **self.gradients()}
            wrong += [f"{way}: only one of the two has {name}" for name in expected.keys() ^ actual.keys()]
            for name in expected.keys() & actual.keys():
                error = float((actual[name] - expected[name]).norm() / expected[name].norm())
                if not error <= TOLERANCE:  # NaN is wrong, too
                    wrong.append(f"{way}: {name} is off by {error:.1e}")
        return sorted(wrong)


def peak_in_process(options: argparse.Namespace, way: str) -> int | None:
    case = Case(options)
    return peak_bytes(partial(case.step, way), case.gradients)


def peaks_in_processes(options: argparse.Namespace) -> dict[str, int | None]:
    """Peak of each way on the CPU, in a process of its own."""
    # The server imports the libraries once and runs no operator, so the processes it forks start clean.
    kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(kind)
    context.set_forkserver_preload(["transformers.models.llama.modeling_llama", "peft"])
    peaks = {}
    for way in WAYS:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            peaks[way] = pool.submit(peak_in_process, options, way).result()
    return peaks


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One alignment training step: ours and three other ways.")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default {default or 'the middle'}")
    parser.add_argument("--threads", type=int, help="of the CPU; default: PyTorch's choice")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="for <device>/alignment_step.csv")
    options = parser.parse_args(arguments)
    options.layer = options.layer or options.layers // 2
    if not 1 <= options.layer < options.layers:
        parser.error("--layer must be 1 or more and below --layers (the last hidden state is normed)")
    if options.hidden < HEAD_DIM or options.hidden % HEAD_DIM:
        parser.error(f"--hidden must be a multiple of {HEAD_DIM}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    case = Case(options)
    if wrong := case.disagreements():  # on the CPU this is also the warm-up
        print("no speeds, because not all ways compute the same:", *wrong[:12], sep="\n  ", file=sys.stderr)
        return 1
    steps = {way: partial(case.step, way) for way in WAYS}
    if ON_GPU:
        for weight in case.model.parameters():  # and no buffers: the rotary frequencies stay fp32
            weight.data = weight.data.bfloat16()
        interleaved_ms(steps, case.gradients, 2, SECONDS)  # warm-up; libraries take their workspaces
        peaks = {way: peak_bytes(steps[way], case.gradients) for way in WAYS}
    else:
        peaks = peaks_in_processes(options)
    measured = interleaved_ms(steps, case.gradients, options.rounds, SECONDS)
    times = {way: torch.tensor(ms) for way, ms in measured.items()}

    shape = {name: getattr(options, name) for name in DEFAULTS} | {"rounds": len(times["ours"])}
    dtype, nan, rows = str(next(case.model.parameters()).dtype).removeprefix("torch."), float("nan"), []
    for way, ms in times.items():
        row = {"provider": way, **provenance(), "dtype": dtype, **shape}
        low, middle, high = (round(q, 3) for q in ms.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist())
        row |= {"median_ms": middle, "p10_ms": low, "p90_ms": high, "peak_bytes": peaks[way]}
        rows.append(row | {"time_ratio": round((times["ours"] / ms).quantile(0.5).item(), 4)})
    path = append_rows("alignment_step", rows, options.out)
    time_ratios = {row["provider"]: row["time_ratio"] for row in rows}
    memory_ratios = {way: (peaks["ours"] or nan) / (peaks[way] or nan) for way in WAYS}
    if options.json:
        found = {"rows": rows, "time_ratios": time_ratios, "memory_ratios": memory_ratios}
        print(json.dumps(found, indent=2).replace("NaN", "null"))
        return 0

    shown = [f"{key}={rows[0][key]}" for key in ("device", "torch", "threads", "dtype", *shape)]
    print(*shown, f"\n{len(rows)} rows appended to {path}\n")
    print(f"{'':12}{'median ms':>10}{'p10':>9}{'p90':>9}{'peak MB':>9}   ours / this: {'time':>5}{'memory':>8}")
    for row in rows:
        way, peak = row["provider"], (row["peak_bytes"] or nan) / 1e6
        line = f"{way:12}{row['median_ms']:10.1f}{row['p10_ms']:9.1f}{row['p90_ms']:9.1f}{peak:9.1f}"
        print(f"{line}{time_ratios[way]:21.2f}{memory_ratios[way]:8.2f}")
    print()
    print(*(f"memory_{way}={memory_ratios[way]:.2f}" for way in OTHERS))
    print(*(f"ratio_{way}={time_ratios[way]:.2f}" for way in OTHERS))
    return 0


if __name__ == "__main__":
    sys.exit(main())
