"""GPTQ against a textbook, and the traps that its published implementations fell into."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from hf_evopress.methods import compose, gptq
from hf_evopress.methods.maths.grid import dequantize, find_grid, quantize
from hf_evopress.methods.maths.linalg import DAMP, Stats

ROWS, COLUMNS = 24, 96


def layer(seed=0, *, rows=ROWS, columns=COLUMNS, sink=True):
    """Return a weight and the statistics of correlated inputs with a loud position 0."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=g) / columns**0.5
    X = torch.randn(2000, columns, generator=g) @ (mix + 0.5 * torch.eye(columns))
    first = torch.randn(8, columns, generator=g) * 0.1 + 3 * torch.randn(columns, generator=g)
    S = first.T @ first / 8 if sink else None
    stats = Stats(X.T @ X / 2000, S, None, 2000)
    return torch.randn(rows, columns, generator=g), stats


def decompressed(level, W, stats):
    level = compose.normalize(level)
    state = compose.compress(level, W, stats)
    return compose.decompress(level, state, tuple(W.shape), torch.float32)


def loss(W, W_hat, H):
    """Return tr(dW H dW^T), the calibration loss of a layer."""
    d = (W - W_hat).double()
    return float(((d @ H.double()) * d).sum())


def textbook(W, H, bits, group_size, damp):
    """Optimal brain quantisation one column at a time, in float64, no blocks, no factor.

    The inverse Hessian of the columns that are left is updated by Gaussian elimination,
    Frantar et al. 2022 eq. 3; scales are found from the weights as they are by then.
    """
    W, H = W.double().clone(), H.double().clone()
    H += damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    inverse, maxq, result = torch.linalg.inv(H), 2.0**bits - 1, torch.empty_like(W)
    for j in range(W.shape[1]):
        if j % group_size == 0:
            scale, zero = find_grid(W[:, j : j + group_size].float(), maxq, clip=False)
        w = W[:, j].float()
        result[:, j] = dequantize(quantize(w, scale, zero, maxq), scale, zero).double()
        error = (W[:, j] - result[:, j]) / inverse[j, j]
        W[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return result


@pytest.mark.parametrize("group_size", [8, 16, 24, 32, 48, 96, 192, 384])
@pytest.mark.parametrize("bits", [2, 4])
def test_gptq_is_the_textbook_whatever_the_group_and_block_sizes(bits, group_size):
    """384 columns: several blocks, groups smaller and larger than a block and cut unevenly."""
    W, stats = layer(columns=384, rows=12)
    level = f"gptq:bits={bits},group_size={group_size},clip=false"
    got = decompressed(level, W, stats).double()
    slow = textbook(W, stats.hessian(), bits, group_size, DAMP)
    # float32 against float64 turns a few ties, and what follows in that row: rows, not codes.
    exact = (got - slow).abs().amax(1) < 1e-5
    assert exact.float().mean() >= 0.75
    H = stats.hessian()
    assert loss(W, got, H) == pytest.approx(loss(W, slow, H), rel=0.03)


def test_a_whole_row_takes_its_scale_before_any_update():
    W, stats = layer()
    level = compose.normalize("gptq:bits=4,group_size=-1")
    state = compose.compress(level, W, stats)
    weight = stats.inverse_factor().diagonal() ** -2
    scale, _ = find_grid(W, 15.0, weight=weight)
    assert torch.equal(state["scales"][:, 0].float(), scale)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("options", ["", ",symmetric=true", ",clip=false", ",scales=bfloat16"])
def test_gptq_is_no_worse_than_rtn_on_the_calibration_loss(bits, options):
    W, stats = layer()
    level = f"bits={bits},group_size=32{options}"
    H = stats.hessian()
    rounded = loss(W, decompressed(f"rtn:{level}", W, None), H)
    assert loss(W, decompressed(f"gptq:{level}", W, stats), H) <= rounded


def test_more_bits_and_smaller_groups_lower_the_loss():
    W, stats = layer()
    H = stats.hessian()

    def at(bits, group_size):
        return loss(W, decompressed(f"gptq:bits={bits},group_size={group_size}", W, stats), H)

    by_bits = [at(bits, 32) for bits in (2, 3, 4, 5, 6, 7, 8)]
    assert by_bits == sorted(by_bits, reverse=True)
    assert at(3, 16) < at(3, 32) < at(3, -1)


def test_clip_search_lowers_the_loss_at_two_bits():
    W, stats = layer(rows=64)
    H = stats.hessian()
    plain = loss(W, decompressed("gptq:bits=2,group_size=32,clip=false", W, stats), H)
    assert loss(W, decompressed("gptq:bits=2,group_size=32", W, stats), H) < 0.95 * plain


def test_the_sink_moment_lowers_the_error_at_position_0():
    W, stats = layer()
    with_sink = decompressed("gptq:bits=3,group_size=32", W, stats)
    without = decompressed("gptq:bits=3,group_size=32,sink=0.0", W, stats)
    assert loss(W, with_sink, stats.sink) < 0.5 * loss(W, without, stats.sink)
    assert loss(W, with_sink, stats.gram) < 1.3 * loss(W, without, stats.gram)


def test_statistics_without_a_sink_moment_will_do():
    W, stats = layer(sink=False)
    level = "gptq:bits=3,group_size=32"
    assert torch.equal(decompressed(level, W, stats), decompressed(level + ",sink=0.0", W, stats))


def test_the_codes_stored_are_those_the_loop_scored(monkeypatch):
    """The loop's own w_hat, rebuilt from its codes and grids, is what decompress() returns."""
    seen = []
    solve = gptq._solve

    def spy(*args, **kwargs):
        seen.append(solve(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(gptq, "_solve", spy)
    W, stats = layer()
    got = decompressed("gptq:bits=3,group_size=32", W, stats)
    ((codes, scale, zero),) = seen
    expected = dequantize(codes.view(3, 32, ROWS), scale.unsqueeze(1), zero.unsqueeze(1))
    assert torch.equal(got, expected.reshape(COLUMNS, ROWS).T)


def test_all_bit_widths_in_one_loop_are_as_if_alone():
    Ws = [layer(seed)[0] for seed in (1, 2)]
    stats = layer()[1]
    bits = (2, 3, 4, 5, 6, 8)
    levels = [compose.normalize(f"gptq:bits={b},group_size=32") for b in bits]
    levels.append(compose.normalize("gptq:bits=3,group_size=16,symmetric=true"))
    for level, states in zip(levels, compose.compress_many(levels, Ws, stats), strict=True):
        for W, state in zip(Ws, states, strict=True):
            alone = compose.compress(level, W, stats)
            for name, tensor in alone.items():
                assert (state[name] == tensor).float().mean() > 0.98, (level, name)


def test_layers_too_large_for_one_pass_are_made_in_parts(monkeypatch):
    W, stats = layer()
    levels = [compose.normalize(f"gptq:bits={b},group_size=32") for b in (2, 4)]
    whole = compose.compress_many(levels, [W[:10], W[10:]], stats)
    monkeypatch.setattr(gptq, "MAX_VALUES", 7 * 2 * COLUMNS)
    parts = compose.compress_many(levels, [W[:10], W[10:]], stats)
    for a, b in zip(chain(*whole), chain(*parts), strict=True):
        assert all((a[name] == b[name]).float().mean() > 0.98 for name in a)


def test_the_hessian_is_factored_once_for_all_levels(monkeypatch):
    from hf_evopress.methods.maths import linalg

    calls = []
    factor = linalg._inverse_factor
    monkeypatch.setattr(linalg, "_inverse_factor", lambda *a: calls.append(a) or factor(*a))
    W, stats = layer()
    levels = ["gptq:bits=2,group_size=32", "gptq:bits=3,group_size=16", "gptq:bits=4,group_size=-1"]
    compose.compress_many([compose.normalize(x) for x in levels], [W, W], stats)
    assert len(calls) == 1


def test_inputs_that_are_never_on_are_rounded_and_harm_nobody():
    W, stats = layer(sink=False)
    dead = torch.tensor([0, 5, 40, 95])
    stats.gram[dead] = 0
    stats.gram[:, dead] = 0
    got = decompressed("gptq:bits=4,group_size=32", W, stats)
    assert torch.isfinite(got).all()
    assert (got - W)[:, dead].norm() < 0.25 * W[:, dead].norm()
    rounded = decompressed("rtn:bits=4,group_size=32", W, None)
    assert loss(W, got, stats.gram) < loss(W, rounded, stats.gram)


def test_fewer_tokens_than_inputs_are_enough_to_run():
    W, _ = layer()
    X = torch.randn(5, COLUMNS)
    stats = Stats(X.T @ X / 5, None, None, 5)
    got = decompressed("gptq:bits=3,group_size=32,damp=0.0", W, stats)
    assert torch.isfinite(got).all()
    assert (got - W).norm() < W.norm()


def test_constant_and_zero_rows_survive():
    W, stats = layer()
    W[0], W[1], W[2] = 0.0, 0.01, -3.0
    got = decompressed("gptq:bits=4,group_size=32", W, stats)
    assert torch.equal(got[0], W[0])
    assert torch.allclose(got[1:3], W[1:3], rtol=0.02)


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do():
    W, stats = layer(columns=576, rows=4)
    level = compose.normalize("gptq:bits=3,group_size=128")
    message = r"group_size=128 does not divide the 576 inputs .*\(4, 576\).*: 32, 64, 96, 192, -1"
    with pytest.raises(ValueError, match=message):
        compose.check_shape(level, (4, 576))
    with pytest.raises(ValueError, match=message):
        compose.compress(level, W, stats)


@pytest.mark.parametrize(
    "level, message",
    [
        ("gptq:bits=3", "gptq needs group_size="),
        ("gptq:group_size=32", "gptq needs bits="),
        ("gptq:bits=9,group_size=32", "gptq takes bits from 2, 3, 4, 5, 6, 7, 8; got bits=9"),
        ("gptq:bits=3,group_size=0", "group_size > 0, or -1"),
        ("gptq:bits=3,group_size=-2", "group_size >= -1"),
        ("gptq:bits=3,group_size=32,damp=-0.1", "damp >= 0"),
        ("gptq:bits=3,group_size=32,scales=float32", "scales from float16, bfloat16"),
        ("gptq:bits=3,groupsize=32", "did you mean 'group_size'"),
    ],
)
def test_wrong_parameters_are_refused(level, message):
    with pytest.raises(ValueError, match=message):
        compose.normalize(level)
