"""What published baselines measure, against the plain formula on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.models.dropped import dropped_modules, replace_dropped
from hf_evopress.models.sub_blocks import find_sub_blocks
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import DROP
from hf_evopress.scoring.baseline_scores import (
    influences,
    outlier_ratios,
    owl_kept,
    pq_kept,
    pq_shares,
    window_distances,
)

TinyModel = Callable[..., Any]


def distance(a: Tensor, b: Tensor) -> float:
    return 1 - float(F.cosine_similarity(a, b, dim=-1).mean())


@torch.no_grad()
def streams(model: nn.Module, tokens: Tensor) -> list[Tensor]:
    """Return the residual stream of a Llama before and after every sub-block, by hooks."""
    seen: list[Tensor] = []
    handles = []
    for layer in model.model.layers:  # type: ignore[union-attr]
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            handles.append(norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    handles.append(model.model.norm.register_forward_pre_hook(lambda _, a: seen.append(a[0])))  # type: ignore[union-attr]
    model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def test_influence_is_the_cosine_of_the_stream_around_a_sub_block(
    trained_llama: nn.Module, text_tokens: Callable[..., Tensor]
) -> None:
    tokens = text_tokens(3, 32)
    found = influences(trained_llama, tokens)
    seen = streams(trained_llama, tokens)
    names = [sub.name for sub in find_sub_blocks(trained_llama)]
    assert list(found) == names and len(names) == len(seen) - 1
    for name, before, after in zip(names, seen[:-1], seen[1:], strict=True):
        assert found[name] == pytest.approx(distance(before, after), abs=1e-5)


@pytest.mark.parametrize("arch", ["gemma3_text", "gpt_neox", "phi3"])
def test_influence_is_found_in_any_order_of_norms_and_leaves_the_model_whole(
    arch: str, tiny_model: TinyModel, text_tokens: Callable[..., Tensor]
) -> None:
    model, tokens = tiny_model(arch), text_tokens(1, 16)
    before = model(tokens, use_cache=False).logits
    found = influences(model, tokens)
    assert len(found) == len(find_sub_blocks(model)) and all(v > -1e-5 for v in found.values())
    assert torch.equal(model(tokens, use_cache=False).logits, before)
    name = next(iter(found))
    replace_dropped(model, {name: DROP})
    assert list(dropped_modules(model)) == [name]


def test_a_window_is_as_far_apart_as_its_ends(
    trained_llama: nn.Module, text_tokens: Callable[..., Tensor]
) -> None:
    tokens = text_tokens(2, 32)
    ends = streams(trained_llama, tokens)[::2]
    wanted = [distance(ends[i], ends[i + 2]) for i in range(len(ends) - 2)]
    assert window_distances(trained_llama, tokens, 2) == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match="1 to 3 blocks"):
        window_distances(trained_llama, tokens, 4)


def test_blocks_with_outliers_are_found(tiny_model: TinyModel) -> None:
    model = tiny_model("llama")
    units = find_units(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 3] *= 40
    shared = {size: Stats(torch.eye(size), n_tokens=8) for size in (64, 128)}
    stats = {unit.name: shared[unit.shape[1]] for unit in units}
    ratios = outlier_ratios(model, units, lambda block: stats)
    assert ratios[1] > 2 * ratios[0]


def test_owl_keeps_more_where_there_are_more_outliers_and_the_average_exactly() -> None:
    kept = owl_kept({0: 0.01, 1: 0.02, 2: 0.05}, 0.6)
    assert sum(kept.values()) / 3 == pytest.approx(0.4)
    assert kept[0] < kept[1] < kept[2] and kept[2] - kept[0] == pytest.approx(0.16)
    assert owl_kept({0: 0.1, 1: 0.1}, 0.5) == {0: 0.5, 1: 0.5}


def test_pq_index_keeps_less_of_a_layer_whose_weights_are_few_and_large(tiny_model: Any) -> None:
    model = tiny_model("llama")
    units = find_units(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[:, 3:] *= 0.01
    shared = {size: Stats(torch.eye(size), n_tokens=8) for size in (64, 128)}
    stats = {unit.name: shared[unit.shape[1]] for unit in units}
    shares = pq_shares(model, units, lambda block: stats)
    name = "model.layers.1.mlp.up_proj"
    assert min(shares, key=shares.__getitem__) == name
    sizes = {unit.name: unit.n_weights for unit in units}
    kept = pq_kept(shares, sizes, 0.3)
    total = sum(kept[unit] * size for unit, size in sizes.items())
    assert total == pytest.approx(0.7 * sum(sizes.values())) and max(kept.values()) <= 1
    assert kept[name] < 0.5 * kept["model.layers.0.mlp.up_proj"]
