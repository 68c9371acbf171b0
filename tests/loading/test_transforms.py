"""torch.func and second derivatives go through the kernels: what they give is a dense layer's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn import functional as F

from hf_evopress.loading.embedding import compress_embedding
from hf_evopress.loading.layers import CompressedLinear, prepare_layers
from hf_evopress.methods import compose
from hf_evopress.models.units import find_units

LEVELS = [
    "rtn:bits=4,group_size=32",
    "trellis:bits=3,state_bits=8,feedback=none",
    "magnitude:sparsity=0.5 + lowrank:rank=4,metric=plain",
]
Layer = Callable[[Tensor], Tensor]


def pair(level: str, seed: int = 0, runtime: str = "auto") -> tuple[CompressedLinear, Layer]:
    """Return a packed layer of 96 inputs and 48 outputs, and the dense one of its weight."""
    torch.manual_seed(seed)
    shape, bias = (48, 96), torch.randn(48)
    known = compose.normalize(level)
    state = compose.compress(known, torch.randn(shape) / 10, None)
    packed = CompressedLinear.from_state(level, state, bias, shape)
    packed.prepare(runtime)
    W = compose.decompress(known, state, shape, torch.float32)
    return packed.requires_grad_(False), lambda x: F.linear(x, W, bias)


@pytest.fixture
def reference_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("the weight was computed")

    monkeypatch.setattr(compose, "operator", never)


@pytest.mark.usefixtures("reference_is_not_used")
@pytest.mark.parametrize("level", LEVELS)
def test_vmap_takes_batches_along_any_dimension(level: str) -> None:
    packed, dense = pair(level)
    x = torch.randn(5, 3, 96)
    assert torch.allclose(vmap(packed)(x), dense(x), atol=1e-4)
    moved = vmap(packed, in_dims=1, out_dims=1)(x)
    assert torch.allclose(moved, dense(x), atol=1e-4)
    assert torch.allclose(vmap(vmap(packed))(x), dense(x), atol=1e-4)


@pytest.mark.parametrize("runtime", ["auto", "packed"])
@pytest.mark.parametrize("level", LEVELS)
def test_gradients_of_each_sample_are_those_of_a_dense_layer(level: str, runtime: str) -> None:
    x = torch.randn(5, 96)
    found, wanted = (
        vmap(grad(lambda one, f=f: f(one).square().sum()))(x)  # type: ignore[misc]
        for f in pair(level, runtime=runtime)
    )
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_jacobians_and_hessians_are_those_of_a_dense_layer(level: str) -> None:
    x = torch.randn(96)
    packed, dense = pair(level)
    assert torch.allclose(jacrev(packed)(x), jacrev(dense)(x), atol=1e-4)
    found, wanted = (jacrev(jacrev(lambda x, f=f: f(x).pow(3).sum()))(x) for f in (packed, dense))
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-2)
    assert torch.allclose(hessian(lambda x: packed(x).pow(3).sum())(x), wanted, atol=1e-2)
    moved = jvp(packed, (x,), (torch.ones(96),))[1]
    assert torch.allclose(moved, jvp(dense, (x,), (torch.ones(96),))[1], atol=1e-4)


@pytest.mark.parametrize("runtime", ["auto", "packed"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_penalty_on_gradients_is_trained_as_with_a_dense_layer(level: str, runtime: str) -> None:
    got = []
    for f in pair(level, runtime=runtime):
        torch.manual_seed(1)
        x, scale = torch.randn(4, 96, requires_grad=True), torch.ones(96, requires_grad=True)
        y = f(x * scale).tanh().sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        slope.square().sum().backward()
        got.append((x.grad, scale.grad))
    for found, wanted in zip(*got, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


def test_ensembles_of_packed_layers_are_computed_at_once() -> None:
    (one, dense_one), (two, dense_two) = (pair(LEVELS[0], seed) for seed in (0, 1))
    stacked = {name: torch.stack([one.state[name], two.state[name]]) for name in one.state}
    stacked["bias"] = torch.stack([one.bias, two.bias])
    x = torch.randn(3, 96)

    def product(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(one, tensors, (x,))

    found = vmap(product, in_dims=(0, None))(stacked, x)
    assert torch.allclose(found, torch.stack([dense_one(x), dense_two(x)]), atol=1e-4)


def test_rows_of_embeddings_are_looked_up_under_vmap() -> None:
    level, shape = compose.normalize(LEVELS[0]), (50, 96)
    state = compose.compress(level, torch.randn(shape), None)
    embedding = compress_embedding(nn.Embedding(*shape), level, state)
    embedding.prepare("auto")
    ids = torch.randint(0, 50, (4, 7))
    assert torch.equal(vmap(embedding)(ids), embedding(ids))


def test_the_operators_keep_the_rules_of_pytorch() -> None:
    packed, _ = pair(LEVELS[0])
    state = [getattr(packed, name) for name in packed._state_names]
    back = torch.randn(3, 48, requires_grad=True), state, packed.level_text, 96, "auto"
    torch.library.opcheck(torch.ops.evopress.linear_input_gradient.default, back)
    experts = torch.tensor([0, 1, 1])
    many = [*state, *copy.deepcopy(state)]
    levels = packed.level_text, [0, 0]
    forth = torch.randn(3, 96, requires_grad=True), experts, many, [], *levels, 48, "auto"
    torch.library.opcheck(torch.ops.evopress.experts.default, forth)
    torch.library.opcheck(
        torch.ops.evopress.experts_input_gradient.default,
        (back[0], experts, many, *levels, 96, "auto"),
    )
    samples = torch.randn(4, 3, 96)
    given = experts, many, [], *levels, 48, "auto"
    wanted = torch.stack([torch.ops.evopress.experts(x, *given) for x in samples])
    found = vmap(lambda x: torch.ops.evopress.experts(x, *given))(samples)
    assert torch.equal(found, wanted)


def test_a_network_under_vmap_answers_as_by_itself() -> None:
    net = nn.Sequential(pair(LEVELS[0])[0], nn.GELU(), nn.Linear(48, 96), pair(LEVELS[1])[0])
    x = torch.randn(6, 2, 96)
    assert torch.allclose(vmap(net)(x), net(x), atol=1e-5)


@pytest.mark.parametrize("runtime", ["auto", "packed"])
def test_a_model_gives_each_sample_its_own_gradient(
    runtime: str, tiny_model: Callable[..., Any]
) -> None:
    model = tiny_model("llama", attn_implementation="eager").requires_grad_(False)
    for unit in find_units(model):
        linear = model.get_submodule(unit.name)
        level = compose.normalize(LEVELS[0])
        state = compose.compress(level, linear.weight.float(), None)
        model.set_submodule(unit.name, CompressedLinear.from_state(level, state, None, unit.shape))
    prepare_layers(model, runtime)
    norms = {name: p for name, p in model.named_parameters() if "norm" in name}
    ids = torch.randint(0, 100, (3, 7))

    def loss(norms: dict[str, Tensor], ids: Tensor) -> Tensor:
        logits = functional_call(model, norms, (ids[None],), {"use_cache": False}).logits[0]
        return F.cross_entropy(logits[:-1], ids[1:])

    found = vmap(grad(loss), in_dims=(None, 0))(norms, ids)
    for own in norms.values():
        own.requires_grad_()
    for i, one in enumerate(ids):
        wanted = torch.autograd.grad(loss(norms, one), list(norms.values()))
        for name, slope in zip(norms, wanted, strict=True):
            assert torch.allclose(found[name][i], slope, rtol=1e-3, atol=1e-5), name
