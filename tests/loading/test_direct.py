"""The short way through a layer gives what the long one gives, and notices what has changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from hf_evopress.loading.kernels import direct as module
from hf_evopress.loading.kernels.layer import MOST_TOKENS, kernel_of
from hf_evopress.loading.kernels.steps import finish, finish_all
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.methods import compose

from .test_kernels import make

LEVEL = "rtn:bits=3,group_size=32"
SHAPE = (24, 96)


def layer(level: str = LEVEL, *, bias: torch.dtype | None = None) -> CompressedLinear:
    torch.manual_seed(0)
    state = compose.compress(compose.normalize(level), torch.randn(SHAPE), None)
    added = None if bias is None else torch.randn(SHAPE[0], dtype=bias)
    made = CompressedLinear.from_state(level, state, added, SHAPE, dtype=torch.bfloat16)
    made.requires_grad_(False).prepare("auto")
    return made


def long_way(one: CompressedLinear, x: Tensor) -> Tensor:
    kernel = kernel_of(one.level, SHAPE)
    assert kernel is not None
    return kernel.linear(x, one.state, one.bias)


def taken(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return a list that grows by each result of the short way."""
    found: list[Tensor] = []
    whole = module.Direct.__call__

    def call(self: module.Direct, *given: object) -> Tensor | None:
        y = whole(self, *given)  # type: ignore[arg-type]
        if y is not None:
            found.append(y)
        return y

    monkeypatch.setattr(module.Direct, "__call__", call)
    return found


@torch.no_grad()
@pytest.mark.parametrize("level", [LEVEL, "rtn:bits=4,group_size=96,symmetric=true"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16, torch.float16])
def test_it_gives_the_same_bits(
    level: str, dtype: torch.dtype, bias: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, short = layer(level, bias=bias), taken(monkeypatch)
    for shape in ((1, 96), (2, 3, 96), (96,), (MOST_TOKENS, 96)):
        x = torch.randn(shape).to(dtype)
        one(x)
        y = one(x)
        assert y.shape == (*shape[:-1], 24) and y.dtype == dtype
        assert torch.equal(y, long_way(one, x))
    assert len(short) == 7  # all but the first


@torch.no_grad()
def test_what_it_is_not_for_goes_the_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = layer(), torch.randn(3, 96)
    one(x)
    short = taken(monkeypatch)
    assert one(torch.randn(0, 96)).shape == (0, 24)
    assert one(torch.randn(MOST_TOKENS + 1, 96)).shape == (MOST_TOKENS + 1, 24)
    assert torch.equal(one(x.half()), long_way(one, x.half()))
    y = one(torch.randn(96, 3).T)
    assert y.shape == (3, 24) and y.isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert one(x).dtype == torch.bfloat16
    assert not short
    with pytest.raises(RuntimeError, match="for a layer of 96 inputs"):
        one(torch.randn(3, 95))


def test_a_gradient_is_that_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    one = layer()
    with torch.no_grad():
        one(torch.randn(1, 96))
    short, x = taken(monkeypatch), torch.randn(3, 96, requires_grad=True)
    one(x).sum().backward()
    assert x.grad is not None and not short
    W = compose.decompress(one.level, one.state, SHAPE, torch.float32)
    assert torch.allclose(x.grad, W.sum(0).expand(3, 96), atol=1e-4)


@torch.no_grad()
def test_tensors_that_were_replaced_moved_or_changed_are_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, x, short = layer(bias=torch.float32), torch.randn(1, 96), taken(monkeypatch)
    one(x), one(x)
    one.scales.data = one.scales.data * 2
    assert torch.equal(one(x), long_way(one, x))
    one.scales.mul_(2)  # at the same place
    assert torch.equal(one(x), long_way(one, x))
    other = torch.nn.Parameter(one.codes.data.flip(0), requires_grad=False)
    one.codes = other
    assert torch.equal(one(x), long_way(one, x))
    one.bias = None
    assert torch.equal(one(x), long_way(one, x))
    one.to(torch.bfloat16)
    assert torch.equal(one(x), long_way(one, x))
    assert len(short) >= 2


@torch.no_grad()
def test_copies_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = layer(), torch.randn(1, 96)
    one(x)
    short = taken(monkeypatch)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        twin.scales.mul_(2)
        assert torch.equal(twin(x), twin(x)) and torch.equal(twin(x), long_way(twin, x))
        assert not torch.equal(twin(x), one(x))
    assert short


@torch.no_grad()
def test_as_packed_it_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = layer(), torch.randn(1, 96)
    one(x)
    short = taken(monkeypatch)
    one.prepare("packed")
    one(x)
    assert not short


LEVELS = [
    LEVEL,
    "rtn:bits=8,group_size=96",
    "magnitude:sparsity=0.5",
    "magnitude:pattern=2:4,bits=4,group_size=32",
    "rows:bits=3,top_bits=6,top=0.2,group_size=48",
    "lowrank:rank=5,metric=plain",
    "rtn:bits=3,group_size=32 + lowrank:rank=5,metric=plain",
    "trellis:bits=2,state_bits=8,feedback=none",
]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("threads", [1, 2])
def test_products_in_one_call_are_those_of_many(dtype: torch.dtype, threads: int) -> None:
    made = [make(level, SHAPE) for level in LEVELS]
    shared = torch.randn(2, 96).to(dtype)
    shared[0, 3] = 1e4  # a chunk that is multiplied in float32
    inputs = [shared if i % 2 else torch.randn(1 + i, 96).to(dtype) for i in range(len(made))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        given = [(kernel, x, state) for (kernel, state), x in zip(made, inputs, strict=True)]
        apart = [finish(kernel.steps(x, state, None)) for kernel, x, state in given]
        together = finish_all(kernel.steps(x, state, None) for kernel, x, state in given)
    finally:
        torch.set_num_threads(before)
    assert len(together) == len(LEVELS)
    for a, b in zip(apart, together, strict=True):
        assert torch.equal(a, b)


def test_no_products_are_none() -> None:
    assert finish_all([]) == []
