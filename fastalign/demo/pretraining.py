"""The demo's base model: a small Llama and its tokenizer, trained from nothing on the plain text of all languages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastalign.data import demo_corpus
from fastalign.demo.conversation import CHAT_TEMPLATE
from fastalign.training.arguments import hardware_defaults, training_arguments
from fastalign.training.progress import show_progress

SENTENCES, STEPS = 6_000, 600  # per language; of the optimizer
ROWS, WIDTH = 16, 64  # of a batch; tokens of a row
MODEL = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 4,
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
    texts = {language: demo_corpus.plain_text(language, SENTENCES, seed) for language in demo_corpus.LANGUAGES}
    tokenizer = _tokenizer([text for part in texts.values() for text in part])
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=2, **MODEL)
    rows = [row for part in texts.values() for row in _packed(tokenizer(part)["input_ids"], tokenizer.eos_token_id)]
    trainer = Trainer(
        LlamaForCausalLM(config),
        training_arguments(
            {
                **hardware_defaults({}),
                "output_dir": str(folder),
                "max_steps": STEPS,
                "per_device_train_batch_size": ROWS,
                "learning_rate": 4e-3,
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


def _packed(sentences: Sequence[Sequence[int]], end: int) -> list[dict[str, list[int]]]:
    """The sentences one after the other, in rows of `WIDTH` tokens, so that nothing is padded."""
    stream = [token for ids in sentences for token in (*ids, end)]
    return [{"input_ids": stream[i : i + WIDTH]} for i in range(0, len(stream) - WIDTH + 1, WIDTH)]


def _tokenizer(texts: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    specials = ["<s>", "</s>", "<pad>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4_000, special_tokens=specials, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=128,
        chat_template=CHAT_TEMPLATE,
    )
