"""Loading a base model and its tokenizer, and wrapping the model in a LoRA adapter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from fastalign.config import AdapterConfig, ModelConfig
from fastalign.errors import ConfigError, FastalignError, ModelError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


CPU = torch.device("cpu")


def has_bf16(device: torch.device) -> bool:
    """Whether the device is a GPU that computes in bfloat16 itself; emulation, as on a T4, is slow."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The number format of the base: as configured, or bfloat16 where the device has it, else float32."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    return torch.bfloat16 if has_bf16(device) else torch.float32


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, padding on the right; one without a padding token pads with its EOS.

    Raises:
        ConfigError: no model is named. ModelError: it cannot be reached, or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    with _reaching(config, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(config.name_or_path, **_origin(config))
    if tokenizer.pad_token_id is None:
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

    with _reaching(config, "model"):
        hf_config = AutoConfig.from_pretrained(config.name_or_path, **_origin(config))
    _refuse_other_than_decoder(config, hf_config)
    return hf_config


def load_model(config: ModelConfig, device: torch.device = CPU) -> PreTrainedModel:
    """The base model, frozen, in the configured number format.

    Args:
        config: which model, and in which format.
        device: where it will be used; a 4-bit base is put there at once, others stay on the CPU.

    Raises:
        ConfigError: no model is named, or it is not a decoder. ModelError: it cannot be reached or read.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    load_model_config(config)
    if not sys.stderr.isatty():
        disable_progress_bar()
    with _reaching(config, "model"):
        options: dict[str, Any] = {"dtype": compute_dtype(config, device), **_origin(config)}
        if config.attn_implementation != "auto":
            options["attn_implementation"] = config.attn_implementation
        if config.quantization == "nf4":
            options["quantization_config"] = _nf4(compute_dtype(config, device))
            if device.type == "cuda":
                options["device_map"] = {"": device}
        model = AutoModelForCausalLM.from_pretrained(config.name_or_path, **options)
    for module in model.modules():
        # On a CPU with AVX512-BF16, bitsandbytes repacks a layer's weight at its first use in evaluation mode, and
        # the product with a repacked weight has no gradient: training after an evaluation would lack it, silently.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    return model.requires_grad_(False)


def add_adapter(model: PreTrainedModel, config: AdapterConfig) -> PeftModel:
    """Wrap the model in a fresh LoRA adapter with fp32 weights. Raises ConfigError where no module matches."""
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.r,
        lora_alpha=int(config.alpha) if config.alpha == int(config.alpha) else config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        names = sorted({name.rsplit(".", 1)[-1] for name, part in model.named_modules() if hasattr(part, "weight")})
        raise ConfigError(
            f"adapter.target_modules: {config.target_modules!r} does not fit this model ({error}); its modules: "
            f"{', '.join(names)}"
        ) from None


def _origin(config: ModelConfig) -> dict[str, Any]:
    return {"revision": config.revision, "trust_remote_code": config.trust_remote_code}


def _nf4(dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


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
        self.name, self.what = config.name_or_path, what
        if not self.name:
            raise ConfigError("model.name_or_path is missing; give a folder or a hub id")

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        expected = (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError)
        if not isinstance(error, expected) or isinstance(error, (torch.OutOfMemoryError, FastalignError)):
            return
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
        if Path(self.name).is_dir():
            raise ModelError(
                f"model.name_or_path: the folder {self.name!r} holds no usable {self.what}: {reason}"
            ) from error
        if self.name.startswith((".", "/", "~")) or self.name.count("/") > 1:
            raise ModelError(f"model.name_or_path: the folder {self.name!r} does not exist") from error
        raise ModelError(
            f"model.name_or_path: {self.name!r} is neither a folder here nor a model that the hub gave; "
            f"check the name, the connection, and access rights if the model is gated ({reason})"
        ) from error
