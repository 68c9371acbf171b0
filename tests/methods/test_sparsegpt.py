"""SparseGPT against its baselines, a textbook, and its own counts."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods import compose, sparsegpt
from hf_evopress.methods.maths.grid import dequantize, find_grid, quantize
from hf_evopress.methods.maths.linalg import DAMP, Stats

ROWS, COLUMNS = 24, 192


def layer(seed=0, *, rows=ROWS, columns=COLUMNS):
    """Return a weight and the statistics of correlated inputs with a loud position 0."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5
    X = torch.randn(2000, columns, generator=g) @ (mix + 0.5 * torch.eye(columns))
    first = torch.randn(8, columns, generator=g) * 0.1 + 3 * torch.randn(columns, generator=g)
    stats = Stats(X.T @ X / 2000, first.T @ first / 8, None, 2000)
    return torch.randn(rows, columns, generator=g), stats


def made(level, W, stats):
    level = compose.normalize(level)
    return compose.compress(level, W, stats)


def weight(level, W, stats):
    state = made(level, W, stats)
    return compose.decompress(compose.normalize(level), state, tuple(W.shape), torch.float32)


def loss(W, W_hat, stats):
    """Return tr(dW H dW^T), the calibration loss of a layer."""
    d = (W - W_hat).double()
    return float(((d @ stats.hessian().double()) * d).sum())


def textbook(W, mask, H, damp=DAMP):
    """Optimal brain surgeon one column at a time for a given mask, in float64, no blocks."""
    W, H = W.double().clone(), H.double().clone()
    H += damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    inverse, result = torch.linalg.inv(H), torch.zeros_like(W)
    for j in range(W.shape[1]):
        result[:, j] = (W[:, j].half() * mask[:, j]).double()
        error = (W[:, j] - result[:, j]) / inverse[j, j]
        W[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


@pytest.mark.parametrize("share", ["sparsity=0.3", "sparsity=0.5", "sparsity=0.8", "pattern=2:4"])
def test_it_beats_wanda_and_wanda_beats_magnitude_on_the_calibration_loss(share):
    W, stats = layer()
    stats.gram[:, :32] *= 4
    stats.gram[:32] *= 4  # some inputs are louder than others
    losses = [
        loss(W, weight(f"{name}:{share}", W, stats), stats)
        for name in ("sparsegpt", "wanda", "magnitude")
    ]
    assert losses == sorted(losses)
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("share", ["sparsity=0.5", "sparsity=0.9", "pattern=2:4", "pattern=1:8"])
def test_kept_weights_are_the_textbooks(share):
    W, stats = layer()
    got = weight(f"sparsegpt:{share}", W, stats)
    slow = textbook(W, got != 0, stats.hessian())
    assert torch.allclose(got.double(), slow, rtol=2e-3, atol=1e-3)


def test_n_m_keeps_the_best_of_each_group_as_they_stand_when_the_loop_arrives():
    W, stats = layer(rows=1)
    H = stats.hessian().double()
    H += DAMP * H.diagonal().mean() * torch.eye(COLUMNS)
    inverse, current, chosen = torch.linalg.inv(H), W.double().clone(), []
    diagonal = stats.inverse_factor().diagonal().double()
    for j in range(COLUMNS):
        if j % 4 == 0:
            score = (current[0, j : j + 4] / diagonal[j : j + 4]).abs()
            chosen.append(score >= score.sort(descending=True).values[1])
        new = current[0, j].half().double() if chosen[-1][j % 4] else 0.0
        error = (current[0, j] - new) / inverse[j, j]
        current[0, j + 1 :] -= error * inverse[j, j + 1 :]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    assert torch.equal(weight("sparsegpt:pattern=2:4", W, stats)[0] != 0, torch.cat(chosen))


@pytest.mark.parametrize("sparsity", [0.01, 0.25, 1 / 3, 0.5, 0.777, 0.99])
@pytest.mark.parametrize("bits", ["", ",bits=4,group_size=48"])
def test_the_number_of_kept_weights_is_exact(sparsity, bits):
    W, stats = layer(rows=7)
    level = compose.normalize(f"sparsegpt:sparsity={sparsity}{bits}")
    mask = made(level, W, stats)["mask"]
    ones = sum(int((mask >> k & 1).sum()) for k in range(8))
    assert ones == W.numel() - round(W.numel() * sparsity)


def test_every_block_of_inputs_has_the_same_sparsity_and_rows_differ():
    W, stats = layer(columns=512)
    W[:4] *= 10
    kept = weight("sparsegpt:sparsity=0.6", W, stats) != 0
    by_block = kept.unflatten(1, (4, 128)).float().mean((0, 2))
    assert (by_block - 0.4).abs().max() < 1 / (128 * ROWS)
    assert kept[:4].float().mean() > 0.8


@pytest.mark.parametrize("group_size", [16, 24, 48, 96, 192, -1])
@pytest.mark.parametrize("share", ["sparsity=0.5", "pattern=2:4"])
def test_joint_rounding_is_better_than_pruning_first_and_rounding_after(share, group_size):
    W, stats = layer(rows=64)
    coded = f"bits=3,group_size={group_size}"
    joint = loss(W, weight(f"sparsegpt:{share},{coded}", W, stats), stats)
    pruned = weight(f"sparsegpt:{share}", W, stats)
    after = loss(W, weight(f"rtn:{coded}", pruned, None), stats)
    assert loss(W, pruned, stats) < joint < after


def test_more_bits_and_less_sparsity_lower_the_loss():
    W, stats = layer()

    def at(sparsity, bits):
        level = f"sparsegpt:sparsity={sparsity},bits={bits},group_size=32"
        return loss(W, weight(level, W, stats), stats)

    by_bits = [at(0.3, bits) for bits in (2, 3, 4, 6)]
    by_sparsity = [at(s, 4) for s in (0.8, 0.6, 0.4, 0.2)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_sparsity == sorted(by_sparsity, reverse=True)


def test_a_grid_is_that_of_the_kept_weights():
    """One group per row, found up front: what is pruned has no say in its range."""
    W, stats = layer(columns=96)
    U = stats.inverse_factor()
    scores = W.square() * U.diagonal() ** -2
    kept = W * (scores > scores.flatten().kthvalue(W.numel() - W.numel() // 4).values)
    scale, zero = find_grid(kept, 15.0, weight=U.diagonal() ** -2)
    state = made("sparsegpt:sparsity=0.75,bits=4,group_size=-1", W, stats)
    assert torch.equal(state["scales"][:, 0].float(), scale)
    q = quantize(kept, scale[:, None], zero[:, None], 15.0)
    assert (dequantize(q, scale[:, None], zero[:, None])[kept == 0] == 0).all()


def test_the_sink_moment_lowers_the_error_at_position_0():
    W, stats = layer()

    def at_position_0(level):
        d = W - weight(level, W, stats)
        return float(((d @ stats.sink) * d).sum())

    plain = at_position_0("sparsegpt:sparsity=0.5,sink=0.0")
    assert at_position_0("sparsegpt:sparsity=0.5") < 0.5 * plain


def test_many_settings_and_weights_are_made_as_if_alone():
    Ws, stats = [layer(seed)[0] for seed in (1, 2)], layer()[1]
    texts = [f"sparsegpt:sparsity={s}" for s in (0.3, 0.5, 0.7)]
    texts += [f"sparsegpt:sparsity={s},bits={b},group_size=32" for s, b in ((0.5, 4), (0.7, 3))]
    texts += ["sparsegpt:pattern=2:4", "sparsegpt:pattern=4:8,bits=4,group_size=32"]
    levels = [compose.normalize(text) for text in texts]
    for level, states in zip(levels, compose.compress_many(levels, Ws, stats), strict=True):
        for W, state in zip(Ws, states, strict=True):
            alone = compose.compress(level, W, stats)
            assert state.keys() == alone.keys()
            a, b = (compose.decompress(level, s, W.shape, torch.float32) for s in (state, alone))
            assert ((a != 0) == (b != 0)).float().mean() > 0.99, level
            assert loss(W, a, stats) == pytest.approx(loss(W, b, stats), rel=0.01)


def test_a_weight_too_large_for_one_pass_is_made_in_parts_with_an_exact_count(monkeypatch):
    W, stats = layer()
    levels = [compose.normalize(f"sparsegpt:sparsity={s}") for s in (0.55, 0.7)]
    whole = [s[0] for s in compose.compress_many(levels, [W], stats)]
    monkeypatch.setattr(sparsegpt, "MAX_VALUES", 7 * COLUMNS)
    parts = [s[0] for s in compose.compress_many(levels, [W], stats)]
    for level, a, b in zip(levels, whole, parts, strict=True):
        assert a["values"].shape == b["values"].shape
        a, b = (compose.decompress(level, s, W.shape, torch.float32) for s in (a, b))
        assert loss(W, b, stats) < 1.1 * loss(W, a, stats)


def test_the_hessian_is_factored_once_for_all_levels(monkeypatch):
    from hf_evopress.methods.maths import linalg

    calls = []
    factor = linalg._inverse_factor
    monkeypatch.setattr(linalg, "_inverse_factor", lambda *a: calls.append(a) or factor(*a))
    W, stats = layer()
    texts = ("sparsity=0.5", "pattern=2:4", "sparsity=0.5,bits=3,group_size=32")
    levels = [compose.normalize(f"sparsegpt:{x}") for x in texts]
    compose.compress_many([*levels, compose.normalize("gptq:bits=3,group_size=32")], [W, W], stats)
    assert len(calls) == 1


def test_a_residual_of_low_rank_lowers_what_is_left():
    W, stats = layer()
    level = "sparsegpt:sparsity=0.5,bits=4,group_size=64"
    alone = loss(W, weight(level, W, stats), stats)
    assert loss(W, weight(f"{level} + lowrank:rank=4", W, stats), stats) < 0.95 * alone


def test_dead_inputs_and_zero_rows_survive():
    W, stats = layer()
    W[0] = 0.0
    dead = torch.tensor([0, 5, 130])
    stats.gram[dead] = stats.sink[dead] = 0
    stats.gram[:, dead] = stats.sink[:, dead] = 0
    for level in ("sparsity=0.5", "pattern=2:4", "sparsity=0.5,bits=3,group_size=32"):
        got = weight(f"sparsegpt:{level}", W, stats)
        assert torch.isfinite(got).all()
        assert torch.equal(got[0], W[0])
