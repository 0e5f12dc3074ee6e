"""A model that is loaded only up to a block, for runs that never go further: blocks 1..l, no final norm and no head.

What is read from a checkpoint is what the model has, so the model is built shorter: with a configuration of l blocks,
and with `Absent` in the place of the norm and of a head that has weights of its own. A tied head costs nothing and
stays. `hidden_at` works as on the whole model, and gives the same bits; anything that needs more says what it lacks.

A family may read its depth, or a list with an entry per block, anywhere. So only families for which the tests compare
all states with those of the whole model are shortened, and of those only a model whose blocks, built short, are those
that it has when it is built whole. All others are loaded whole: never wrong.
"""

from __future__ import annotations

import copy
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastalign.errors import FastalignError, ModelError
from fastalign.model.early_exit import FINAL_NORMS, Parts, locate

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel

# tests/test_shortening.py proves each of them.
FAMILIES = {
    "apertus", "arcee", "biogpt", "bloom", "codegen", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5",
    "ernie4_5_moe", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "glm4_moe", "gpt2",
    "gpt_bigcode", "gpt_neox", "gpt_oss", "gptj", "granite", "granitemoe", "helium", "hunyuan_v1_dense", "llama",
    "ministral", "mistral", "mixtral", "mpt", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi3",
    "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
}  # fmt: skip
# Lists of a configuration that have an entry per block.
PER_BLOCK = ("layer_types", "mlp_layer_types", "no_rope_layers")


class Absent(nn.Module):
    """Stands where a final norm or a head was not loaded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise ModelError("only the first blocks of this model were loaded: it has no final norm and no head")


def is_short(model: nn.Module) -> bool:
    """Whether only the first blocks were loaded, in whatever wraps the model."""
    return any(isinstance(module, Absent) for module in model.modules())


def why_whole(hf_config: PretrainedConfig, blocks: int) -> str | None:
    """Why a model cannot be loaded up to a block only; None where it can. Builds it twice, without weights.

    Args:
        hf_config: of the whole model. blocks: how many of its blocks are needed.
    """
    if hf_config.model_type not in FAMILIES or getattr(hf_config, "auto_map", None):
        return f"models of type {hf_config.model_type} have not been tried with fewer blocks"
    try:
        whole, short = without_weights(hf_config), without_weights(hf_config, blocks)
        parts = locate(short)
    except (FastalignError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"it cannot be built with {blocks} blocks ({type(error).__name__}: {error})"
    there, sizes = dict(whole.named_modules()), {(blocks, len(locate(whole).blocks))}
    for name, module in short.named_modules():
        if isinstance(module, Absent):
            continue
        mine, theirs = _traits(module), _traits(there[name])
        differing = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
        if any((mine.get(key), theirs.get(key)) not in sizes for key in differing):
            return f"{differing[0]!r} of its {name or 'whole'!r} is another one where it has {blocks} blocks"
    return None if len(parts.blocks) == blocks else f"it has {len(parts.blocks)} blocks where {blocks} were asked for"


def _traits(module: nn.Module) -> dict[str, Any]:
    """What a module is made of: its class, its own weights, and its plain attributes."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {**plain, "class": type(module), **{f".{name}": (t.shape, t.dtype) for name, t in tensors.items()}}


def without_weights(hf_config: PretrainedConfig, blocks: int | None = None, **options: Any) -> PreTrainedModel:
    """The model on PyTorch's meta device, where tensors have a shape and no content: whole, or up to a block.

    Args:
        options: of transformers' `from_config`, such as dtype.
    """
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import set_zero3_state

    with torch.device("meta"), set_zero3_state():  # else ZeRO-3 would part what has no content
        if blocks is None:
            return AutoModelForCausalLM.from_config(copy.deepcopy(hf_config), **options)
        return short_class(hf_config, blocks)._from_config(shortened(hf_config, blocks), **options)


def shortened(hf_config: PretrainedConfig, blocks: int) -> PretrainedConfig:
    """The configuration of the same model with its first blocks only."""
    short = copy.deepcopy(hf_config)
    text_config = short.get_text_config()
    for name in PER_BLOCK:
        values = getattr(text_config, name, None)
        if isinstance(values, (list, tuple)):
            setattr(text_config, name, values[:blocks])
    text_config.num_hidden_layers = blocks
    return short


def short_class(hf_config: PretrainedConfig, blocks: int) -> Any:
    """The model's class, whose instances lack what is above the blocks, and do not miss it in a checkpoint."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    whole_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(hf_config)]
    depth = hf_config.get_text_config().num_hidden_layers

    class Short(whole_class):
        def __init__(self, config: Any, *args: Any, **kwargs: Any):
            super().__init__(config, *args, **kwargs)
            above = _drop(self, locate(self))
            above += [rf"{locate(self).list_name}\.{index}" for index in range(blocks, depth)]
            self._keys_to_ignore_on_load_unexpected |= {rf"(^|\.){name}\." for name in above}
            self.__class__ = whole_class  # from here on it is one of them

    Short.__name__, Short.__qualname__, Short.__module__ = (
        whole_class.__name__, whole_class.__qualname__, whole_class.__module__)  # fmt: skip
    return Short


def _drop(model: Any, parts: Parts) -> list[str]:
    """Puts `Absent` in the place of the final norm and of an untied head; gives their names."""
    owners = [(parts.owner, name) for name in FINAL_NORMS if parts.owner._modules.get(name) is not None]
    names = head_name(model)
    if names and f"{names[0]}.weight" not in model.all_tied_weights_keys:
        owner, _, name = names[0].rpartition(".")
        owners.append((model.get_submodule(owner), name))
    for owner, name in owners:
        owner._modules[name] = Absent()
    return [re.escape(name) for _, name in owners]


def head_name(model: Any) -> list[str]:
    """The name of the module that gives the logits, in a list; an empty one where there is none."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if head is not None and module is head]


def name_targets(model: PeftModel) -> None:
    """Makes the adapter of a short model fit the whole one: it names each part that it is for, not their kinds.

    Not `layers_to_transform`, which says nothing of parts outside of the blocks, nor of the experts' parameters, and
    which merging adapters would take from the first of them for all.
    """
    adapter: Any = model
    config, parameters = adapter.peft_config[adapter.active_adapter], adapter.base_model.targeted_parameter_names
    config.target_modules = sorted(adapter.base_model.targeted_module_names)
    if config.target_parameters:
        config.target_parameters = sorted(parameters)
    if not parameters:
        config.rank_pattern, config.alpha_pattern = {}, {}  # peft has some for experts, which no block here has
