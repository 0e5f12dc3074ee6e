"""Loading a base model and its tokenizer, and wrapping the model in a LoRA adapter."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastalign.config import AdapterConfig, ModelConfig
from fastalign.config.hub import asking_hub, may_ask_hub, offline
from fastalign.errors import ConfigError, FastalignError, ModelError
from fastalign.model.quantization import (
    computing_in,
    effective_quantization,
    nf4,
    require_quantization,
    stored_quantization,
)
from fastalign.model.shortening import head_name, is_short, name_targets, short_class, shortened, without_weights
from fastalign.model.soundness import (
    pickled_only,
    refuse_incomplete,
    refuse_non_finite,
    refuse_pickled,
    refuse_pickled_names,
    refuse_unknown_tokens,
)

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


CPU = torch.device("cpu")
# What is fetched from a hub, by what it is for. No pickles, and none of the copies that some repositories hold.
FILES = {
    "config": ["config.json"],
    "tokenizer": ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"],
    "model": ["*.json", "*.safetensors"],
}
COPIES = ["*/*.safetensors", "consolidated*", "*.index.json.*"]


def has_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU that computes in bfloat16 itself; emulation, as on a T4, is slow."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The number format of the base: as configured, or bfloat16 where the device has it, else float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if has_bf16(device) else torch.float32


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right; one without a padding token that the model has pads with its EOS.

    Raises:
        ConfigError: no model is named, or it is not a decoder. ModelError: it cannot be reached, holds no tokenizer,
            or one of another model.
    """
    from transformers import AutoTokenizer

    rows = _embedding_rows(load_model_config(config))
    with _reaching(config, "tokenizer"), _access(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path, **_origin(config))
    if rows is not None:
        refuse_unknown_tokens(config.name_or_path, tokenizer, rows)
    if tokenizer.pad_token_id is None or (rows is not None and tokenizer.pad_token_id >= rows):
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"the tokenizer of {config.name_or_path!r} has no token that could serve as padding")
    tokenizer.padding_side = "right"
    return tokenizer


def load_model_config(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration, without its weights.

    Raises:
        ConfigError: no model is named, or it is not a decoder. ModelError: it cannot be reached or read.
    """
    from transformers import AutoConfig

    with _reaching(config, "config"), _access(config, "config"):
        hf_config = AutoConfig.from_pretrained(config.name_or_path, **_origin(config))
    _refuse_other_than_decoder(config, hf_config)
    return hf_config


def load_model(config: ModelConfig, device: torch.device = CPU, blocks: int | None = None) -> PreTrainedModel:
    """The base model, frozen, in the configured number format.

    Args:
        config: which model, and in which format.
        device: where it will be used; a quantised base is put there at once, others stay on the CPU.
        blocks: load the first blocks only, without final norm and head, of a model for which
            `fastalign.model.shortening.why_whole` has no objection.

    Raises:
        ConfigError: no model is named, it is not a decoder, or bitsandbytes is needed and does not work. ModelError: it
            cannot be reached or read, its weights are a pickle or quantised in a way that cannot be used, or some of
            them are missing or not finite.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.utils.logging import disable_progress_bar

    hf_config = load_model_config(config)
    require_quantization(config, hf_config, device)
    if not sys.stderr.isatty():
        disable_progress_bar()
    if os.path.isdir(config.name_or_path):
        refuse_pickled(config.name_or_path, Path(config.name_or_path))
    with _reaching(config, "model"), _access(config, "model"):
        dtype = compute_dtype(config, device)
        options: dict[str, Any] = {"dtype": dtype, **_origin(config)}
        if config.attn_implementation != "auto":
            options["attn_implementation"] = config.attn_implementation
        model_class: Any = AutoModelForCausalLM
        sharded = is_deepspeed_zero3_enabled()
        packed = packing(config, hf_config, dtype, blocks, sharded=sharded)
        if blocks is not None:
            model_class, hf_config = short_class(hf_config, blocks), shortened(hf_config, blocks)
        if packed is not None and not sharded:  # else transformers takes this rank's device by itself
            options["device_map"] = {"": device}
        if stored_quantization(hf_config) is not None:
            hf_config.quantization_config = packed
        elif packed is not None:
            options["quantization_config"] = packed
        loaded: Any = model_class.from_pretrained(
            config.name_or_path,
            config=hf_config,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
        model, report = loaded
    refuse_incomplete(config.name_or_path, report)
    refuse_non_finite(config.name_or_path, model)
    if stored_quantization(hf_config) is not None:
        _in_format(model, dtype)
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weight at its first use in evaluation mode, and
        # the product with a repacked weight has no gradient: training after an evaluation would lack it, silently.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model.requires_grad_(False)


def _in_format(model: Any, dtype: torch.dtype) -> None:
    """Of a packed checkpoint, transformers leaves what is not packed in the number format that it is stored in."""
    in_fp32 = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, parameter in model.named_parameters():
        packed = hasattr(parameter, "quant_state") or not parameter.is_floating_point()
        if not packed and not any(part in name for part in in_fp32):
            parameter.data = parameter.data.to(dtype)


def packing(
    config: ModelConfig,
    hf_config: PretrainedConfig,
    dtype: torch.dtype,
    blocks: int | None = None,
    *,
    sharded: bool = False,
) -> Any:
    """What transformers is told of a base in 4 or 8 bits; None of another.

    Args:
        config: which model, and in which format. hf_config: of the whole model, from transformers.
        dtype: that it computes in. blocks: that are loaded; None: all, and the head. sharded: as for `quant_storage`.
    """
    if effective_quantization(config, hf_config) == "none":
        return None
    skipped = None if blocks is None else head_name(without_weights(hf_config, blocks))
    if stored_quantization(hf_config) is not None:
        return computing_in(hf_config, dtype, skipped)
    return nf4(dtype, sharded=sharded, skipped=skipped)


def add_adapter(model: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """Wrap the model in a fresh LoRA adapter. That of a model that was loaded up to a block fits the whole one.

    Raises:
        ConfigError: no module matches.
    """
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.r,
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    names = sorted({name.rsplit(".", 1)[-1] for name, part in model.named_modules() if hasattr(part, "weight")})
    try:
        adapted: Any = get_peft_model(model, lora)
    except ValueError as error:
        if "Absent()" in str(error):
            raise ConfigError(
                f"adapter.target_modules: {config.target_modules!r} names the head or the final norm, which no step of "
                "align_only runs, so that they are not loaded; leave them out"
            ) from None
        raise ConfigError(
            f"adapter.target_modules: {config.target_modules!r} does not fit this model ({error}); its modules: "
            f"{', '.join(names)}"
        ) from None
    if is_short(adapted):
        name_targets(adapted)
    if config.dtype not in ("auto", "float32"):  # what peft makes of it
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, config.dtype))
    return adapted


@contextlib.contextmanager
def same_formats(model: torch.nn.Module) -> Iterator[None]:
    """Afterwards what is trainable has its number format again: peft makes an adapter fp32 whenever it loads one."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in before:
            parameter.data = parameter.data.to(before[name])


def _origin(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


@contextlib.contextmanager
def _access(config: ModelConfig, what: str) -> Iterator[None]:
    """Fetches a hub's files first, then is offline: what is loaded cannot ask for anything else.

    Code that comes with a model, and an attention kernel with the name of a repository, were asked for, and may fetch,
    also for a folder, whose code may be in a repository.
    """
    name = config.name_or_path
    if config.trust_remote_code or "/" in config.attn_implementation:
        with asking_hub():
            yield
    elif os.path.isdir(name) or not may_ask_hub():
        with offline():
            yield
    else:
        from huggingface_hub import list_repo_files, snapshot_download

        with asking_hub():
            fetched = snapshot_download(
                name, revision=config.revision, allow_patterns=FILES[what], ignore_patterns=COPIES
            )
            if what == "model" and not any(Path(fetched).glob("*.safetensors")):
                refuse_pickled_names(name, list_repo_files(name, revision=config.revision))
        with offline():
            yield


def _embedding_rows(hf_config: PretrainedConfig) -> int | None:
    """None where a model's own code has another name for it."""
    rows = getattr(hf_config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def _refuse_other_than_decoder(config: ModelConfig, hf_config: Any) -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = hf_config.model_type
    name = config.name_or_path
    if getattr(hf_config, "is_encoder_decoder", False):
        raise ConfigError(f"model.name_or_path: {name!r} ({kind}) is an encoder-decoder; a decoder is needed")
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(hf_config, "is_decoder", False)
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or bool(getattr(hf_config, "auto_map", None))
    if masked or not known:
        raise ConfigError(
            f"model.name_or_path: {name!r} ({kind}) is not a decoder (causal) language model, such as Llama or Qwen"
        )


class _reaching:
    """Turns what goes wrong while a model is reached or read into one line."""

    def __init__(self, config: ModelConfig, what: str):
        self.name, self.what, self.config = config.name_or_path, what, config
        if not self.name.strip():
            raise ConfigError("model.name_or_path is missing; give a folder or a hub id")
        if config.revision is not None and os.path.isdir(self.name):
            raise ConfigError(
                f"model.revision: {config.revision!r} was given, but {self.name!r} is a folder, and only models of a "
                "hub have revisions; leave it out"
            )

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # A damaged file makes the libraries raise anything at all.
        passes = (FastalignError, MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, Exception) or isinstance(error, passes) or "allocate memory" in str(error):
            return
        self._known(error, str(error))
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if os.path.isdir(self.name):
            raise ModelError(
                f"model.name_or_path: the folder {self.name!r} holds no usable {self.what}: {reason}"
            ) from error
        if self.name.startswith((".", "/", "~")) or self.name.count("/") > 1:
            raise ModelError(f"model.name_or_path: the folder {self.name!r} does not exist") from error
        raise ModelError(
            f"model.name_or_path: {self.name!r} is neither a folder here nor a model that the hub gave; "
            f"check the name, the connection, and access rights if the model is gated ({reason})"
        ) from error

    def _known(self, error: BaseException, text: str) -> None:
        """The mistakes that have a key of their own."""
        if "trust_remote_code" in text:
            raise ModelError(
                f"model.name_or_path: {self.name!r} comes with Python code of its own, which is not run unless you "
                "trust it: read it, then set model.trust_remote_code: true"
            ) from error
        attention = self.config.attn_implementation
        signs = [attention, "flash", *(["kernel"] if "/" in attention else [])]
        if attention != "auto" and any(sign.lower() in text.lower() for sign in signs):
            raise ModelError(
                f"model.attn_implementation: {attention!r} is not known or not installed here, or this model does not "
                "have it; auto, sdpa and eager need nothing"
            ) from error
        if self.what == "model" and "safetensors" in text and "does not appear to have a file named" in text:
            raise pickled_only(self.name, "no *.safetensors") from error
        if self.config.revision is not None and type(error).__name__ == "RevisionNotFoundError":
            raise ModelError(f"model.revision: {self.config.revision!r} is not there in {self.name!r}") from error
