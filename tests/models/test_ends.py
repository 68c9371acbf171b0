"""Which embeddings and heads are units, and looking up rows that come from elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq

from hf_evopress.models.ends import embedding_forward, find_ends, looks_up_rows
from hf_evopress.models.units import Unit

IDS = torch.arange(12).view(2, 6)


def test_a_shared_weight_is_one_unit_by_the_name_of_the_embedding(tiny_model: Any) -> None:
    units = find_ends(tiny_model("llama", tie_word_embeddings=True))
    assert units == [Unit("model.embed_tokens", (256, 64), -1, "tied")]
    assert units[0].is_end


def test_two_weights_are_two_units_before_and_after_the_blocks(tiny_model: Any) -> None:
    assert find_ends(tiny_model("llama", tie_word_embeddings=False)) == [
        Unit("model.embed_tokens", (256, 64), -1, "embedding"),
        Unit("lm_head", (256, 64), 2, "head"),
    ]


def test_skipped_ends_are_no_units(tiny_model: Any) -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    assert [u.name for u in find_ends(model, skip=["*embed*"])] == ["lm_head"]
    assert find_ends(model, skip=["re:.*(embed|head).*"]) == []


@pytest.mark.parametrize(
    "architecture, name",
    [
        ("gpt2", "transformer.wte"),
        ("gemma3_text", "model.embed_tokens"),
        ("opt", "model.decoder.embed_tokens"),
    ],
)
def test_position_embeddings_are_no_units(architecture: str, name: str, tiny_model: Any) -> None:
    (unit,) = find_ends(tiny_model(architecture))
    assert (unit.name, unit.role) == (name, "tied")


def encoder_decoder(kind: str, **more: Any) -> Any:
    sizes = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    ids = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    config = AutoConfig.for_model(kind, **sizes, **heads, **ids, decoder_start_token_id=0, **more)
    auto = AutoModelForSpeechSeq2Seq if kind == "whisper" else AutoModelForSeq2SeqLM
    return auto.from_config(config)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("bart", {}),
        ("marian", {}),  # its getter gives the encoder's, which is tied to model.shared
        ("marian", {"share_encoder_decoder_embeddings": False, "decoder_vocab_size": 48}),
        ("fsmt", {"langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 48}),
    ],
)
def test_embeddings_of_encoder_decoders_are_no_units(kind: str, more: dict[str, Any]) -> None:
    assert find_ends(encoder_decoder(kind, **more)) == []


def test_the_embedding_of_whisper_is_one_with_its_head() -> None:
    model = encoder_decoder("whisper", num_mel_bins=8)
    assert find_ends(model) == [Unit("model.decoder.embed_tokens", (64, 32), -1, "tied")]


def test_an_embedding_that_has_the_weight_of_its_head_is_no_unit(tiny_model: Any) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.all_tied_weights_keys = {"model.embed_tokens.weight": "lm_head.weight"}
    assert find_ends(model) == []


def test_an_embedding_of_another_kind_is_no_unit(tiny_model: Any) -> None:
    class Hashed(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return nn.functional.embedding(input * 7 % 256, self.weight)

    class Clipped(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).clamp(-1, 1)

    assert not looks_up_rows(Hashed) and looks_up_rows(Clipped)
    model = tiny_model("llama", tie_word_embeddings=False)
    model.model.embed_tokens = Hashed(256, 64)
    assert [u.name for u in find_ends(model)] == ["lm_head"]


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_given_rows_take_the_way_of_the_embedding(architecture: str, tiny_model: Any) -> None:
    module = tiny_model(architecture).get_input_embeddings()
    forward = embedding_forward(module, lambda ids: 2 * module.weight[ids])
    assert torch.allclose(forward(IDS), 2 * module(IDS))
    assert torch.equal(module(IDS), type(module).forward(module, IDS)), "it is as it was"
