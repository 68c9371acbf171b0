"""Gradients through a weight that is forgotten are those of a weight that is kept."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.methods import compose
from hf_evopress.methods.maths.recompute import forgetful_linear

LEVELS = [
    "rtn:bits=4,group_size=32",
    "rtn:bits=3,group_size=32 + lowrank:rank=4,metric=plain",
    "lowrank:rank=8,metric=plain",
]


def layer(level: str, *, bias: bool = True) -> CompressedLinear:
    torch.manual_seed(0)
    W = torch.randn(24, 64)
    parsed = compose.normalize(level)
    state = compose.compress(parsed, W, None)
    return CompressedLinear.from_state(
        parsed, state, nn.Parameter(torch.randn(24)) if bias else None, (24, 64)
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_equal_those_of_the_dense_layer(level: str, bias: bool) -> None:
    packed = layer(level, bias=bias)
    dense = packed.dequantize()
    grads = []
    for module in (packed, dense):
        x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = module(x)
        (y * torch.arange(y.numel()).view_as(y)).sum().backward()
        grads.append(x.grad)
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-3)
    if bias:
        assert packed.bias is not None and dense.bias is not None
        assert torch.allclose(packed.bias.grad, dense.bias.grad)  # type: ignore[arg-type]


def test_the_graph_does_not_keep_the_weight() -> None:
    packed = layer("rtn:bits=4,group_size=32")
    kept: list[weakref.ref[Tensor]] = []
    stock = compose.method("rtn").decompress

    def watched(*args: object, **kwargs: object) -> Tensor:
        W = stock(*args, **kwargs)  # type: ignore[arg-type]
        kept.append(weakref.ref(W))
        return W

    method = compose.method("rtn")
    method.decompress = watched  # type: ignore[method-assign]
    try:
        x = torch.randn(5, 64, requires_grad=True)
        y = packed(x)
        assert kept and all(ref() is None for ref in kept)
        y.sum().backward()
        assert len(kept) == 2 and x.grad is not None
    finally:
        del method.decompress


def test_scales_that_are_trained_still_get_their_gradient() -> None:
    packed = layer("rtn:bits=4,group_size=32")
    scales = packed.get_parameter("scales")
    packed.register_parameter("scales", nn.Parameter(scales.float()))
    packed(torch.randn(5, 64, requires_grad=True)).pow(2).sum().backward()
    grad = packed.get_parameter("scales").grad
    assert grad is not None and bool((grad != 0).any())


def test_training_scales_keeps_no_dense_weight_either() -> None:
    packed = layer("rtn:bits=4,group_size=32")
    scales = packed.get_parameter("scales")
    packed.register_parameter("scales", nn.Parameter(scales.float()))
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    x = torch.randn(2, 64)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y = packed(x)
    assert max(kept, default=0) < 24 * 64
    y.pow(2).sum().backward()
    got = packed.get_parameter("scales").grad
    copy = packed.get_parameter("scales").detach().clone().requires_grad_()
    state = {**packed.state, "scales": copy}
    W = compose.decompress(packed.level, state, packed.shape, torch.float32)
    F.linear(x, W, packed.bias).pow(2).sum().backward()
    assert got is not None and torch.allclose(got, copy.grad)  # type: ignore[arg-type]


def test_autocast_and_bfloat16_inputs_give_gradients_in_their_own_dtype() -> None:
    W = torch.randn(4, 8)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = forgetful_linear(x, W, None, lambda: W)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert torch.allclose(x.grad, W.sum(0).expand(3, 8), rtol=1e-2, atol=2e-2)


def test_without_gradients_it_is_the_plain_product() -> None:
    packed = layer("rtn:bits=4,group_size=32")
    x = torch.randn(3, 64)
    assert torch.equal(packed(x), F.linear(x, torch.Tensor(packed.weight), packed.bias))
