"""Quantisation-aware training by QuEST, and its export as codes in a rotated basis."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hf_evopress import make_quest
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods import compose
from hf_evopress.methods.maths.quest import RotatedRows, Trusted, step_of_rows
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.training.quest import QuESTLinear, to_rotated

from .short_runs import student, train


@pytest.fixture(scope="module")
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(32, 48)


def test_two_bits_trained_beat_gptq_and_ship_as_they_are(
    trained_llama: Any, tokens: Tensor, text_tokens: Any, tmp_path: Path
) -> None:
    model = student(trained_llama)
    names = make_quest(model, bits=2)
    losses = train(model, trained_llama, tokens, tmp_path)
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    ids = tokens[:2]
    with torch.no_grad():
        before = model.eval()(input_ids=ids, use_cache=False).logits
    plan = to_rotated(model)
    assert {str(level) for level in plan.values()} == {"hadamard:bits=2"}
    model.save_pretrained(tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    with torch.no_grad():
        after = loaded(input_ids=ids, use_cache=False).logits
    assert torch.equal(before, after)
    for name in names:
        layer = loaded.get_submodule(name)
        bits = sum(8 * t.numel() * t.element_size() for t in layer.state.values())
        assert bits == compose.cost_bits(layer.level, layer.shape)
    rival = copy.deepcopy(trained_llama)
    units = find_units(rival)
    levels: Any = {u.name: "gptq:bits=2,group_size=-1" for u in units}
    rival_plan = Plan(levels, shapes={u.name: u.shape for u in units})
    compress_model(rival, rival_plan, tokens)
    attach(rival, rival_plan)
    unseen = text_tokens(8, 48, seed=9).flatten()
    models = {"ours": loaded.eval(), "gptq": rival.eval()}
    reports = compare_many(models, trained_llama, unseen, window=48)
    assert reports["ours"].kl_nats < reports["gptq"].kl_nats


def test_four_bit_weights_and_activations_train(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = student(trained_llama)
    make_quest(model, bits=4, activation_bits=4)
    losses = train(model, trained_llama, tokens, tmp_path, max_steps=20)
    assert all(loss == loss for loss in losses)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("activation_bits", [None, 4])
def test_a_resumed_run_equals_a_straight_one(
    trained_llama: Any, tokens: Tensor, tmp_path: Path, activation_bits: int | None
) -> None:
    results = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = student(trained_llama)
        make_quest(model, bits=3, activation_bits=activation_bits)
        settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
        train(model, trained_llama, tokens, tmp_path, resume, **settings)
        results.append({n: t.clone() for n, t in model.state_dict().items()})
        to_rotated(model)  # codes
        results[-1] |= {f"{n}, packed": t for n, t in model.state_dict().items()}
    start = trained_llama.state_dict()
    straight, resumed = results
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(t, resumed[name]) for name, t in straight.items())
    assert all(not torch.equal(t, straight[n]) for n, t in start.items() if "_proj" in n)


class StraightThrough(nn.Linear):
    """The usual fake quantisation: a row's largest weight sets the step, the gradient passes."""

    def forward(self, input: Tensor) -> Tensor:
        step = self.weight.detach().abs().amax(1, keepdim=True) / 1.5
        rounded = (self.weight.detach() / step - 0.5).round().clamp(-2, 1).add(0.5) * step
        return F.linear(input, self.weight + (rounded - self.weight).detach(), self.bias)


def test_gradients_point_more_nearly_where_the_dense_ones_do(
    trained_llama: Any, tokens: Tensor
) -> None:
    grads = {}
    for kind in ("dense", "quest", "straight"):
        model = student(trained_llama)
        names = [u.name for u in find_units(model)]
        if kind == "quest":
            make_quest(model, bits=2)
        elif kind == "straight":
            for name in names:
                model.get_submodule(name).__class__ = StraightThrough
        model(input_ids=tokens[:8], labels=tokens[:8], use_cache=False).loss.backward()
        grads[kind] = torch.cat([model.get_submodule(n).weight.grad.flatten() for n in names])
    cosine = {k: float(F.cosine_similarity(g, grads["dense"], dim=0)) for k, g in grads.items()}
    assert cosine["quest"] > cosine["straight"]


def test_a_clipped_value_has_no_gradient_and_rotations_undo_each_other() -> None:
    X = torch.tensor([[0.1, -0.4, 9.0, -9.0]], requires_grad=True)
    step = torch.tensor([[1.0]])
    Y = Trusted.apply(X, step, 2)
    assert Y.tolist() == [[0.5, -0.5, 1.5, -1.5]]
    Y.sum().backward()
    assert X.grad is not None and X.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]
    W = torch.randn(5, 128, requires_grad=True)
    turned = RotatedRows.apply(W, 0, 64, False)
    assert torch.allclose(RotatedRows.apply(turned, 0, 64, True), W, atol=1e-5)
    weights = torch.randn(5, 128)
    (turned * weights).sum().backward()
    assert torch.allclose(W.grad, RotatedRows.apply(weights, 0, 64, True), atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_step_is_best_for_a_gaussian(bits: int) -> None:
    X = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0))
    best = step_of_rows(X, bits)
    errors = [float((Trusted.apply(X, f * best, bits) - X).square().mean()) for f in (0.9, 1, 1.1)]
    assert errors[1] < errors[0] and errors[1] < errors[2]


def test_bad_requests_say_what_to_change(trained_llama: Any, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="from 2, 3, 4, 5, 6, 8; got bits=7"):
        make_quest(student(trained_llama), bits=7)
    with pytest.raises(ValueError, match="or None; got 7"):
        make_quest(student(trained_llama), activation_bits=7)
    with pytest.raises(ValueError, match="block=256 does not divide the 64 inputs.*16, 32, 64"):
        make_quest(student(trained_llama), block=256)
    with pytest.raises(ValueError, match=r"call make_quest\(model\) first"):
        to_rotated(student(trained_llama))
    model = student(trained_llama)
    make_quest(model)
    to_rotated(model)
    with pytest.raises(ValueError, match="is at level 'hadamard:bits=4': QuEST trains a dense"):
        make_quest(model)
    assert not any(isinstance(m, QuESTLinear) for m in model.modules())
