"""Loading: number formats, 4-bit bases, tokenizers without padding, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from fastalign.config import AdapterConfig, ModelConfig
from fastalign.errors import ConfigError, ModelError
from fastalign.model import loading
from fastalign.model.loading import add_adapter, load_model, load_tokenizer


def test_nf4_has_the_gradient_of_the_dequantised_weights_also_after_an_evaluation(model_dir: Path) -> None:
    """bitsandbytes repacks weights for inference on some CPUs; a backward through those gives no gradient."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    model = load_model(ModelConfig(name_or_path=str(model_dir), quantization="nf4", dtype="float32"))
    layer = next(module for module in model.modules() if isinstance(module, Linear4bit))
    packed: Any = layer.weight
    weight = dequantize_4bit(packed.data, packed.quant_state)
    ids = torch.tensor([[0, 5, 6, 7]])
    with torch.no_grad():
        model.eval()(input_ids=ids)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer.train()(x).square().sum().backward()
    expected = 2 * (x.detach() @ weight.T) @ weight
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected, rtol=1e-3, atol=1e-4)


def test_the_base_is_frozen_and_the_adapter_is_fp32(model_dir: Path) -> None:
    model = add_adapter(load_model(ModelConfig(name_or_path=str(model_dir), dtype="bfloat16")), AdapterConfig(r=2))
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16)


def test_a_tokenizer_without_padding_pads_with_its_eos(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(model_dir / "config.json", tmp_path)
    assert load_tokenizer(ModelConfig(name_or_path=str(tmp_path))).pad_token == "</s>"


def test_added_tokens_may_be_beyond_the_embedding_and_padding_is_then_eos(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<padding>", "additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(tmp_path)
    raw = json.loads((model_dir / "config.json").read_text())
    for size, padding in ((rows, "</s>"), (rows + 2, "<padding>")):
        (tmp_path / "config.json").write_text(json.dumps({**raw, "vocab_size": size}))
        assert load_tokenizer(ModelConfig(name_or_path=str(tmp_path))).pad_token == padding


def test_a_config_without_a_vocab_size_is_not_checked(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Config:
        def get_text_config(self) -> Config:
            return self

    monkeypatch.setattr(loading, "load_model_config", lambda config: Config())
    assert load_tokenizer(ModelConfig(name_or_path=str(model_dir))).pad_token_id is not None


@pytest.mark.parametrize(
    ("options", "asks"),
    [({}, False), ({"trust_remote_code": True}, True), ({"attn_implementation": "kernels-community/x"}, True)],
)
def test_a_folder_may_ask_the_hub_only_for_code_that_was_asked_for(
    options: dict, asks: bool, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with loading._access(ModelConfig(name_or_path=str(model_dir), **options), "model"):
        assert constants.HF_HUB_OFFLINE is not asks


def test_a_hub_model_that_is_a_pickle_is_told_how_to_convert() -> None:
    config = ModelConfig(name_or_path="some/model")
    said = r"'some/model' holds its weights as a pickle only.*convert it once"
    with pytest.raises(ModelError, match=said), loading._reaching(config, "model"):
        raise OSError(
            "some/model does not appear to have a file named model.safetensors or model.safetensors.index.json "
            "and thus cannot be loaded with `safetensors`. Please do not set `use_safetensors=True`."
        )


def test_a_hub_model_whose_files_are_a_pickle_is_refused_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **options: str(tmp_path))
    files = ["config.json", "pytorch_model-00001-of-00002.bin"]
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda *args, **options: files)
    config = ModelConfig(name_or_path="some/model")
    with (
        pytest.raises(ModelError, match=r"pickle only \(pytorch_model-00001"),
        loading._reaching(config, "model"),
        loading._access(config, "model"),
    ):
        pass


def test_encoders_are_refused(tmp_path: Path) -> None:
    bert = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=1, vocab_size=9)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="not a decoder"):
        load_model(ModelConfig(name_or_path=str(tmp_path / "bert")))
    with pytest.raises(ConfigError, match="encoder-decoder"):
        load_model(ModelConfig(name_or_path=str(tmp_path / "t5")))


def test_target_modules_that_match_nothing_name_those_there_are(model_dir: Path) -> None:
    model = load_model(ModelConfig(name_or_path=str(model_dir)))
    with pytest.raises(ConfigError, match=r"q_projj.*q_proj, "):
        add_adapter(model, AdapterConfig(target_modules=["q_projj"]))


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-organisation/no-such-model", ""])
def test_models_that_cannot_be_reached(name: str) -> None:
    with pytest.raises((ModelError, ConfigError), match=r"model\.name_or_path"):
        load_model(ModelConfig(name_or_path=name))


def test_a_folder_without_weights(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((model_dir / "config.json").read_text())
    with pytest.raises(ModelError, match="holds no usable model"):
        load_model(ModelConfig(name_or_path=str(tmp_path)))
