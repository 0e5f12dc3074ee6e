"""What a base model has to be before anything is trained on it: its own weights, all of them, finite, and safe to read.

transformers is lenient here: it fills missing weights with random numbers, reads pickles, and lets a tokenizer speak
of tokens that the embedding does not have. Each would train something else than was asked for, or fail in the midst.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastalign.errors import ModelError
from fastalign.model.sharding import has_shards, on_this_rank

PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt", "model.ckpt.*")
SAFE = ("*.safetensors", "*.safetensors.index.json")


def refuse_pickled(name: str, folder: Path) -> None:
    """ModelError where a folder holds weights as a pickle only: reading one can run any code."""
    refuse_pickled_names(name, [path.name for path in folder.iterdir()])


def refuse_pickled_names(name: str, files: Sequence[str]) -> None:
    """As `refuse_pickled`, by the names of all files."""
    if any(fnmatch.filter(files, pattern) for pattern in SAFE):
        return
    pickled = next((file for pattern in PICKLES for file in sorted(fnmatch.filter(files, pattern))), None)
    if pickled is not None:
        raise pickled_only(name, pickled)


def pickled_only(name: str, file: str) -> ModelError:
    """The refusal of a model whose weights are in a pickle, such as `file`."""
    return ModelError(
        f"model.name_or_path: {name!r} holds its weights as a pickle only ({file}), and a pickle can run code "
        "when it is read; if you trust it, convert it once: from transformers import AutoModelForCausalLM as M; "
        "M.from_pretrained('FOLDER', use_safetensors=False).save_pretrained('NEW_FOLDER')"
    )


def refuse_incomplete(name: str, report: Mapping[str, Any]) -> None:
    """ModelError where weights of the model were not in its files, by the report of `from_pretrained`."""
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise ModelError(
            f"model.name_or_path: {name!r} lacks {len(missing)} weights of its model, such as {missing[0]!r}, which "
            "would be filled with random numbers; is a file of it missing, or its config.json another model's?"
        )
    wrong = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys") or ())
    if wrong:
        raise ModelError(
            f"model.name_or_path: {len(wrong)} weights of {name!r}, such as {wrong[0]!r}, have another shape than its "
            "config.json says"
        )


def refuse_non_finite(name: str, model: torch.nn.Module) -> None:
    """ModelError where a weight is NaN or infinite. One pass on the device where the weights are, without a copy.

    Of a weight in 4 or 8 bits the scales are looked at: a block with a NaN has a scale that is none. Of weights in
    shards each rank looks at its own, and what one finds all raise.
    """
    found = _not_finite(model)
    if has_shards(model):
        everywhere: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everywhere, found)
        found = next(filter(None, everywhere), None)
    if found is not None:
        raise ModelError(
            f"model.name_or_path: {name!r} has weights that are {found[1]}, in {found[0]!r}; the file is damaged, or "
            "was saved after a run that diverged"
        )


def _not_finite(model: torch.nn.Module) -> tuple[str, str] | None:
    """The name of the first parameter that is not finite, and what it is."""
    for name, parameter in model.named_parameters():
        for part in _numbers(parameter):
            low, high = torch.aminmax(part)
            if not (torch.isfinite(low) and torch.isfinite(high)):
                return name, "NaN" if torch.isnan(low) else "infinite"
    return None


def _numbers(parameter: torch.Tensor) -> list[torch.Tensor]:
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        nested = getattr(state, "state2", None)
        parts = [state.absmax, getattr(state, "offset", None), None if nested is None else nested.absmax]
    else:
        parts = [getattr(parameter, "SCB", None), on_this_rank(parameter)]
    readable = (torch.float32, torch.float16, torch.bfloat16, torch.float64)  # 8-bit floats cannot be compared
    return [part for part in parts if part is not None and part.dtype in readable and part.numel() and not part.is_meta]


def refuse_unknown_tokens(name: str, tokenizer: Any, rows: int) -> None:
    """ModelError where a token that texts are made of is beyond the `rows` of the model's embedding.

    Tokens that were added to the vocabulary may be: several models have some, for images and the like, that no text
    gives. BOS and EOS may not.
    """
    added = set(tokenizer.added_tokens_decoder) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    tokens = [item for item in tokenizer.get_vocab().items() if item[1] not in added]
    token, number = max(tokens, key=lambda item: item[1], default=("", -1))
    if number >= rows:
        raise ModelError(
            f"model.name_or_path: the tokenizer of {name!r} has the token {token!r} with number {number}, but the "
            f"model's embedding only has {rows} rows (0 to {rows - 1}); they are not of the same model"
        )
