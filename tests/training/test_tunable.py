"""Floats of packed layers are trained in float32 and rounded back to what their level stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.training.tunable import make_tunable, rates, settle

LEVEL = "trellis:bits=2,state_bits=6,scales=channels,feedback=none"


def train(model: Any, dense: Any, ids: torch.Tensor, rate: float = 2e-3) -> tuple[float, float]:
    """Return the squared error of the logits before and after some steps, settled."""
    with torch.no_grad():
        wanted = dense(ids).logits

    def loss() -> torch.Tensor:
        return (model(ids).logits - wanted).square().mean()

    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    before = float(loss().detach())
    for _ in range(15):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    settle(model)
    with torch.no_grad():
        return before, float(loss())


def test_scales_of_trellis_channels_are_trained_and_rounded_back(
    tiny_model: Callable[..., Any],
) -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    shapes = {u.name: u.shape for u in find_units(model)}
    compress_model(model, Plan(dict.fromkeys(shapes, LEVEL), shapes), None)
    ids = torch.arange(64).view(2, 32)
    names = make_tunable(model, ["scales"])
    assert sorted({name.rpartition(".")[2] for name in names}) == ["column_scales", "row_scales"]
    before, after = train(model, dense, ids)
    assert {model.get_parameter(name).dtype for name in names} == {torch.float16}
    assert after < 0.9 * before


def test_the_tensors_of_networks_are_factors_which_training_heals(
    tiny_model: Callable[..., Any],
) -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    shapes = {u.name: u.shape for u in find_units(model)}
    levels = dict.fromkeys(shapes, "mpo:bits=8,factors=bfloat16")
    compress_model(model, Plan(levels, shapes), None)
    ids = torch.arange(64).view(2, 32)
    names = make_tunable(model, ["factors"])
    assert len(names) == 2 * len(shapes) and {name[-2:] for name in names} == {".P", ".Q"}
    before, after = train(model, dense, ids)
    assert {model.get_parameter(name).dtype for name in names} == {torch.bfloat16}
    assert after < 0.7 * before


@pytest.mark.parametrize(
    "level, kinds, trained",
    [
        ("dict:bits=8,atoms=bfloat16,values=float16", ["factors"], {"atoms", "values"}),
        ("dict:bits=8,atoms=bfloat16", ["factors", "scales"], {"atoms", "values_scales"}),
        ("dict:bits=4", ["scales"], {"atoms_scales", "values_scales"}),
        (
            "rtn:bits=2,group_size=32 + dict:bits=6,atoms=float16,values=bfloat16",
            ["factors"],
            {"atoms_1", "values_1"},
        ),
    ],
)
def test_floats_of_dictionaries_are_trained_and_rounded_back(
    tiny_model: Callable[..., Any], level: str, kinds: list[str], trained: set[str]
) -> None:
    dense, model = tiny_model("llama"), tiny_model("llama")
    ids = torch.arange(64).view(2, 32)
    shapes = {u.name: u.shape for u in find_units(model)}
    compress_model(model, Plan(dict.fromkeys(shapes, level), shapes), ids)
    stored = {n: t.clone() for n, t in model.state_dict().items()}
    names = make_tunable(model, kinds)
    assert set(names) == {f"{unit}.{name}" for unit in shapes for name in trained}
    before, after = train(model, dense, ids, rate=2e-4)
    assert after < 0.9 * before
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == stored[name].dtype
        assert torch.equal(tensor, stored[name]) != (name in names)  # nothing else has moved


def test_codes_of_dictionaries_and_values_of_sparse_levels_are_no_factors(
    tiny_model: Callable[..., Any],
) -> None:
    for level in ("dict:bits=4", "magnitude:sparsity=0.5"):
        model = tiny_model("llama")
        shapes = {u.name: u.shape for u in find_units(model)}
        ids = torch.arange(64).view(2, 32)
        compress_model(model, Plan(dict.fromkeys(shapes, level), shapes), ids)
        with pytest.raises(ValueError, match=f"no factors to train; its levels are {level[:9]}"):
            make_tunable(model, ["factors"])


def test_a_step_changes_no_scales_by_more_than_their_codes_are_off(
    tiny_model: Callable[..., Any],
) -> None:
    model = tiny_model(tie_word_embeddings=False)
    levels = ["rtn:bits=8,group_size=32", "rtn:bits=2,group_size=32", LEVEL]
    units = find_units(model)
    plan = {u.name: levels[i % len(levels)] for i, u in enumerate(units)}
    compress_model(model, Plan(plan, shapes={u.name: u.shape for u in units}), None)
    names = make_tunable(model, ("scales", "norms"))
    groups = rates(model, 1e-2)
    of = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert len(of) == len(names)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            unit, rate = name.rpartition(".")[0], of[id(parameter)]
            size = float(parameter.detach().square().mean().sqrt())
            if plan.get(unit) == levels[0]:
                assert 2**-11 < rate / size < 2**-9
            elif plan.get(unit) == LEVEL:
                assert 1e-2 / 4 < rate <= 1e-2
            elif unit not in plan:
                assert rate == 1e-2


def test_scales_of_8_bits_are_trained_at_the_default_rate(tiny_model: Callable[..., Any]) -> None:
    """At one rate for all, the first steps made the error ten times as large."""
    dense, model = tiny_model(), tiny_model()
    units = find_units(model)
    plan = {u.name: "rtn:bits=8,group_size=32" for u in units}
    compress_model(model, Plan(plan, shapes={u.name: u.shape for u in units}), None)
    make_tunable(model, ("scales",))
    ids = torch.arange(96).view(2, 48)
    with torch.no_grad():
        wanted = dense(ids).logits
    optimizer, losses = torch.optim.AdamW(rates(model, 1e-3), weight_decay=0.0), []
    for _ in range(12):
        loss = (model(ids).logits - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert max(losses) == losses[0] and losses[-1] < 0.9 * losses[0]
