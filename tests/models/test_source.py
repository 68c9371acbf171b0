"""What a name stands for is checked before any work: place, class, keys, values, context."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForSequenceClassification

from hf_evopress.models.classes import AUDIO_TEXT
from hf_evopress.models.source import (
    check_class,
    check_context,
    check_head,
    kind_of,
    load_checked,
    read_config,
    read_tokenizer,
    window_of,
)
from hf_evopress.models.stream import BlockStream
from hf_evopress.models.units import find_units

TinyModel = Callable[..., Any]

PART = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
HEARD = {"model_type": "voxtral_encoder", **PART, "num_attention_heads": 2, "num_mel_bins": 8}
TEXT = {**PART, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 64}
TEXT |= {"model_type": "llama", "head_dim": 16}


def with_head(config: Any, *, tied: bool) -> Any:
    config.tie_word_embeddings, config.num_labels = tied, 3
    return LlamaForSequenceClassification(config)


@pytest.mark.parametrize("tied", [True, False])
def test_a_classifier_is_refused_before_its_head_is_lost(
    tied: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    with_head(tiny_model().config, tied=tied).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LlamaForSequenceClassification.*LlamaForCausalLM"):
        load_checked(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_without_a_head_is_refused(
    tied: bool, tiny_model: TinyModel, tmp_path: Path
) -> None:
    config = tiny_model().config
    config.tie_word_embeddings = tied
    AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a LlamaModel, of which"):
        load_checked(tmp_path)


def test_missing_and_unexpected_weights_are_errors_that_name_them(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model()
    state = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={**state, "more.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=r"has no place for, more\.weight"):
        load_checked(tmp_path)
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight"):
        load_checked(tmp_path)


ENCODERS = (
    "bert",
    "roberta",
    "electra",
    "xlm-roberta",
    "camembert",
    "ernie",
    "data2vec-text",
    "megatron-bert",
    "rembert",
    "roformer",
    "big_bird",
    "bert-generation",
    "xmod",
    "roc_bert",
    "roberta-prelayernorm",
    "xlm-roberta-xl",
)


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_not_run_as_a_decoder(kind: str) -> None:
    with pytest.raises(ValueError, match="is_decoder=false, an encoder"):
        check_class(AutoConfig.for_model(kind), kind)
    check_class(AutoConfig.for_model(kind, is_decoder=True), kind)


@pytest.mark.parametrize("kind", ["gpt_neox", "opt", "gpt2", "falcon", "mixtral", "gemma3"])
def test_decoders_pass(kind: str) -> None:
    check_class(AutoConfig.for_model(kind), kind)


@pytest.mark.parametrize("kind", ["t5", "vit", "clip", "whisper"])
def test_what_is_no_causal_language_model_is_named(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    if type(config) in AutoModelForCausalLM._model_mapping:  # whisper's decoder is one
        config.architectures = ["WhisperForConditionalGeneration"]
    with pytest.raises(ValueError, match=r"supported.*decoder-only"):
        check_class(config, kind)


def test_a_head_that_is_not_known_is_refused_with_those_of_its_kind() -> None:
    config = AutoConfig.for_model("bert", architectures=["BertForMultipleChoice"])
    with pytest.raises(ValueError, match=r"kind: .*BertForSequenceClassification.*; besides"):
        check_class(config, "bert")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_a_number_is_named(
    dtype: torch.dtype, value: float, tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model().to(dtype)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"NaN or infinity in model\.layers\.1\.mlp\.up_proj"):
        load_checked(tmp_path)


def test_a_sum_that_overflows_is_no_infinity(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(3e38)
    model.save_pretrained(tmp_path)
    assert isinstance(load_checked(tmp_path), nn.Module)


def test_places_that_hold_no_model_get_a_sentence_of_their_own(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    said = {
        "./nothere": "there is no folder ./nothere",
        "not/here/at/all": "there is no folder not/here/at/all",
        "owner/nothere": "there is no folder owner/nothere .*the Hub gives no model",
        str(tmp_path / "adapter"): "is an adapter, not a model",
        str(tmp_path / "empty"): "holds no config.json",
        str(tmp_path / "broken"): "config of .*broken cannot be read",
        str(tmp_path / "model" / "config.json"): "is a file",
    }
    for name, sentence in said.items():
        with pytest.raises((ValueError, OSError), match=sentence):
            read_config(name)
    with pytest.raises(ValueError, match="a model and no tokenizer: copy tokenizer.json"):
        read_tokenizer(tmp_path / "model")


def test_sequences_and_windows_fit_the_context() -> None:
    config = AutoConfig.for_model("gpt2", n_positions=1024)
    check_context(config, 1024, "seq_len")
    with pytest.raises(ValueError, match="seq_len 1025 is longer than the model's context of 1024"):
        check_context(config, 1025, "seq_len")
    assert window_of(config, None) == 1024
    assert window_of(config, 512) == 512
    assert window_of(AutoConfig.for_model("mamba"), None) == 2048
    with pytest.raises(ValueError, match="window 2048 is longer"):
        window_of(config, 2048)


def test_a_head_that_is_stored_by_another_name_is_no_missing_one(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = tiny_model("gpt_neox")
    model.save_pretrained(tmp_path)
    check_head(tmp_path, model)  # stored as embed_out
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("embed_out")}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no lm_head\.weight: its GPTNeoX.* random head"):
        check_head(tmp_path, model)


def test_of_an_audio_language_model_the_text_part_is_compressed() -> None:
    config = AutoConfig.for_model("voxtral", audio_config=HEARD, text_config=TEXT)
    config.architectures = ["VoxtralForConditionalGeneration"]
    assert kind_of(config, "heard") is AUDIO_TEXT
    model = AUDIO_TEXT.loader.from_config(config).eval()
    assert {u.name.rpartition(".layers")[0] for u in find_units(model)} == {"model.language_model"}
    BlockStream(model).check(torch.arange(8)[None])  # to the bit
    config.architectures = ["VoxtralForCTC"]  # another head, which is of no class
    with pytest.raises(ValueError, match="is a VoxtralForCTC.* VoxtralForConditionalGeneration"):
        kind_of(config, "heard")
