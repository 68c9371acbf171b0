"""Layers by kernels do what plain layers do at the edges: in place, trained, from threads."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hf_evopress.loading.embedding import compress_embedding
from hf_evopress.loading.kernels import operators
from hf_evopress.loading.kernels.cpu import compiled
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.methods import compose
from hf_evopress.plans.level import Level
from hf_evopress.training.tunable import make_tunable, settle

LEVELS = (
    "rtn:bits=4,group_size=32",
    "lowrank:rank=8,metric=plain",
    "trellis:bits=3,state_bits=6,feedback=none,scales=channels",
    "trellis:bits=2.5,state_bits=6,feedback=none + lowrank:rank=4,metric=plain",
)
SHAPE = (48, 64)


def layer(level: str, runtime: str = "auto", bias: bool = True) -> CompressedLinear:
    torch.manual_seed(0)
    known = compose.normalize(level)
    state = compose.compress(known, torch.randn(SHAPE), None)
    made = CompressedLinear.from_state(known, state, torch.randn(SHAPE[0]) if bias else None, SHAPE)
    made.prepare(runtime)
    return made


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("size", [(3, 64), (1, 64), (2, 40, 64), (64,)])
def test_an_output_can_be_changed_in_place(level: str, size: tuple[int, ...]) -> None:
    x, more = torch.randn(*size, requires_grad=True), torch.randn(48, requires_grad=True)
    found = {}
    for runtime in ("auto", "packed"):
        one = layer(level, runtime)
        y = one(x)
        y += more  # as Falcon does
        y.sum().backward()
        assert x.grad is not None and more.grad is not None
        found[runtime] = (y.detach(), x.grad, more.grad)
        x.grad = more.grad = None
        with torch.enable_grad():
            plain = one(x.detach())  # no graph of its own
            plain += more
            assert plain.requires_grad
    for by_kernels, reference in zip(*found.values(), strict=True):
        assert torch.allclose(by_kernels, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", LEVELS)
def test_scales_and_factors_that_are_trained_are_not_read_as_they_were_stored(level: str) -> None:
    one, x = layer(level), torch.randn(3, 64)
    model = nn.Sequential(one)
    with torch.no_grad():
        wanted = one(x)
        make_tunable(model, ("scales", "factors"))
        assert torch.allclose(one(x), wanted, atol=1e-4)  # for a loss without a graph
        model.requires_grad_(False)
    assert torch.allclose(one(x), wanted, atol=1e-4)  # frozen again, not settled
    moved = x.clone().requires_grad_()
    one(moved).sum().backward()
    settle(model)
    assert torch.equal(one(x), wanted)


def test_the_one_scale_of_trellis_codes_is_trained() -> None:
    model = nn.Sequential(layer("trellis:bits=3,state_bits=6,feedback=none"))
    make_tunable(model, ("scales",))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.scale"]


def test_tangents_are_not_lost() -> None:
    one, reference = (layer(LEVELS[0], runtime, bias=False) for runtime in ("auto", "packed"))
    x, t = torch.randn(3, 64), torch.randn(3, 64)
    with torch.no_grad():
        one(x)
    for grad in (False, True):
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            found = forward_ad.unpack_dual(one(forward_ad.make_dual(x, t))).tangent
            wanted = forward_ad.unpack_dual(reference(forward_ad.make_dual(x, t))).tangent
            assert found is not None and torch.equal(found, wanted)


def embedding() -> Any:
    torch.manual_seed(0)
    dense = nn.Embedding(100, 64)
    level = Level.parse("rtn:bits=8,group_size=64")
    made = compress_embedding(dense, level, compose.compress(level, dense.weight.detach(), None))
    made.prepare("auto")
    return made


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels fail in a test and work after it."""
    monkeypatch.setattr(operators, "_failed", [])
    monkeypatch.setattr(operators, "_worked", set())


@pytest.mark.parametrize("fault", [ImportError("no numba"), TypeError("cannot compile")])
def test_an_embedding_whose_kernels_fail_is_decoded_without_them(
    fault: Exception, working: None, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail() -> Any:
        raise fault

    one, ids = embedding(), torch.tensor([[3, 99], [0, 3]])
    monkeypatch.setattr(compiled, "compiled", fail)
    for _ in range(2):
        assert torch.equal(one(ids), one.weight[ids].as_subclass(Tensor))
    assert caplog.text.count("the CPU kernels of hf_evopress do not work here") == 1
    with pytest.raises(IndexError):
        one(torch.tensor([100]))


def test_token_ids_are_whole_numbers() -> None:
    with pytest.raises((RuntimeError, IndexError)):
        embedding()(torch.tensor([[0.3, 5.9]]))


def test_the_first_products_may_come_from_many_threads(working: None) -> None:
    compiled.compiled.cache_clear()
    compiled._compiled.cache_clear()
    one, x = layer(LEVELS[0]), torch.randn(2, 64)
    wanted, found, start = layer(LEVELS[0], "packed")(x), [], threading.Barrier(4)

    def call(own: CompressedLinear) -> None:
        start.wait()
        with torch.no_grad():
            found.append(own(x))

    threads = [threading.Thread(target=call, args=(copy.deepcopy(one),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and not operators._failed
    assert all(torch.allclose(y, wanted, atol=1e-4) for y in found)


def test_kernels_are_made_again_after_somebody_pressed_ctrl_c(
    working: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*how: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(compiled.machine_code, "load", lambda version: None)
        patch.setattr(compiled, "_entry", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compiled._compiled.__wrapped__()
    assert compiled._compiled.__wrapped__().run


@pytest.mark.parametrize(
    "fault",
    [EOFError("Ran out of input"), pickle.UnpicklingError("truncated"), OSError(27, "full")],
)
def test_a_cache_that_cannot_be_used_is_not(
    fault: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []

    class Numba:
        @staticmethod
        def cfunc(kind: str, cache: bool = False) -> Callable[[Any], str]:
            made.append(cache)
            if cache:
                raise fault
            return lambda function: "compiled"

    forgotten = []

    class Cache:
        def __init__(self, function: Any) -> None:
            pass

        def flush(self) -> None:
            forgotten.append(1)
            raise OSError(28, "full")

    monkeypatch.setattr("numba.core.caching.FunctionCache", Cache)
    assert compiled._entry(Numba, compiled._run, 2) == "compiled"
    assert made == [True, False] and forgotten == [1]


def replica(module: nn.Module) -> Any:
    """Return a copy of a module as nn.DataParallel makes it: its tensors are no parameters."""
    made: Any = module._replicate_for_data_parallel()
    made._former_parameters = {}
    for name, child in module._modules.items():
        setattr(made, name, None if child is None else replica(child))
    for name, parameter in module._parameters.items():
        if parameter is None:
            made._parameters[name] = None
            continue
        copied = parameter * 1 if parameter.requires_grad else parameter.detach()
        setattr(made, name, copied)
        made._former_parameters[name] = copied
    return made


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bias", [True, False])
def test_replicas_of_data_parallel_compute_what_their_layer_does(level: str, bias: bool) -> None:
    one, x = layer(level, bias=bias), torch.randn(3, 64, requires_grad=True)
    for own in (replica(one), replica(one.requires_grad_(False))):
        assert torch.equal(own(x), one(x))
        own(x).sum().backward()
        with torch.no_grad():
            assert torch.equal(own(x), one(x))
    made = embedding()
    ids = torch.tensor([[3, 1], [0, 2]])
    assert torch.equal(replica(made)(ids), made(ids))


@pytest.mark.parametrize("level", ["rtn:bits=4,group_size=32", LEVELS[2]])
def test_without_llvmlite_layers_are_prepared_all_the_same(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_evopress.loading.kernels.layer import kernel_of

    caches: tuple[Any, ...] = (compiled.has_feature, compiled.vector_bytes, kernel_of)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(sys.modules, "llvmlite.binding", None)
    try:
        x = torch.randn(3, 64)
        assert torch.allclose(layer(level, "packed")(x), layer(level)(x), atol=1e-4)
    finally:
        for cache in caches:
            cache.cache_clear()
