"""Training of values that weights share at random places, and its export as `folded` levels."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from hf_evopress import make_folded
from hf_evopress.methods import compose
from hf_evopress.methods.maths.folding import unfold, uses
from hf_evopress.models.units import find_units
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.training.random_fold import FoldedLinear, to_folded
from hf_evopress.training.tunable import make_tunable, settle

from .. import second_device  # noqa: F401  registers the device, before any gradient is taken
from .short_runs import student, train

ATTENTION = "*self_attn*"


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    made: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return made


def folded_layers(model: Any) -> dict[str, FoldedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FoldedLinear)}


@pytest.fixture(scope="module")
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(32, 48)


def test_with_a_value_per_weight_it_is_the_dense_model(trained_llama: Any, tokens: Tensor) -> None:
    model = student(trained_llama)
    names = make_folded(model, share=1.0)
    assert names == [u.name for u in find_units(trained_llama)] == list(folded_layers(model))
    assert torch.equal(logits(model, tokens[:2]), logits(trained_llama, tokens[:2]))


def test_a_model_in_half_the_values_stores_half_and_is_loaded_as_it_was_saved(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = student(trained_llama)
    names = make_folded(model, share=0.3, scale=0.7, seed=5)
    losses = train(model, trained_llama, tokens, tmp_path, max_steps=12, learning_rate=2e-3)
    assert sum(losses[-3:]) < sum(losses[:3])
    trained = logits(model, tokens[:2])
    psi = {n: (m.psi.detach() * m.scale).half() for n, m in folded_layers(model).items()}
    plan = to_folded(model)
    assert {str(level) for level in plan.values()} == {"folded:seed=5,share=0.3"}
    packed = logits(model, tokens[:2])
    assert torch.allclose(packed, trained, atol=0.02)  # float16 is what is left of float32
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(loaded, tokens[:2]), packed)
    for name in names:
        layer = loaded.get_submodule(name)
        assert torch.equal(layer.state["psi"], psi[name])
        bits = sum(8 * t.numel() * t.element_size() for t in layer.state.values())
        assert bits == compose.cost_bits(layer.level, layer.shape)
        assert bits == 16 * round(0.3 * layer.shape[0] * layer.shape[1])


def test_a_layer_computes_with_its_formula_and_averages_the_gradients_of_sharers(
    trained_llama: Any, tokens: Tensor
) -> None:
    model = student(trained_llama)
    make_folded(model, share=0.4, scale=0.5)
    layers = folded_layers(model)
    ids = tokens[:4]
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    rival = student(trained_llama)
    leaves = {}
    for name, layer in layers.items():
        psi = layer.psi.detach().clone().requires_grad_()
        shape = (layer.out_features, layer.in_features)
        # autograd of cat, slices and a product, instead of the backward pass that is written out
        parameter = rival.get_submodule(name)
        del parameter.weight
        parameter.weight = unfold(0.5 * psi, shape[0] * shape[1], 0).view(shape)
        leaves[name] = psi
    rival(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for name, layer in layers.items():
        n = layer.out_features * layer.in_features
        expected = leaves[name].grad / (uses(n, len(layer.psi), 0) * 0.5**2)
        assert torch.allclose(layer.psi.grad, expected, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_a_step_of_gradient_descent_is_the_same_at_any_scale(
    trained_llama: Any, tokens: Tensor, scale: float
) -> None:
    moved = []
    for lam in (1.0, scale):
        model = student(trained_llama)
        make_folded(model, share=0.5, scale=lam)
        before = {n: m.weight.detach() for n, m in folded_layers(model).items()}
        model(input_ids=tokens[:4], labels=tokens[:4], use_cache=False).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        moved.append({n: m.weight.detach() - before[n] for n, m in folded_layers(model).items()})
    for name, move in moved[0].items():
        assert torch.allclose(move, moved[1][name], rtol=1e-3, atol=1e-6)


def test_a_resumed_run_equals_a_straight_one(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    models = []
    for resume in (None, str(tmp_path / "straight" / "checkpoint-3")):
        model = student(trained_llama)
        make_folded(model, share=0.5)
        saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
        out = tmp_path / ("stopped" if resume else "straight")
        train(model, trained_llama, tokens, out, resume, learning_rate=2e-3, **saving)
        models.append(model.state_dict())
    assert any(name.endswith("psi") for name in models[0])
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


def test_it_trains_and_is_packed_on_any_device(
    trained_llama: Any, tokens: Tensor, device: torch.device
) -> None:
    found = []
    for place in (torch.device("cpu"), device):
        model = student(trained_llama).to(place)
        make_folded(model, share=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ids = tokens[:4].to(place)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        to_folded(model)
        found.append(logits(model, ids).cpu())
    assert torch.allclose(found[0], found[1], atol=1e-4)


def test_packed_values_can_be_trained_on(trained_llama: Any) -> None:
    model = student(trained_llama)
    make_folded(model, share=0.5)
    to_folded(model)
    names = make_tunable(model, ["factors"])
    assert len(names) == len(find_units(trained_llama)) and names[0].endswith(".psi")
    settle(model)


def make_small(model: Any) -> None:
    """Give `model` MLPs of half the channels, random ones."""
    config = copy.deepcopy(model.config)
    config.intermediate_size //= 2
    torch.manual_seed(0)
    for block in model.model.layers:
        block.mlp = LlamaMLP(config)
        for linear in (block.mlp.gate_proj, block.mlp.up_proj, block.mlp.down_proj):
            torch.nn.init.normal_(linear.weight, std=config.initializer_range)


def test_mlps_of_half_the_values_beat_small_random_ones_trained_for_as_many_steps(
    trained_llama: Any, tokens: Tensor, text_tokens: Any, tmp_path: Path
) -> None:
    rates = {"folded": 2e-3, "small": 2e-3, "small, larger steps": 4e-3}
    models: dict[str, Any] = {}
    for name, rate in rates.items():
        model = student(trained_llama)
        if name == "folded":
            make_folded(model, share=0.5, skip=[ATTENTION])
        else:
            make_small(model)
        models[name] = model
        train(model, trained_llama, tokens, tmp_path, learning_rate=rate, max_steps=30)
    assert len({sum(p.numel() for p in model.parameters()) for model in models.values()}) == 1
    to_folded(models["folded"])
    unseen = text_tokens(8, 48, seed=9).flatten()
    evaluated = {name: model.eval() for name, model in models.items()}
    reports = compare_many(evaluated, trained_llama, unseen, window=48)
    kl = {name: report.kl_nats for name, report in reports.items()}
    assert kl["folded"] < 0.8 * min(kl["small"], kl["small, larger steps"])


def test_bad_requests_say_what_to_change(trained_llama: Any) -> None:
    for share, bound in ((0, ">= 0.001"), (1.5, "<= 1.0")):
        with pytest.raises(ValueError, match=f"folded needs share {bound}, got share={share}"):
            make_folded(student(trained_llama), share=share)
    for scale in (0.0, -1.0, float("inf")):
        with pytest.raises(ValueError, match=f"above 0 and finite; got scale={scale}"):
            make_folded(student(trained_llama), scale=scale)
    with pytest.raises(ValueError, match=r"call make_folded\(model\) first"):
        to_folded(student(trained_llama))
    model = student(trained_llama)
    make_folded(model, skip=[ATTENTION])
    with pytest.raises(ValueError, match="is folded already, as 'folded:share=0.5': skip it"):
        make_folded(model)
    make_folded(model, share=0.8, skip=["*mlp*"])
    to_folded(model, values="bfloat16")
    with pytest.raises(ValueError, match="'folded:share=0.8,values=bfloat16': values are shared"):
        make_folded(model)
    assert not folded_layers(model)
