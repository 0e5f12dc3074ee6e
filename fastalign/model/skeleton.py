"""A model without its weights: what `load_model` and `add_adapter` would hold, on PyTorch's meta device.

There tensors have a shape and no content, so that a model of any size takes no memory. What its weights take is
counted from their shapes, to the byte: packed and with their scales where they are in 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastalign.errors import ConfigError
from fastalign.model.shortening import without_weights

BLOCK, NESTED_BLOCK = 64, 256  # of bitsandbytes: weights that share a scale, and scales that share one
CODE = {"nf4": 16, "fp4": 16}  # values that 4 bits can have
FUSED = ("flash", "flex", "/")  # attention kernels that take no mask; "/": one with the name of a repository


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A model in its adapter, as it would be loaded.

    Attributes:
        model: the PEFT model, on the meta device.
        text_config: of its decoder. itemsize: bytes of an activation's number.
        base: bytes of the frozen weights but embedding and head. embedding, head: of those; a tied head has none.
        adapter: bytes of the trainable numbers. trainable: how many there are.
        block: weights by which a block multiplies each token, on average. head_weights: those of the output layer.
        masked: whether the attention kernel is given a mask.
    """

    model: Any
    text_config: Any
    itemsize: int
    base: int
    embedding: int
    head: int
    adapter: int
    trainable: int
    block: float
    head_weights: int
    masked: bool

    @property
    def weights(self) -> int:
        """Bytes of all frozen weights."""
        return self.base + self.embedding + self.head


def skeleton(
    hf_config: Any,
    dtype: torch.dtype,
    adapt: Callable[[Any], Any],
    *,
    blocks: int | None = None,
    quantization: Any = None,
    attention: str = "auto",
    trust_remote_code: bool = False,
) -> Skeleton:
    """Builds the model from its config alone.

    Args:
        hf_config: of the model, from transformers; it is left as it is.
        dtype: the number format of what is not packed.
        adapt: puts the model into its adapter.
        blocks: that are loaded, without final norm and head; None: the whole model.
        quantization: transformers' `BitsAndBytesConfig` of a packed base, or a checkpoint's settings.
        attention: as ``model.attn_implementation``.

    Raises:
        ConfigError: the adapter fits no module, or the attention is not known.
    """
    fused = any(sign in attention for sign in FUSED)
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": "sdpa" if fused else attention}
    if blocks is None:  # what is loaded shortened brings no code
        options["trust_remote_code"] = trust_remote_code
    try:
        model: Any = without_weights(hf_config, blocks, dtype=dtype, **options)
    except (ValueError, ImportError) as error:
        if attention == "auto":
            raise
        raise ConfigError(f"model.attn_implementation: {attention!r} does not fit this model ({error})") from None
    text_config = model.config.get_text_config()
    with torch.device("meta"):
        if quantization is not None:
            _quantize(model, quantization)
        model.requires_grad_(False)
        embedding, head = model.get_input_embeddings().weight, getattr(model.get_output_embeddings(), "weight", None)
        tables = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)} | {id(head)}
        held = {"base": 0, "embedding": 0, "head": 0}
        multiplied = 0.0
        for name, weight in model.named_parameters():
            place = "embedding" if weight is embedding else "head" if weight is head else "base"
            held[place] += weight_bytes(weight)
            if weight.dim() >= 2 and id(weight) not in tables:
                multiplied += weight.numel() * (_active_share(text_config) if ".experts." in name else 1)
        adapted = adapt(model)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    return Skeleton(
        model=adapted,
        text_config=text_config,
        itemsize=dtype.itemsize,
        **held,
        adapter=sum(map(weight_bytes, trained)),
        trainable=sum(weight.numel() for weight in trained),
        block=multiplied / text_config.num_hidden_layers,
        head_weights=0 if head is None else head.numel(),
        masked=not fused,
    )


def weight_bytes(weight: Any) -> int:
    """What a weight will take, with its scales where it is to be packed into 4 bits."""
    if not hasattr(weight, "quant_type"):
        return weight.numel() * weight.element_size()
    scales = -(-weight.numel() // BLOCK)
    packed = -(-weight.numel() // 2) + 4 * CODE[weight.quant_type]
    if not weight.compress_statistics:
        return packed + 4 * scales
    # Scales of one byte, theirs in fp32, the 256 values that a byte stands for, and the mean that was taken off.
    return packed + scales + 4 * -(-scales // NESTED_BLOCK) + 4 * 256 + 4


def _quantize(model: Any, quantization: Any) -> None:
    """Puts bitsandbytes' layers where transformers puts them when it loads; their weights stay unpacked."""
    from transformers.quantizers.auto import AutoHfQuantizer

    AutoHfQuantizer.from_config(quantization, pre_quantized=False).preprocess_model(model=model, device_map=None)
    model.is_loaded_in_4bit = True  # as transformers does at the end: PEFT looks at it


def _active_share(text_config: Any) -> float:
    """Of its experts that a token runs through."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = next((count for name in names if (count := getattr(text_config, name, None))), None)
    used = getattr(text_config, "num_experts_per_tok", None)
    return used / experts if experts and used else 1.0
