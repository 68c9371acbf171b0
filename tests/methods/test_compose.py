"""Levels of several terms: each term compresses what the terms before it left."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch

from hf_evopress.methods import compose
from hf_evopress.methods.base import Method, Param
from hf_evopress.methods.maths.linalg import Stats

SHAPE = (24, 64)
CALLS: list[tuple[str, int, int]] = []


class Scaled(Method):
    """Stores `share` of the weight it is given: the error left is known exactly."""

    name = "scaled"
    can_follow = True
    is_trainable = True
    params: ClassVar = {"share": Param(float, "what is kept", default=0.5)}

    def cost_bits(self, shape, **params):
        return 32 * shape[0] * shape[1] + 32

    def compress(self, W, stats, **params):
        return {"kept": W * params["share"], "of_ten": torch.ones(1)}

    def compress_many(self, Ws, stats, settings):
        CALLS.append((self.name, len(Ws), len(settings)))
        return super().compress_many(Ws, stats, settings)

    def decompress(self, state, shape, dtype, **params):
        assert set(state) == {"kept", "of_ten"}, "sees its own tensors, by its own names"
        return state["kept"].to(dtype)

    def empty(self, shape, dtype, **params):
        return {
            "kept": torch.empty(shape, device="meta"),
            "of_ten": torch.empty(1, device="meta"),
        }

    def bias_fix(self, state, **params):
        return state["kept"][:, 0]

    def operator(self, state, bias, shape, dtype, **params):
        kept = state["kept"].to(dtype)
        fix = kept[:, 0] if bias is None else bias + kept[:, 0]
        return lambda x: x @ kept.T + fix


class First(Scaled):
    name = "first"
    can_follow = False


@pytest.fixture(autouse=True)
def dummies(monkeypatch):
    """Let compose know the methods `scaled` and `first`."""
    CALLS.clear()
    known = {"scaled": Scaled, "first": First}
    load = compose.load
    monkeypatch.setattr(compose, "load", lambda group, n: known.get(n) or load(group, n))
    caches = (compose.method, compose.normalize, compose._resolved)
    for cache in caches:
        cache.cache_clear()
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def weight(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def stats():
    X = torch.randn(200, SHAPE[1], generator=torch.Generator().manual_seed(9))
    return Stats(X.T @ X / 200)


def test_each_term_is_given_the_error_of_those_before():
    level = compose.normalize("scaled + scaled + scaled:share=1.0")
    state = compose.compress(level, weight(), None)
    assert torch.allclose(state["kept"], weight() / 2)
    assert torch.allclose(state["kept_1"], weight() / 4)
    assert torch.allclose(state["kept_2"], weight() / 4)
    got = compose.decompress(level, state, SHAPE, torch.float32)
    assert torch.allclose(got, weight())


def test_the_tensors_of_later_terms_carry_their_number():
    level = compose.normalize("rtn:bits=3,group_size=32 + scaled + scaled")
    names = {"codes", "scales", "zeros", "kept_1", "of_ten_1", "kept_2", "of_ten_2"}
    assert compose.compress(level, weight(), None).keys() == names
    assert compose.empty(level, SHAPE, torch.float16).keys() == names


def test_eight_terms_keep_their_tensors_apart():
    level = compose.normalize(" + ".join(["scaled:share=0.3"] * 8))
    state = compose.compress(level, weight(), None)
    assert torch.allclose(state["kept_7"], weight() * 0.3 * 0.7**7, rtol=1e-4)
    got = compose.decompress(level, state, SHAPE, torch.float32)
    assert torch.allclose(got, weight() * (1 - 0.7**8), rtol=1e-4, atol=1e-6)


def test_costs_add_up_to_the_bytes_stored():
    level = compose.normalize("rtn:bits=3,group_size=32 + scaled + gptq:bits=2,group_size=32")
    state = compose.compress(level, weight(), stats())
    stored = sum(8 * v.numel() * v.element_size() for v in state.values())
    assert compose.cost_bits(level, SHAPE) == stored


def test_the_operator_adds_the_bias_once():
    level = compose.normalize("rtn:bits=4,group_size=32 + rtn:bits=2,group_size=32")
    state = compose.compress(level, weight(), None)
    x, bias = torch.randn(3, SHAPE[1]), torch.randn(SHAPE[0])
    W = compose.decompress(level, state, SHAPE, torch.float32)
    y = compose.operator(level, state, bias, SHAPE, torch.float32)(x)
    assert torch.allclose(y, x @ W.T + bias, atol=1e-4)


def test_corrections_of_the_bias_add_up():
    level = compose.normalize("scaled + scaled")
    state = compose.compress(level, weight(), None)
    fix = compose.bias_fix(level, state)
    assert torch.allclose(fix, 0.75 * weight()[:, 0])
    x, bias = torch.randn(3, SHAPE[1]), torch.randn(SHAPE[0])
    W = compose.decompress(level, state, SHAPE, torch.float32)
    y = compose.operator(level, state, bias, SHAPE, torch.float32)(x)
    assert torch.allclose(y, x @ W.T + bias + fix, atol=1e-4)


def test_a_second_term_repairs_the_first():
    rough = compose.normalize("rtn:bits=2,group_size=32")
    repaired = compose.normalize("rtn:bits=2,group_size=32 + rtn:bits=2,group_size=32")

    def error(level):
        state = compose.compress(level, weight(), None)
        return float((compose.decompress(level, state, SHAPE, torch.float32) - weight()).norm())

    assert error(repaired) < 0.4 * error(rough)


def test_many_levels_are_what_each_is_alone_in_the_order_asked_for():
    texts = [
        "gptq:bits=3,group_size=32 + scaled",
        "dense",
        "rtn:bits=4,group_size=32",
        "gptq:bits=3,group_size=32",
        "gptq:bits=2,group_size=32 + scaled + rtn:bits=2,group_size=64",
        "gptq:bits=3,group_size=32 + scaled:share=0.25",
    ]
    levels = [compose.normalize(text) for text in texts]
    Ws = [weight(0), weight(1)[:8]]
    many = compose.compress_many(levels, Ws, stats())
    for level, states in zip(levels, many, strict=True):
        for W, state in zip(Ws, states, strict=True):
            alone = compose.compress(level, W, stats())
            assert state.keys() == alone.keys()
            shape = (W.shape[0], W.shape[1])
            expected = compose.decompress(level, alone, shape, torch.float32)
            got = compose.decompress(level, state, shape, torch.float32)
            assert torch.allclose(got, expected, atol=1e-5)


def test_levels_that_begin_alike_share_the_beginning():
    texts = ["first + scaled:share=0.1", "first + scaled:share=0.2", "first", "first:share=0.9"]
    levels = [compose.normalize(text) for text in texts]
    compose.compress_many(levels, [weight(), weight(1)], None)
    # Two settings of `first` in one call, then both tails of the shared one in another.
    assert CALLS == [("first", 2, 2), ("scaled", 2, 2)]


def test_states_of_levels_that_share_a_term_are_separate_dictionaries():
    levels = [compose.normalize(text) for text in ("scaled", "scaled + scaled")]
    (short,), (long,) = compose.compress_many(levels, [weight()], None)
    assert set(short) == {"kept", "of_ten"} and len(long) == 4


@pytest.mark.parametrize("scales", ["tensor", "channels"])
def test_a_weight_too_large_for_what_a_level_stores_is_refused(scales):
    level = compose.normalize(f"trellis:bits=2,state_bits=6,feedback=none,scales={scales}")
    W = torch.full((16, 32), 3e38)
    with pytest.raises(ValueError, match=r"cannot hold a weight of shape \(16, 32\).* is 3e\+38"):
        compose.compress(level, W, None)


def test_a_tensor_name_that_looks_like_a_term_number_is_refused(monkeypatch):
    monkeypatch.setattr(Scaled, "compress", lambda self, W, stats, **kw: {"kept_1": W})
    with pytest.raises(ValueError, match="scaled calls a tensor 'kept_1'"):
        compose.compress(compose.normalize("scaled"), weight(), None)


@pytest.mark.parametrize(
    "text, message",
    [
        ("trellis:bits=2,damp=nan", "needs a finite damp, got damp=nan"),
        ("gptq:bits=2,group_size=32,damp=inf", "needs a finite damp, got damp=inf"),
        ("scaled + first", "first cannot follow another term"),
        ("dense + scaled", "dense leaves no error to compress"),
        ("rtn:bits=4,group_size=32 + dense", "dense cannot follow another term"),
        ("nosuch", "unknown method 'nosuch'"),
        ("scaled:shaer=0.5", "no parameter 'shaer', did you mean 'share'"),
        ("scaled:share=much", "scaled needs share to be float, got share=much"),
        ("rtn:bits=4,group_size=32,clip=1", "rtn needs clip to be bool, got clip=1"),
        ("rtn:bits=4.0,group_size=32", "rtn needs bits to be int, got bits=4.0"),
    ],
)
def test_levels_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        compose.normalize(text)


def test_defaults_are_left_out_and_integers_become_floats():
    assert str(compose.normalize("scaled:share=0.5")) == "scaled"
    assert str(compose.normalize("scaled:share=1")) == "scaled:share=1.0"
    spelt = "gptq:clip=true,damp=0.03,sink=0.2,symmetric=false,group_size=64,bits=3"
    assert str(compose.normalize(spelt)) == "gptq:bits=3,group_size=64"


def test_needs_stats_is_asked_of_every_term():
    assert not compose.needs_stats(compose.normalize("rtn:bits=3,group_size=32 + scaled"))
    assert compose.needs_stats(compose.normalize("scaled + gptq:bits=3,group_size=32"))


def test_check_shape_is_asked_of_every_term():
    level = compose.normalize("scaled + rtn:bits=3,group_size=48")
    with pytest.raises(ValueError, match="group_size=48 does not divide the 64 inputs"):
        compose.check_shape(level, SHAPE)
