"""The encoder or the decoder of a packed encoder-decoder, loaded by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoConfig

from hf_evopress.loading.layers import compressed_layers, prepare_layers, resolve_units
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

LEVEL = "rtn:bits=4,group_size=32"
IDS = torch.arange(3, 19).view(2, 8)
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
STACKS: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
}  # fmt: skip
# the whole -> its type, its settings
WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "T5ForConditionalGeneration": (
        "t5",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    ),
    "BartForConditionalGeneration": ("bart", {**STACKS, "max_position_embeddings": 32}),
    "WhisperForConditionalGeneration": (
        "whisper",
        {**STACKS, "max_target_positions": 32, "max_source_positions": 16, "num_mel_bins": 8},
    ),
}
PARTS = {
    "T5EncoderModel": "T5ForConditionalGeneration",
    "BartForCausalLM": "BartForConditionalGeneration",
    "WhisperForCausalLM": "WhisperForConditionalGeneration",
}


def save(architecture: str, folder: Path) -> Plan:
    """Write small/, a packed model, and dense/, the stock one of the same weights."""
    kind, settings = WHOLE[architecture]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=128, **ENDS, **settings)
    model = getattr(transformers, architecture)(config).eval()
    units = find_units(model)
    plan = Plan({u.name: LEVEL for u in units}, {u.name: u.shape for u in units})
    compress_model(model, plan, None)
    attach(model, plan)
    model.save_pretrained(folder / "small")
    model.dequantize()
    model.save_pretrained(folder / "dense")
    return plan


def states(model: Any) -> Tensor:
    """Return what the blocks put out; a part may lack the embedding that the whole shares."""
    torch.manual_seed(1)
    base = model.get_encoder() if hasattr(model, "encoder") else model.get_decoder()
    with torch.no_grad():
        # a cache is made for as many blocks as the encoder has
        options = {} if hasattr(model, "encoder") else {"use_cache": False}
        return base(inputs_embeds=torch.randn(2, 8, 32), **options)[0]


@pytest.mark.parametrize("architecture", PARTS)
def test_a_stack_by_itself_computes_what_it_does_in_the_dense_model(
    architecture: str, tmp_path: Path
) -> None:
    plan = save(PARTS[architecture], tmp_path)
    kind = getattr(transformers, architecture)
    packed, dense = (kind.from_pretrained(tmp_path / name).eval() for name in ("small", "dense"))
    prepare_layers(packed, "packed")
    assert 0 < len(compressed_layers(packed)) < len(plan)
    assert torch.equal(states(packed), states(dense))
    if architecture == "T5EncoderModel":
        with torch.no_grad():
            assert torch.equal(packed(IDS)[0], dense(IDS)[0])
    if architecture == "WhisperForCausalLM":  # its embedding is not shared with the encoder
        with torch.no_grad():
            assert torch.equal(*(m(IDS, use_cache=False).logits for m in (packed, dense)))
    packed.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again").eval()
    assert compressed_layers(again).keys() == compressed_layers(packed).keys()


def test_the_head_of_a_plan_has_no_place_in_an_encoder(tmp_path: Path) -> None:
    plan = save("T5ForConditionalGeneration", tmp_path)
    headed = plan.replace(
        levels={**plan.levels, "lm_head": LEVEL}, shapes={**plan.shapes, "lm_head": (128, 32)}
    )
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "dense")
    found = resolve_units(encoder, headed)
    assert found and all(unit.startswith("encoder.") for unit in found)


def test_a_layer_that_a_stack_lacks_is_still_an_error(tmp_path: Path) -> None:
    plan = save("T5ForConditionalGeneration", tmp_path)
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "dense")
    unit = next(unit for unit in plan if unit.startswith("encoder."))
    wrong = plan.rename({f"^{unit}$": f"{unit}x"})
    with pytest.raises(ValueError, match=f"1 of {len(plan)} units:\\s+{unit}x: not in the model"):
        resolve_units(encoder, wrong)
    whole = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=f"{unit}x: not in the model"):
        resolve_units(whole, wrong)
