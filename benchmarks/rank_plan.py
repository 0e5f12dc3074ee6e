"""The runs of bench_ranks.py: which there are, what each is told, and the model and data that all of them train on."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import ON_GPU

from fastalign.training.schedule import Schedule
from fastalign.training.zero import AHEAD, LIVE, PRESETS, SMALL, preset

PARTS = ("stages", "negatives", "trace")
NEGATIVES = ("rank", "world")
MODES = ("alternate", "align_only", "task_only", "joint")
WIDE = 4096  # of an 8B model
SKIPPED = 4  # steps at the beginning of a run: DDP orders its buckets, DeepSpeed records its first trace
PLAIN = {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0}
ASIDE = {"plain": PLAIN, "no prefetch": {"stage3_prefetch_bucket_size": 0}}


@dataclass(frozen=True)
class Case:
    """A run: what wraps the model, with which settings of ZeRO-3, and what is trained."""

    wrapper: str
    mode: str = "alternate"
    negatives: str = "rank"
    micro: bool = False
    aside: str = ""  # how ZeRO-3's settings differ from the preset's

    @property
    def name(self) -> str:
        forwards = "in micro-batches" if self.micro else "in one forward"
        return ", ".join(filter(None, (self.wrapper, self.aside, self.mode, self.negatives, forwards)))

    @property
    def timed(self) -> bool:
        """Else its collectives are counted, and that is all."""
        return self.aside != "plain" and not (self.micro and self.wrapper != "ddp")


def cases(parts: Sequence[str]) -> list[Case]:
    """All runs, each once; of those that must come to the same, DDP's is the first."""
    found = [Case("ddp")]
    if "stages" in parts:
        found += [*map(Case, PRESETS), Case("zero2", micro=True)]
    if "negatives" in parts:
        found += [Case("ddp", negatives=negatives, micro=micro) for micro in (False, True) for negatives in NEGATIVES]
    if "trace" in parts:
        for mode in MODES:
            found += [Case("ddp", mode), *(Case("zero3", mode, aside=aside) for aside in ("", *ASIDE))]
        found += [Case("zero3", mode, micro=True, aside=aside) for mode in MODES[:2] for aside in ("", "plain")]
    return list(dict.fromkeys(found))


def settings(case: Case, hidden: int) -> dict[str, Any] | None:
    """Of DeepSpeed; None for DDP."""
    if case.wrapper == "ddp":
        return None
    found = preset(case.wrapper)
    if "zero3" in case.wrapper:
        found["zero_optimization"] |= {
            "stage3_max_live_parameters": LIVE * hidden**2 // WIDE**2,
            "stage3_max_reuse_distance": LIVE * hidden**2 // WIDE**2,
            "stage3_prefetch_bucket_size": AHEAD * hidden**2 // WIDE**2,
            "stage3_param_persistence_threshold": SMALL * hidden // WIDE,
            "log_trace_cache_warnings": True,
            **ASIDE.get(case.aside, {}),
        }
    return found


def configuration(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Of `fastalign train`. As many steps of each stream in every schedule."""
    zero = settings(case, options.hidden)
    return {
        "model": {"name_or_path": str(folder / "base")},
        "adapter": {"r": 8},
        "task": {"data": str(folder / "task.jsonl"), "eval_share": 0},
        "alignment": {
            "data": str(folder / "pairs.jsonl"), "eval_share": 0, "negatives": case.negatives,
            "batch_size": options.pairs, "micro_batch_size": options.micro if case.micro else options.pairs,
        },
        "schedule": {"mode": case.mode},
        "training": {
            "output_dir": str(folder / "out" / case.name), "max_steps": len(kinds(case.mode, options.steps)),
            "per_device_train_batch_size": options.rows, "optim": "adamw_torch", "lr_scheduler_type": "constant",
            "warmup_steps": 0, "seed": 3, "save_strategy": "no", "logging_steps": 10**6, "report_to": "none",
            "disable_tqdm": True, "use_cpu": not ON_GPU, **({"deepspeed": zero} if zero else {}),
        },
    }  # fmt: skip


def kinds(mode: str, steps: int) -> list[tuple[str, ...]]:
    """The streams of every step of a run; `steps` are those under `alternate`, of which half are of each stream."""
    count = steps if mode == "alternate" else SKIPPED + (steps - SKIPPED) // 2
    return [tuple(name for name, _ in Schedule(mode).at(step)) for step in range(count)]  # type: ignore[arg-type]


def make_base(options: argparse.Namespace, folder: Path) -> None:
    """A Llama with random weights, a tokenizer of one token a word, and rows that are all equally long."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{number}" for number in range(options.vocab - 4)]
    names = ["<s>", "</s>", "<pad>", "<unk>", *words]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[assignment]
    specials = dict(zip(("bos_token", "eos_token", "pad_token", "unk_token"), names, strict=False))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **specials).save_pretrained(folder / "base")
    torch.manual_seed(0)
    heads = max(1, options.hidden // 64)
    config = LlamaConfig(
        num_hidden_layers=options.layers,
        hidden_size=options.hidden,
        intermediate_size=options.hidden * 7 // 2,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=options.vocab,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    chance = random.Random(0)

    def text(length: int) -> str:
        return " ".join(chance.choices(words, k=length))

    half = options.words // 2
    task = [{"prompt": text(half), "response": text(half), "lang": "en"} for _ in range(400)]
    pairs = [{"_id": f"{i}", "en": text(options.words), "de": text(options.words)} for i in range(400)]
    for name, rows in (("task", task), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
