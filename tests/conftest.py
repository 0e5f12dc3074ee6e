"""A tiny random model, a tokenizer trained on the spot, and small data files, shared by the tests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forks import Forks

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test reaches for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in NumPy; `make gpu` sets it to 0
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread only waits

WORDS = {
    "en": ["set", "alarm", "play", "music", "light", "off", "on", "tomorrow", "seven", "song", "kitchen", "rain"],
    "de": ["stelle", "wecker", "spiele", "musik", "licht", "aus", "an", "morgen", "sieben", "lied", "küche", "regen"],
    "fr": [
        "mets",
        "réveil",
        "joue",
        "musique",
        "lampe",
        "éteins",
        "allume",
        "demain",
        "sept",
        "chanson",
        "cuisine",
        "pluie",
    ],
}


def sentence(language: str, number: int) -> str:
    """Sentence `number`: the same words in every language, a different one for every number below 12 ** 3."""
    words = WORDS[language]
    return " ".join(words[number // 12**place % 12] for place in range(3))


def make_model(folder: Path) -> None:
    """Saves a random Llama of 4 layers with its tokenizer (BOS, EOS, PAD) in a folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator([" ".join(words) for words in WORDS.values()] * 4, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_data(folder: Path) -> None:
    """Writes ``task.jsonl`` (24 rows with answers of different length) and ``pairs.jsonl`` (60 N-way rows)."""
    task = [{"prompt": sentence("en", i), "response": " ".join(["yes"] * (1 + i % 5)), "lang": "en"} for i in range(24)]
    pairs = [{"_id": f"row{i}", **{language: sentence(language, 7 * i) for language in WORDS}} for i in range(60)]
    for name, rows in (("task", task), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_model`."""
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return folder


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_data`."""
    folder = tmp_path_factory.mktemp("data")
    make_data(folder)
    return folder


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Runs commands in processes that have everything imported already."""
    made = Forks(tmp_path_factory.mktemp("forks"))
    yield made
    made.close()


@pytest.fixture
def raw_config(model_dir: Path, data_dir: Path, tmp_path: Path) -> dict:
    """A complete small configuration as a nested dictionary, for `config_from_dict`."""
    return {
        "model": {"name_or_path": str(model_dir)},
        "adapter": {"r": 4, "alpha": 8.0},
        "task": {"data": str(data_dir / "task.jsonl"), "eval_share": 0.2},
        "alignment": {"data": str(data_dir / "pairs.jsonl"), "batch_size": 8, "eval_share": 0.2},
        "training": {
            "output_dir": str(tmp_path / "out"),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "logging_steps": 1,
            "eval_strategy": "no",
            "save_strategy": "no",
            "use_cpu": True,
        },
    }
