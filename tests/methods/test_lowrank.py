"""The low-rank family: the closed form against its references, ranks, bytes, runtime."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_evopress.methods import compose
from hf_evopress.methods.lowrank import LowRank, spectrum
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.plans.level import Level

SHAPES = [(24, 64), (64, 24), (32, 32)]


def make_inputs(columns: int, *, n: int = 400, seed: int = 0) -> Tensor:
    """Return X (n, columns) float64 whose inputs are correlated and not centred."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g, dtype=torch.float64)
    scale = torch.logspace(0, -2, columns, dtype=torch.float64)
    return (torch.randn(n, columns, generator=g, dtype=torch.float64) * scale) @ mix + 0.5


def make_stats(X: Tensor, *, sink: Tensor | None = None) -> Stats:
    moment = None if sink is None else (sink.T @ sink / len(sink)).float()
    return Stats((X.T @ X / len(X)).float(), moment, X.mean(0).float(), len(X))


def make_weight(shape: tuple[int, int], *, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(W: Tensor, stats: Stats | None, level: str) -> Tensor:
    parsed = compose.normalize(level)
    state = compose.compress(parsed, W, stats)
    return compose.decompress(parsed, state, tuple(W.shape), torch.float32)


def loss(delta: Tensor, X: Tensor) -> float:
    return float((X @ delta.double().T).square().sum() / len(X))


@pytest.mark.parametrize("shape", SHAPES)
def test_whitened_equals_the_svd_of_the_whitened_weight(shape: tuple[int, int]) -> None:
    X, W = make_inputs(shape[1]), make_weight(shape)
    L = torch.linalg.cholesky(make_stats(X).gram.double())
    U, S, Vt = torch.linalg.svd(W.double() @ L, full_matrices=False)
    reference = torch.linalg.solve(L.T, ((U[:, :6] * S[:6]) @ Vt[:6]).T).T  # SVD-LLM
    got = low_rank(W, make_stats(X), "lowrank:rank=6")
    assert torch.allclose(got.double(), reference, atol=2e-3 * float(reference.abs().max()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", ["whitened", "plain"])
def test_the_spectrum_is_the_error_of_every_rank(shape: tuple[int, int], metric: str) -> None:
    X, W = make_inputs(shape[1]), make_weight(shape)
    stats = make_stats(X)
    values = spectrum(W, stats, metric=metric)
    assert values.shape == (min(shape),)
    for rank in (1, 5, 20):
        delta = W - low_rank(W, stats, f"lowrank:rank={rank},metric={metric}")
        left = loss(delta, X) if metric == "whitened" else float(delta.square().sum())
        assert left == pytest.approx(float(values[rank:].sum()), rel=2e-2)


def test_each_metric_is_best_at_its_own_error() -> None:
    X, W = make_inputs(64), make_weight((24, 64))
    stats = make_stats(X)
    deltas = {
        m: W - low_rank(W, stats, f"lowrank:rank=8,metric={m}") for m in ("whitened", "plain")
    }
    assert loss(deltas["whitened"], X) < 0.7 * loss(deltas["plain"], X)
    assert deltas["plain"].norm() < deltas["whitened"].norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_ranks_are_nested_slices_of_the_largest(shape: tuple[int, int]) -> None:
    W, stats = make_weight(shape), make_stats(make_inputs(shape[1]))
    levels = [compose.normalize(f"lowrank:rank={r}") for r in (3, 16)]
    (small,), (large,) = compose.compress_many(levels, [W], stats)
    assert torch.equal(small["A"], large["A"][:3])
    assert torch.equal(small["B"], large["B"][:, :3])


def test_all_ranks_take_one_eigendecomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: calls.append(1) or eigh(M))
    levels = [compose.normalize(f"lowrank:rank={r}") for r in (2, 4, 8, 16)]
    compose.compress_many(levels, [make_weight((24, 64))], make_stats(make_inputs(64)))
    assert len(calls) == 1


@pytest.mark.parametrize("shape", [(24, 64), (128, 64)])
def test_a_singular_gram_does_no_harm(shape: tuple[int, int]) -> None:
    X, W = make_inputs(64, n=10), make_weight(shape)
    got = low_rank(W, make_stats(X), "lowrank:rank=12")
    assert loss(W - got, X) < 1e-4 * loss(W, X)
    assert float(got.abs().max()) < 10 * float(W.abs().max())  # no 1 / sqrt(0) anywhere


def test_a_following_term_is_the_best_answer_to_the_error() -> None:
    X, W = make_inputs(64), make_weight((24, 64))
    stats = make_stats(X)
    delta = W - low_rank(W, stats, "rtn:bits=3,group_size=32")
    both = W - low_rank(W, stats, "rtn:bits=3,group_size=32 + lowrank:rank=6")
    assert loss(both, X) == pytest.approx(float(spectrum(delta, stats)[6:].sum()), rel=1e-2)


def test_centring_with_the_bias_corrected_beats_not_centring() -> None:
    X, W = make_inputs(64) + 2.0, make_weight((24, 64))
    stats, errors = make_stats(X), {}
    for centred in (False, True):
        level = compose.normalize(f"lowrank:rank=6,centred={str(centred).lower()}")
        state = compose.compress(level, W, stats)
        run = compose.operator(level, state, torch.ones(24), (24, 64), torch.float32)
        errors[centred] = float((run(X.float()) - 1 - X.float() @ W.T).square().sum())
    assert errors[True] < errors[False]


def test_the_bias_correction_is_what_the_operator_adds() -> None:
    X, W = make_inputs(64), make_weight((24, 64))
    level = compose.normalize("rtn:bits=4,group_size=32 + lowrank:rank=4,centred=true")
    state = compose.compress(level, W, make_stats(X))
    run = compose.operator(level, state, None, (24, 64), torch.float32)
    fix = compose.bias_fix(level, state)
    assert fix is not None
    assert torch.allclose(run(torch.zeros(1, 64))[0], fix)


def test_sink_weight_lowers_the_error_at_position_zero() -> None:
    X, W = make_inputs(64), make_weight((24, 64))
    sink = 30 * make_inputs(64, n=50, seed=7)
    stats = make_stats(X, sink=sink)
    at_sink = [
        loss(W - low_rank(W, stats, f"lowrank:rank=8,sink={alpha}"), sink) for alpha in (0.0, 0.05)
    ]
    assert at_sink[1] < at_sink[0]


@pytest.mark.parametrize("text", LowRank.examples)
def test_declared_cost_is_the_bytes_stored(text: str) -> None:
    level = compose.normalize(text)
    state = compose.compress(level, make_weight((24, 64)), make_stats(make_inputs(64)))
    stored = sum(8 * t.numel() * t.element_size() for t in state.values())
    assert compose.cost_bits(level, (24, 64)) == stored
    empty = compose.empty(level, (24, 64), torch.bfloat16)
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {
        k: (v.shape, v.dtype) for k, v in empty.items()
    }


def test_eight_bit_factors_lose_next_to_nothing_and_four_bit_ones_little() -> None:
    X, W = make_inputs(64), make_weight((64, 64))
    stats = make_stats(X)
    exact, int8, int4 = (
        loss(W - low_rank(W, stats, f"lowrank:rank=16,factors={f}"), X)
        for f in ("float16", "int8", "int4")
    )
    assert int8 < 1.02 * exact
    assert int4 < 2 * exact


@pytest.mark.parametrize("text", LowRank.examples)
def test_the_operator_is_the_decompressed_weight(text: str) -> None:
    level, X = compose.normalize(text), make_inputs(64).float()
    state = compose.compress(level, make_weight((24, 64)), make_stats(X.double()))
    W = compose.decompress(level, state, (24, 64), torch.float32)
    fix = compose.bias_fix(level, state)
    wanted = X @ W.T + (0 if fix is None else fix)
    got = compose.operator(level, state, None, (24, 64), torch.float32)(X)
    assert torch.allclose(got, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_factors_get_gradients() -> None:
    level = compose.normalize("lowrank:rank=4,centred=true")
    state = compose.compress(level, make_weight((24, 64)), make_stats(make_inputs(64)))
    state = {k: v.float().requires_grad_() for k, v in state.items()}
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    compose.operator(level, state, None, (24, 64), torch.float32)(x).square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in state.values())


def test_huge_weights_do_not_overflow_half_factors() -> None:
    W = 1e7 * make_weight((24, 64))
    got = low_rank(W, None, "lowrank:rank=24,metric=plain")
    assert torch.allclose(got, W, atol=1e-2 * float(W.abs().max()))


def test_a_weight_of_zeros_stays_zero() -> None:
    for factors in ("float16", "int4"):
        got = low_rank(torch.zeros(24, 64), None, f"lowrank:rank=4,metric=plain,factors={factors}")
        assert not got.any()


def test_rank_above_the_shape_says_which_ranks_fit() -> None:
    with pytest.raises(ValueError, match=r"at most rank 24, got rank=25; above rank 17"):
        compose.check_shape(Level.parse("lowrank:rank=25"), (24, 64))


def test_only_the_plain_metric_does_without_calibration() -> None:
    assert not compose.needs_stats(compose.normalize("lowrank:rank=2,metric=plain"))
    assert compose.needs_stats(compose.normalize("lowrank:rank=2,metric=plain,centred=true"))
    assert compose.needs_stats(compose.normalize("lowrank:rank=2"))
    with pytest.raises(ValueError, match="needs calibration statistics"):
        compose.compress(compose.normalize("lowrank:rank=2"), make_weight((24, 64)), None)
