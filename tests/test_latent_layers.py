"""Codes that are trained with the whole model, and packed again at the same size."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hf_evopress.latent_layers import (
    CODE_STEPS,
    CodesAndFloats,
    LatentLinear,
    latent_linears,
    make_latent,
    pack_latent,
)
from hf_evopress.layers import compressed_linears
from hf_evopress.plan import Plan
from hf_evopress.stitch import compress_model
from hf_evopress.units import find_units

LEVELS = ("rtn:bits=2,group_size=32", "magnitude:sparsity=0.4,bits=3,group_size=16", "dense")


@pytest.fixture
def made(trained_llama: Any, text_tokens: Any) -> Any:
    """The trained model at different levels."""
    model = copy.deepcopy(trained_llama)
    units = find_units(model)
    levels = {u.name: LEVELS[i % len(LEVELS)] for i, u in enumerate(units)}
    plan = Plan(levels, shapes={u.name: u.shape for u in units})
    compress_model(model, plan, text_tokens(2, 16))
    return model.requires_grad_(False)


def loss(model: Any, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (model(input_ids=ids, use_cache=False).logits - target).square().mean()


def test_standing_in_and_packing_changes_nothing(made: Any, text_tokens: Any) -> None:
    ids = text_tokens(2, 16)
    before = made(input_ids=ids).logits
    states = {n: dict(m.state) for n, m in compressed_linears(made).items()}
    names = make_latent(made)
    assert names and all(isinstance(made.get_submodule(n), LatentLinear) for n in names)
    torch.testing.assert_close(made(input_ids=ids).logits, before)
    pack_latent(made)
    for name, layer in compressed_linears(made).items():
        assert all(torch.equal(layer.state[k], x) for k, x in states[name].items())


def test_steps_change_codes_bring_the_model_closer_and_keep_its_tensors(
    made: Any, trained_llama: Any, text_tokens: Any
) -> None:
    ids = text_tokens(4, 32)
    with torch.no_grad():
        target = trained_llama(input_ids=ids, use_cache=False).logits
        before = float(loss(made, ids, target))
    old = {n: dict(m.state) for n, m in compressed_linears(made).items()}
    make_latent(made)
    optimizer = CodesAndFloats(made, 1e-3)
    for _ in range(20):
        loss(made, ids, target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        for layer in latent_linears(made).values():
            layer.tuned.bound()
    trained = made(input_ids=ids, use_cache=False).logits
    pack_latent(made)
    with torch.no_grad():
        torch.testing.assert_close(
            made(input_ids=ids, use_cache=False).logits, trained, atol=1e-3, rtol=1e-3
        )
        assert float(loss(made, ids, target)) < 0.8 * before
    new = {n: m.state for n, m in compressed_linears(made).items()}
    sizes = [{n: {k: (x.shape, x.dtype) for k, x in s.items()} for n, s in m.items()}
             for m in (old, new)]  # fmt: skip
    assert sizes[0] == sizes[1]
    assert any(not torch.equal(s["codes"], new[n]["codes"]) for n, s in old.items() if "codes" in s)


def test_every_trained_parameter_has_the_step_of_its_kind(made: Any) -> None:
    make_latent(made)
    made.model.norm.weight.requires_grad_(True)
    groups = CodesAndFloats(made, 1e-4).param_groups
    wanted = [p for p in made.parameters() if p.requires_grad]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, wanted))
    assert [g["codes"] for g in groups] == [True, False, False]
    assert groups[0]["lr"] == pytest.approx(CODE_STEPS * 1e-4)
    assert groups[-1]["params"] == [made.model.norm.weight]


def test_a_latent_moves_by_its_share_of_the_gradient(made: Any) -> None:
    make_latent(made)
    (latent,) = next(iter(latent_linears(made).values())).latents
    optimizer, start = CodesAndFloats(made, 1e-4), latent.detach().clone()
    latent.grad = torch.zeros_like(latent)
    latent.grad.view(-1)[:2] = torch.tensor([2.0, -1.0])
    optimizer.step()
    moved = (latent.detach() - start).view(-1)
    assert moved[0] < 0 < moved[1] and not moved[2:].any()
    assert float(moved[0] / moved[1]) == pytest.approx(-2.0, rel=1e-3)
