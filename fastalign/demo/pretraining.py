"""The demo's base model: a small Llama and its tokenizer, trained from nothing on the plain text of all languages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastalign.data import demo_corpus
from fastalign.training.arguments import hardware_defaults, training_arguments
from fastalign.training.progress import show_progress

SENTENCES, STEPS = 3_000, 500  # per language; of the optimizer
MODEL = {
    "hidden_size": 160,
    "intermediate_size": 416,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def pretrain(folder: Path, seed: int) -> None:
    """A byte-level BPE and a small Llama, trained on the plain text of all languages, into `folder`."""
    from transformers import (
        DataCollatorForLanguageModeling,
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        set_seed,
    )

    set_seed(seed)
    texts = [text for lang in demo_corpus.LANGUAGES for text in demo_corpus.plain_text(lang, SENTENCES, seed)]
    tokenizer = _tokenizer(texts)
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2, **MODEL)
    rows = [{"input_ids": [*ids, 1]} for ids in tokenizer(texts)["input_ids"]]
    trainer = Trainer(
        LlamaForCausalLM(config),
        training_arguments(
            {
                **hardware_defaults({}),
                "output_dir": str(folder),
                "max_steps": STEPS,
                "per_device_train_batch_size": 48,
                "learning_rate": 3e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 0.05,
                "logging_steps": 20,
                "save_strategy": "no",
                "report_to": "none",
                "seed": seed,
            }
        ),
        train_dataset=rows,  # type: ignore[arg-type]
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )
    show_progress(trainer)
    trainer.train()
    trainer.save_model(str(folder))


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2_000, special_tokens=specials, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
