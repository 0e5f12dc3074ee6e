"""One alignment training step, ours and three other ways, in one interleaved run.

A step is forward and backward of InfoNCE (source to target, temperature 0.1) on the mean-pooled states of layer l,
for LoRA adapters (r 8, every linear layer but the head) on a frozen Llama with random weights; fp32 on the CPU,
bf16 on a GPU, adapters included. No optimizer. The ways:
- ours: `hidden_at` and `alignment_loss`, as the trainer: one forward of both sides that stops after layer l.
- all_layers: what transformers offers: the causal model with `output_hidden_states=True`, both sides in one
  forward, `hidden_states[l]`; all layers and the head run. Pooling and loss in plain PyTorch, in fp32.
- reference: how the code of Liu & Niehues (2025, arXiv 2502.14830) does it, reproduced in these points: two
  forwards, one a side, that stop after layer l (with our `early_exit`, so that only what differs differs); pooling,
  cosine and softmax in the dtype of the model; the cosine by broadcasting to (N, N, D); the LM head on the middle
  states of side 0, under grad, its logits cast to fp32, used by nothing and dropped when the forward returns. Not
  reproduced: padding each side to its own length, checkpointing, DeepSpeed.
- no_head: as all_layers, but only the decoder inside the causal model is called.

No padding, and every token is pooled, as in the paper: so all four compute the same. That is checked first, in fp32:
the loss and every LoRA gradient against all_layers, within 1e-4 relative, else no speeds and exit code 1.
A ratio of times is the median of ours / theirs within a round. Peak memory is what tensors hold at once above what
they held before the step, as PyTorch allocates it, on a GPU or the CPU, after the first use. The resident set of a
process on the CPU grows by more, about twice as much with glibc, by what malloc holds back.
The last line is `ratio_all_layers=0.xx ratio_reference=0.xx ratio_no_head=0.xx`, the one before it the same for
memory; with --json, stdout is JSON only. Rows go to the end of results/<device>/alignment_step.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

# Threads that spin while they wait make a step take seconds where others use the machine, too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
import torch.nn.functional as F
from harness import DEVICE, HERE, ON_GPU, append_rows, interleaved_ms, peak_bytes, provenance, take_gradients
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from fastalign.model.early_exit import early_exit, hidden_at
from fastalign.objectives.info_nce import alignment_loss

TEMPERATURE, TOLERANCE = 0.1, 1e-4
SECONDS = 40.0  # for the rounds: on a busy machine there are fewer
DEFAULTS = {"layers": 16, "hidden": 512, "vocab": 32000, "pairs": 32, "tokens": 32, "layer": 0}
DEFAULTS["rounds"] = 100 if ON_GPU else 7

Batch = dict[str, torch.Tensor]  # input_ids, attention_mask, pool_mask: (2N, T), sources in the first half


def ours(model: Any, batch: Batch, layer: int) -> torch.Tensor:
    [states] = hidden_at(model, [layer], input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return alignment_loss(states, batch["pool_mask"], temperature=TEMPERATURE, direction="source_to_target")


def all_layers(model: Any, batch: Batch, layer: int) -> torch.Tensor:
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    output = model(**inputs, output_hidden_states=True, use_cache=False)
    mask = batch["pool_mask"].unsqueeze(-1)
    pooled = (output.hidden_states[layer].float() * mask).sum(1) / mask.sum(1)
    source, target = F.normalize(pooled, dim=1).chunk(2)
    return F.cross_entropy(source @ target.T / TEMPERATURE, torch.arange(len(source), device=DEVICE))


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


def no_head(model: Any, batch: Batch, layer: int) -> torch.Tensor:
    return all_layers(model.get_base_model().model, batch, layer)


WAYS = {way.__name__: way for way in (ours, all_layers, reference, no_head)}


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
            num_attention_heads=max(1, options.hidden // 64),
            vocab_size=options.vocab,
        )
        # not the usual start, where B and with it the gradient of A is zero
        lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", r=8, init_lora_weights=False)
        with DEVICE:
            self.model = get_peft_model(LlamaForCausalLM(config), lora)  # type: ignore[arg-type]
            input_ids = torch.randint(3, options.vocab, (2 * options.pairs, options.tokens))
            ones = torch.ones_like(input_ids)
        self.batch = {"input_ids": input_ids, "attention_mask": ones, "pool_mask": ones}
        self.layer = options.layer
        self.trained = {name: w for name, w in self.model.named_parameters() if w.requires_grad}

    def step(self, way: str) -> torch.Tensor:
        """The loss; the gradients stay until `gradients` takes them."""
        loss = WAYS[way](self.model, self.batch, self.layer)
        loss.backward()
        return loss.detach()

    def gradients(self) -> dict[str, torch.Tensor]:
        return take_gradients(self.trained)

    def disagreements(self) -> list[str]:
        """Where a loss or a gradient differs from that of all_layers by more than the tolerance."""
        expected, wrong = {"loss": self.step("all_layers"), **self.gradients()}, []
        for way in ("ours", "reference", "no_head"):
            actual = {"loss": self.step(way), **self.gradients()}
            for name in expected:
                error = (actual.pop(name, float("nan")) - expected[name]).norm() / expected[name].norm()
                if not error <= TOLERANCE:  # NaN is wrong, too, or a gradient that is not there
                    wrong.append(f"{way}: {name} is off by {error:.1e}")
            wrong += [f"{way}: {name} is not in all_layers" for name in actual]
        return wrong


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
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    case = Case(options)
    if wrong := case.disagreements():  # on the CPU this is also the warm-up
        print("no speeds, because not all ways compute the same:", *wrong[:9], sep="\n  ", file=sys.stderr)
        return 1
    steps = {way: partial(case.step, way) for way in WAYS}
    if ON_GPU:
        for weight in case.model.parameters():  # and no buffers: the rotary frequencies stay fp32
            weight.data = weight.data.bfloat16()
        interleaved_ms(steps, case.gradients, 5, SECONDS)  # warm-up; libraries take their workspaces
    peaks = {way: peak_bytes(steps[way], case.gradients) for way in WAYS}
    times = interleaved_ms(steps, case.gradients, options.rounds, SECONDS)
    about = provenance() | {"dtype": str(next(case.model.parameters()).dtype).removeprefix("torch.")}
    about |= {name: getattr(options, name) for name in DEFAULTS} | {"rounds": len(times["ours"])}
    rows = []
    for way, ms in times.items():
        low, middle, high = (round(float(q), 3) for q in np.quantile(ms, (0.1, 0.5, 0.9)))
        numbers = {"median_ms": middle, "p10_ms": low, "p90_ms": high, "peak_bytes": peaks[way]}
        numbers["time_ratio"] = round(float(np.median(np.divide(times["ours"], ms))), 4)
        rows.append({"provider": way, **about, **numbers, "memory_ratio": round(peaks["ours"] / peaks[way], 4)})
    path = append_rows("alignment_step", rows, options.out)
    if options.json:
        print(json.dumps(rows, indent=2))
        return 0
    print(*(f"{key}={value}" for key, value in about.items()), f"\nrows appended to {path}\n")
    print(f"{'':12}{'median ms':>10}{'p10':>9}{'p90':>9}{'peak MB':>9}   ours / this: {'time':>5}{'memory':>8}")
    for row in rows:
        print(f"{row['provider']:12}{row['median_ms']:10.1f}{row['p10_ms']:9.1f}{row['p90_ms']:9.1f}", end="")
        print(f"{row['peak_bytes'] / 1e6:9.1f}{row['time_ratio']:21.2f}{row['memory_ratio']:8.2f}")
    print(*(f"memory_{row['provider']}={row['memory_ratio']:.2f}" for row in rows[1:]))
    print(*(f"ratio_{row['provider']}={row['time_ratio']:.2f}" for row in rows[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
