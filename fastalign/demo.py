"""The demo: the main job, end to end, on a corpus and a model that are made on the spot.

A tiny decoder first reads plain text in six languages. Then it learns voice commands from English rows only, once
without alignment and once with alignment steps in between, with equally many task updates. What it can do in the
other languages is the comparison: which translation its states at the layer find, and which of the intents it thinks
most likely. (To spell out slot values it has never been taught is beyond a model of this size.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from fastalign.config import TaskConfig, config_from_dict
from fastalign.data import demo_corpus
from fastalign.data.templates import TaskExample, TaskReader
from fastalign.data.tokenization import IGNORE_INDEX, PromptTokenizer, pad
from fastalign.errors import ConfigError
from fastalign.training.arguments import hardware_defaults, training_arguments
from fastalign.training.output import require_free_folder
from fastalign.training.run import train

SENTENCES, PRETRAINING_STEPS, TASK_STEPS, RATIO, TEST_ROWS, LAYER = 3_000, 500, 150, 2, 60, 3
ARMS = {"task_only": "task_only", "aligned": "alternate"}  # folder: schedule.mode
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
        The content of ``demo.json``: retrieval and intent accuracy per language without and with alignment.

    Raises:
        ConfigError: the folder holds an earlier demo.
    """
    started = time.perf_counter()
    out = Path(out)
    for folder in (out, *(out / arm for arm in ARMS)):
        require_free_folder(folder, overwrite)
    found = [name for name in ("demo.json", "model", "data") if (out / name).exists()]
    if found and not overwrite:
        raise ConfigError(f"--out: {str(out)!r} holds {found[0]}; choose another folder or add --overwrite")
    out.mkdir(parents=True, exist_ok=True)
    files = demo_corpus.write(out / "data", seed=seed)
    _say("a tiny model reads plain text in", ", ".join(demo_corpus.LANGUAGES))
    _pretrain(out / "model", seed)

    result: dict[str, Any] = {"seed": seed, "layer": LAYER, "arms": {}}
    for arm, mode in ARMS.items():
        _say(f"{TASK_STEPS} updates on English commands,", "no alignment" if mode == "task_only" else "with alignment")
        summary = train(_config(out, files, arm, mode, seed), overwrite=True)
        if summary["interrupted"]:  # the arms would not have had equally many updates
            raise KeyboardInterrupt
        _say("commands in all languages, from the test set")
        result["arms"][arm] = {"retrieval": summary["retrieval"], "intent_accuracy": _test(out, files, arm)}
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
            "schedule": {"mode": mode, "ratio": float(RATIO)},
            "training": {
                "output_dir": str(out / arm),
                "max_steps": TASK_STEPS * (1 + RATIO if mode == "alternate" else 1),
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
        set_seed,
    )

    set_seed(seed)
    texts = [text for lang in demo_corpus.LANGUAGES for text in demo_corpus.plain_text(lang, SENTENCES, seed)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2_000, special_tokens=specials, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2, **MODEL)
    rows = [{"input_ids": [*ids, 1]} for ids in tokenizer(texts)["input_ids"]]
    trainer = Trainer(
        LlamaForCausalLM(config),
        training_arguments(
            {
                **hardware_defaults({}),
                "output_dir": str(folder),
                "max_steps": PRETRAINING_STEPS,
                "per_device_train_batch_size": 48,
                "learning_rate": 3e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.05,
                "logging_steps": 100,
                "save_strategy": "no",
                "report_to": "none",
                "seed": seed,
            }
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(str(folder))


def _test(out: Path, files: dict[str, Path], arm: str) -> dict[str, float]:
    """Share of test commands per language whose intent the adapted model finds the most likely of all intents."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = PromptTokenizer(AutoTokenizer.from_pretrained(out / "model"))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "model"), str(out / arm)).eval()
    examples = TaskReader(TaskConfig(template="slots", system="")).read(str(files["task.test"]), "the demo's test set")
    intents = sorted({_intent(example) for example in examples})
    scores = {}
    for language in demo_corpus.LANGUAGES:
        chosen = [example for example in examples if example.language == language][:TEST_ROWS]
        likelihoods = torch.stack([_log_likelihood(model, tokenizer, chosen, intent) for intent in intents])
        found = [intents[i] for i in likelihoods.argmax(dim=0).tolist()]
        right = sum(intent == _intent(example) for intent, example in zip(found, chosen, strict=True))
        scores[language] = right / len(chosen)
    return scores


def _intent(example: TaskExample) -> str:
    """The first item of the answer, ``intent: ...``."""
    return example.messages[-1]["content"].split("; ")[0]


@torch.no_grad()
def _log_likelihood(
    model: Any, tokenizer: PromptTokenizer, examples: Sequence[TaskExample], answer: str
) -> torch.Tensor:
    """Log-probability (N,) of an answer to each of the prompts, its end not counted."""
    encoded = []
    for example in examples:
        messages = [*example.messages[:-1], {"role": "assistant", "content": answer}]
        ids, labels = tokenizer(replace(example, messages=messages))
        encoded.append((ids[:-1], labels[:-1]))
    ids = pad([ids for ids, _ in encoded], 0)
    mask = pad([[1] * len(ids) for ids, _ in encoded], 0)
    labels = pad([labels for _, labels in encoded], IGNORE_INDEX)[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    return -F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none").sum(dim=1)
