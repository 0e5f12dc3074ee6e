"""Everything together: a run as `fastalign train` makes it, on a model and data that are made on the spot."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def tiny_run(device: torch.device) -> dict[str, Any]:
    """A task step and an alignment step, from files to a saved adapter.

    Args:
        device: the one that transformers will take; it decides on the number format.

    Returns:
        device: its name. dtype: of the base. kernels: ``triton`` or ``torch``.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from fastalign.config import config_from_dict
    from fastalign.model.loading import compute_dtype
    from fastalign.training.run import train

    words = ["<s>", "</s>", "<pad>", *"abcdefgh"]
    rows = {
        "task": [{"prompt": f"{word} b", "response": word} for word in "abcdefgh"],
        "pairs": [{"en": f"{word} b", "de": f"{word} c"} for word in "abcdefgh"],
    }
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        words_of = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
        words_of.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=words_of, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
        )
        tokenizer.save_pretrained(folder / "model")
        shape: dict[str, Any] = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
        }
        special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(words), max_position_embeddings=64, **shape, **special))
        model.save_pretrained(folder / "model")
        for kind, lines in rows.items():
            (folder / kind).with_suffix(".jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
        config = config_from_dict(
            {
                "model": {"name_or_path": str(folder / "model")},
                "task": {"data": str(folder / "task.jsonl"), "eval_share": 0},
                "alignment": {"data": str(folder / "pairs.jsonl"), "eval_share": 0, "batch_size": 4},
                "training": {
                    "output_dir": str(folder / "output"),
                    "max_steps": 2,
                    "per_device_train_batch_size": 2,
                    "eval_strategy": "no",
                    "save_strategy": "no",
                },
            }
        )
        summary = train(config)
        if not (folder / "output" / "adapter_model.safetensors").is_file():
            raise RuntimeError("no adapter was saved")
        dtype = str(compute_dtype(config.model, device)).removeprefix("torch.")
        return {"device": summary["device"], "dtype": dtype, "kernels": summary["kernels"]["backend"]}
