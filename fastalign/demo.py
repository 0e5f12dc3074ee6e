"""The demo: the main job, end to end, on a corpus and a model that are made on the spot.

A tiny decoder first reads plain text in six languages. Then it learns voice commands from English rows only, once
without alignment and once with alignment steps in between, with equally many task updates. What it can do in the
other languages is the comparison.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastalign.config import TaskConfig, config_from_dict
from fastalign.data import demo_corpus
from fastalign.data.templates import TaskExample, TaskReader
from fastalign.data.tokenization import PromptTokenizer
from fastalign.errors import ConfigError
from fastalign.training.run import train

SENTENCES, PRETRAINING_STEPS, TASK_STEPS, TEST_ROWS, LAYER = 3_000, 500, 150, 60, 3
MODEL = {
    "hidden_size": 160,
    "intermediate_size": 416,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def demo(out: str | Path, *, seed: int = 2, overwrite: bool = False) -> dict[str, Any]:
    """Run the demo into a folder.

    Args:
        out: folder for the corpus, the model, the adapters and ``demo.json``.
        seed: of everything that is drawn.
        overwrite: replace an earlier demo in that folder.

    Returns:
        The content of ``demo.json``: retrieval, intent accuracy and slot F1 per language without and with alignment.

    Raises:
        ConfigError: the folder holds an earlier demo.
    """
    started = time.perf_counter()
    out = Path(out)
    if (out / "demo.json").exists() and not overwrite:
        raise ConfigError(f"--out: {str(out)!r} holds an earlier demo; choose another folder or add --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    files = demo_corpus.write(out / "data", seed=seed)
    _say("a tiny model reads plain text in", ", ".join(demo_corpus.LANGUAGES))
    _pretrain(out / "model", seed)

    result: dict[str, Any] = {"seed": seed, "layer": LAYER, "arms": {}}
    for arm, mode in (("task_only", "task_only"), ("aligned", "alternate")):
        _say(f"{TASK_STEPS} updates on English commands,", "no alignment" if mode == "task_only" else "with alignment")
        summary = train(_config(out, files, arm, mode, seed), overwrite=True)
        _say("commands in all languages, from the test set")
        result["arms"][arm] = {"retrieval": summary["retrieval"], "languages": _test(out, files, arm)}
    result["seconds"] = time.perf_counter() - started
    (out / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _say(*words: str) -> None:
    print("==>", *words, flush=True)


def _config(out: Path, files: dict[str, Path], arm: str, mode: str, seed: int) -> Any:
    return config_from_dict(
        {
            "model": {"name_or_path": str(out / "model")},
            "adapter": {"r": 16, "alpha": 32.0},
            "task": {"data": str(files["task.train"]), "template": "slots", "system": "", "eval_share": 0.1},
            "alignment": {"data": str(files["parallel"]), "eval_share": 0.1, "layer": LAYER, "batch_size": 64},
            "schedule": {"mode": mode},
            "training": {
                "output_dir": str(out / arm),
                "max_steps": TASK_STEPS * (2 if mode == "alternate" else 1),
                "per_device_train_batch_size": 16,
                "learning_rate": 2e-3,
                "logging_steps": 50,
                "eval_strategy": "no",
                "save_strategy": "no",
                "seed": seed,
            },
        }
    )


def _pretrain(folder: Path, seed: int) -> None:
    """A byte-level BPE and a small Llama, trained on the plain text of all languages, into `folder`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import (
        DataCollatorForLanguageModeling,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(seed)
    texts = [text for lang in demo_corpus.LANGUAGES for text in demo_corpus.plain_text(lang, SENTENCES, seed)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2_000, special_tokens=specials, initial_alphabet=alphabet))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2, **MODEL)
    rows = [{"input_ids": [*ids, 1]} for ids in tokenizer(texts)["input_ids"]]
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            output_dir=str(folder),
            max_steps=PRETRAINING_STEPS,
            per_device_train_batch_size=48,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            logging_steps=100,
            save_strategy="no",
            report_to="none",
            seed=seed,
            dataloader_pin_memory=False,
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def _test(out: Path, files: dict[str, Path], arm: str) -> dict[str, dict[str, float]]:
    """Intent accuracy and F1 of slots (type and value both right) per language, by greedy decoding."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "model"), str(out / arm)).eval()
    examples = TaskReader(TaskConfig(template="slots", system="")).read(str(files["task.test"]), "the demo's test set")
    scores = {}
    for language in demo_corpus.LANGUAGES:
        chosen = [example for example in examples if example.language == language][:TEST_ROWS]
        answers = _generate(model, PromptTokenizer(tokenizer), chosen)
        gold = [_items(example.messages[-1]["content"]) for example in chosen]
        found = [_items(answer) for answer in answers]
        intents = [g["intent"] == f.get("intent") for g, f in zip(gold, found)]
        right = sum(len(_slots(g) & _slots(f)) for g, f in zip(gold, found))
        total = sum(len(_slots(g)) + len(_slots(f)) for g, f in zip(gold, found))
        scores[language] = {"intent_accuracy": sum(intents) / len(intents), "slot_f1": 2 * right / max(total, 1)}
    return scores


@torch.no_grad()
def _generate(model: Any, prompts: PromptTokenizer, examples: Sequence[TaskExample]) -> list[str]:
    rows = [prompts.prompt_ids(example.messages[:-1]) for example in examples]
    width = max(map(len, rows))
    pad = prompts.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
    output = model.generate(
        input_ids=ids, attention_mask=(ids != pad).long(), max_new_tokens=48, do_sample=False, pad_token_id=pad
    )
    return prompts.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)


def _items(answer: str) -> dict[str, str]:
    pairs = (item.partition(": ") for item in answer.strip().split("; "))
    return {kind: value for kind, colon, value in pairs if colon}


def _slots(items: dict[str, str]) -> Counter[tuple[str, str]] | set[tuple[str, str]]:
    return {(kind, value) for kind, value in items.items() if kind != "intent"}
