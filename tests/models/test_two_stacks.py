"""An encoder-decoder as one line of blocks: the same logits, and the same gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig

from hf_evopress.models.classes import call, n_source, shifted, start_of
from hf_evopress.models.stream import BlockStream, check_streamable
from hf_evopress.models.two_stacks import TwoStackStream, stream_of
from hf_evopress.models.units import all_blocks, find_units

SETTINGS: dict[str, Any] = {
    "t5": {"d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2},
    "bart": {
        "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
    },
    "pegasus": {
        "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
    },
    "marian": {
        "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32,
        "decoder_start_token_id": 1, "decoder_vocab_size": 128,
    },
    "switch_transformers": {
        "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
        "num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
    },
}  # fmt: skip
IDS = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))


def make(kind: str) -> Any:
    torch.manual_seed(0)
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    settings = {"d_model": 32, "vocab_size": 128, **ends, **SETTINGS[kind]}
    config = AutoConfig.for_model(kind, **settings)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("kind", SETTINGS)
def test_block_by_block_gives_the_logits_and_gradients_of_the_whole(kind: str) -> None:
    model = make(kind)
    stream = stream_of(model)
    assert isinstance(stream, TwoStackStream)
    stream.check(IDS)  # to the bit
    names = [unit.name for unit in find_units(model)]
    model.requires_grad_(True)
    whole = call(model, IDS)
    expected = torch.autograd.grad(
        whole.square().sum(), [model.get_submodule(n).weight for n in names]
    )
    hidden = stream.embed(IDS)
    for i in range(stream.n_blocks):
        hidden = stream.run_block(i, hidden)
    found = stream.head(IDS, hidden)
    assert torch.allclose(found, whole, atol=1e-6)  # with a graph attention takes another kernel
    assert whole.shape[:2] == (3, 11 - n_source(model, 11))
    gradients = torch.autograd.grad(
        found.square().sum(), [model.get_submodule(n).weight for n in names]
    )
    for name, one, two in zip(names, gradients, expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-6), name


def test_a_stream_can_be_entered_at_any_block() -> None:
    model = make("bart")
    stream = stream_of(model)
    with torch.no_grad():
        hidden, whole = stream.embed(IDS), call(model, IDS)
        for i in range(stream.n_blocks):
            assert torch.equal(stream.run_from(i, IDS, hidden), whole)
            hidden = stream.run_block(i, hidden)
    with pytest.raises(ValueError, match="blocks 0 to 2, got 4"):
        stream.run_from(4, IDS, hidden)


def test_the_target_is_predicted_as_with_labels() -> None:
    model = make("t5")
    n = n_source(model, IDS.shape[1])
    with torch.no_grad():
        by_labels = model(input_ids=IDS[:, :n], labels=IDS[:, n:].contiguous()).logits
        assert torch.equal(call(model, IDS), by_labels)
    assert shifted(IDS[:, n:], 0)[0].tolist() == [0, *IDS[0, n:-1].tolist()]
    model.config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="T5 has no decoder_start_token_id.*config.json"):
        start_of(model.config, "T5")


def test_blocks_are_numbered_through_both_stacks() -> None:
    model = make("t5")
    assert [path for path, _ in all_blocks(model)] == [
        *(f"encoder.block.{i}" for i in range(2)),
        *(f"decoder.block.{i}" for i in range(3)),
    ]
    blocks = {unit.name: unit.block for unit in find_units(model)}
    assert blocks["encoder.block.1.layer.0.SelfAttention.q"] == 1
    assert blocks["decoder.block.2.layer.1.EncDecAttention.k"] == 4
    with pytest.raises(ValueError, match="encoder-decoder, of two stacks"):
        BlockStream(model)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("fsmt", {"src_vocab_size": 128, "tgt_vocab_size": 128}, "FSMTFor.* masks that depend on"),
        ("led", {"attention_window": 8}, "LEDFor.* whole attention windows only, so it cannot be"),
        ("pegasus_x", {"block_size": 8}, "PegasusXFor.* states of global tokens as well, so it"),
        (
            "prophetnet",
            {"num_encoder_layers": 1, "num_decoder_layers": 1, "hidden_size": 32},
            "ProphetNetFor.* several predictions of each token in one stack, so it cannot be",
        ),
    ],
)
def test_stacks_whose_blocks_need_more_are_refused_by_name(
    kind: str, settings: dict[str, Any], message: str
) -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32}
    config = AutoConfig.for_model(
        kind, vocab_size=128, **({} if kind == "prophetnet" else sizes), **settings
    )
    with torch.device("meta"):
        model = transformers.AutoModelForSeq2SeqLM.from_config(config)
    with pytest.raises(ValueError, match=message):
        check_streamable(model)
