"""Encoder-decoders copy their config in each forward: its plan costs them nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from hf_evopress.loading.layers import prepare_layers
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

IDS = torch.arange(3, 15).view(1, 12)
INPUTS = {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}


@pytest.fixture
def bart() -> Any:
    """A tiny compressed Bart."""
    torch.manual_seed(0)
    sizes = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")}
    widths = {f"{part}_ffn_dim": 128 for part in ("encoder", "decoder")}
    ends = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    settings: dict[str, Any] = {**sizes, **heads, **widths, **ends, "forced_eos_token_id": None}
    config = BartConfig(vocab_size=256, d_model=64, max_position_embeddings=64, **settings)
    model: Any = BartForConditionalGeneration(config).eval()
    units = find_units(model)
    plan = Plan(
        {unit.name: "rtn:bits=4,group_size=32" for unit in units},
        shapes={unit.name: unit.shape for unit in units},
    )
    compress_model(model, plan, torch.arange(64).view(2, 32))
    attach(model, plan)
    prepare_layers(model, "auto")
    return model


@pytest.fixture
def nothing_is_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_forward_makes_no_plan(bart: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    stock = Plan.__post_init__

    def counting(self: Plan) -> None:
        made.append(self)
        stock(self)

    monkeypatch.setattr(Plan, "__post_init__", counting)
    with torch.no_grad():
        assert bart(**INPUTS).past_key_values is not None
        bart.generate(IDS, max_new_tokens=2)
    assert not made


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_forward_with_a_cache_is_one_graph(bart: Any) -> None:
    with torch.no_grad():
        whole = torch.compile(bart, fullgraph=True, backend="aot_eager")
        found, expected = whole(**INPUTS), bart(**INPUTS)
    assert torch.allclose(found.logits, expected.logits, atol=1e-4)
    assert found.past_key_values.get_seq_length() == 5
