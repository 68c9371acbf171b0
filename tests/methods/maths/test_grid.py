"""Grids of groups: what a scale and a zero point may be, and what rounding then loses."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods.maths.grid import dequantize, find_grid, quantize, round_scale


def rounded(W, maxq, **options):
    scale, zero = find_grid(W, maxq, **options)
    limit = maxq if isinstance(maxq, float) else maxq.unsqueeze(-1)
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    return dequantize(quantize(W, scale, zero, limit), scale, zero)


def weights(rows=40, g=32, seed=0):
    return torch.randn(rows, g, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_scales_are_exact_in_the_dtype_they_are_stored_in(dtype, symmetric):
    scale, _ = find_grid(weights(), 7.0, symmetric=symmetric, scale_dtype=dtype)
    assert torch.equal(scale.to(dtype).float(), scale)


@pytest.mark.parametrize("offset", [-5.0, 0.0, 5.0])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_are_codes(bits, offset):
    maxq = 2.0**bits - 1
    _, zero = find_grid(weights() + offset, maxq)
    assert torch.equal(zero, zero.round())
    assert zero.min() >= 0 and zero.max() <= maxq


@pytest.mark.parametrize("offset", [-5.0, 0.0, 5.0])
def test_zero_is_always_on_the_grid(offset):
    W = weights() + offset
    scale, zero = find_grid(W, 7.0)
    nothing = torch.zeros_like(scale)
    assert torch.equal(dequantize(quantize(nothing, scale, zero, 7.0), scale, zero), nothing)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_unclipped_rounding_errs_by_half_a_step_at_most(bits):
    W = weights()
    scale, _ = find_grid(W, 2.0**bits - 1, clip=False)
    error = (rounded(W, 2.0**bits - 1, clip=False) - W).abs()
    # The zero point is rounded too, which costs the end of the range up to half a step more.
    assert (error <= scale.unsqueeze(-1) * 1.01).all()
    assert error.mean() < 0.3 * scale.mean()


def test_symmetric_grids_have_their_zero_in_the_middle():
    _, zero = find_grid(weights(), 15.0, symmetric=True)
    assert (zero == 8).all()


@pytest.mark.parametrize("bits", [2, 3])
def test_clip_search_never_raises_its_own_error(bits):
    W = weights()
    maxq = 2.0**bits - 1
    plain = (rounded(W, maxq, clip=False) - W).abs().pow(2.4).sum(-1)
    clipped = (rounded(W, maxq) - W).abs().pow(2.4).sum(-1)
    assert (clipped <= plain + 1e-6).all()
    assert clipped.sum() < 0.95 * plain.sum()


def test_a_weighted_clip_search_serves_the_heavy_inputs():
    W = weights()
    heavy = torch.ones(32)
    heavy[:4] = 100.0
    light = ((rounded(W, 3.0) - W).pow(2) * heavy).sum()
    assert ((rounded(W, 3.0, weight=heavy) - W).pow(2) * heavy).sum() < light


def test_rows_of_different_bits_are_found_as_if_alone():
    W = weights(rows=3)
    mixed = rounded(W, torch.tensor([3.0, 7.0, 15.0]))
    alone = [rounded(W[i : i + 1], maxq)[0] for i, maxq in enumerate((3.0, 7.0, 15.0))]
    assert torch.equal(mixed, torch.stack(alone))


@pytest.mark.parametrize("value", [0.01, -0.01, 3.0, -1000.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_constant_group_keeps_its_value(value, symmetric):
    W = torch.full((2, 32), value)
    # Symmetric grids have no code for the upper end of the range: half a step is lost there.
    within = 0.08 if symmetric else 1e-3
    assert torch.allclose(rounded(W, 15.0, symmetric=symmetric), W, rtol=within)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_group_of_zeros_stays_zero(symmetric):
    W = torch.zeros(2, 32)
    assert torch.equal(rounded(W, 7.0, symmetric=symmetric), W)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-7, 1e6])
def test_scales_neither_vanish_nor_overflow(size, dtype):
    W = weights() * size
    scale, _ = find_grid(W, 7.0, scale_dtype=dtype)
    result = rounded(W, 7.0, scale_dtype=dtype)
    assert (scale > 0).all() and torch.isfinite(scale.to(dtype)).all()
    assert torch.isfinite(result).all()
    assert (result.abs() <= 2 * W.abs().max()).all()


def test_a_scale_that_underflows_takes_the_smallest_number_of_its_dtype():
    tiny, huge = torch.tensor([1e-12]), torch.tensor([1e12])
    assert round_scale(tiny, torch.float16).half().item() == 2.0**-24
    assert round_scale(huge, torch.float16).item() == torch.finfo(torch.float16).max
