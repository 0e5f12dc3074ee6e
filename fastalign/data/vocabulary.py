"""Tokens that a tokenizer has and the model's embedding does not: added ones, such as an image's placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastalign.data.text import quoted
from fastalign.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def unknown_tokens(tokenizer: PreTrainedTokenizerBase, rows: int | None) -> list[str]:
    """Tokens that a text can spell and the model's embedding does not have."""
    return [str(t.content) for i, t in tokenizer.added_tokens_decoder.items() if rows is not None and i >= rows]


def refuse_unknown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], rows: int | None, where: str) -> None:
    """DataError where a token is beyond the `rows` of the model's embedding; `where` may be empty."""
    if rows is not None and (highest := max(ids, default=0)) >= rows:
        token = quoted(tokenizer.convert_ids_to_tokens(highest))
        raise DataError(
            (f"{where}: " if where else "") + f"the text, or its chat template, has the token {token}, number "
            f"{highest}, but the model's embedding only has {rows} rows (0 to {rows - 1}); take the token out"
        )
