"""LoRA over a packed embedding and a packed head: the numbers of stock PEFT over dense ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from hf_evopress.loading.embedding import CompressedEmbedding
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.replace import replace_linears
from hf_evopress.methods import compose
from hf_evopress.models.ends import find_ends
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

LEVEL = compose.normalize("rtn:bits=4,group_size=32")
IDS = torch.arange(40).view(2, 20)
ENDS = ["embed_tokens", "lm_head"]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest, tiny_model: Any) -> Any:
    """A tiny model of which all is packed, both ends as well."""
    made = tiny_model("llama", tie_word_embeddings=request.param)
    units = [*find_units(made), *find_ends(made)]
    plan = Plan({u.name: str(LEVEL) for u in units}, {u.name: u.shape for u in units})

    def states(unit: str, level: Any) -> dict[str, Tensor]:
        return compose.compress(LEVEL, made.get_submodule(unit).weight.detach().float(), None)

    replace_linears(made, plan, states)
    attach(made, plan)
    return made


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def adapted(model: Any, targets: list[str], *, seed: int = 3) -> Any:
    made = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in sorted(made.named_parameters()):
        if "lora_" in key:
            tensor.data = 0.05 * torch.randn(tensor.shape, generator=generator)
    return made.eval()


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ENDS, [*ENDS, "q_proj"]])
def test_an_adapter_over_the_ends_gives_what_stock_peft_gives(
    model: Any, targets: list[str]
) -> None:
    dense = copy.deepcopy(model).dequantize()
    plain = logits(model)
    over_packed, over_dense = adapted(model, targets), adapted(dense, targets)
    assert torch.allclose(logits(over_packed), logits(over_dense), atol=2e-5)
    assert not torch.allclose(logits(over_packed), plain, atol=1e-2)
    with over_packed.disable_adapter():
        assert torch.equal(logits(over_packed), plain)
    assert any(isinstance(module, CompressedEmbedding) for module in over_packed.modules())


def test_an_adapter_over_the_ends_learns_and_comes_back(model: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(model)
    made = get_peft_model(model, LoraConfig(r=4, target_modules=ENDS)).train()
    packed = {n: p.clone() for n, p in made.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = made(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = dict(made.named_parameters())
    assert all(torch.equal(after[name], tensor) for name, tensor in packed.items())
    made.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(again), logits(made))


def test_an_adapter_over_the_head_merges_and_one_over_the_embedding_says_what_to_do(
    model: Any,
) -> None:
    made = adapted(copy.deepcopy(model), ["lm_head"])
    before = logits(made)
    assert torch.allclose(logits(made.merge_and_unload()), before, atol=1e-4)
    made = adapted(model, ["embed_tokens"])
    before = logits(made)
    with pytest.raises(RuntimeError, match="dequantize"):
        made.merge_and_unload()
    assert torch.equal(logits(made), before)
