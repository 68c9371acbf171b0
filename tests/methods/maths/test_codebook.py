"""Codebooks: Gaussian, exact in half precision, and known by a formula."""

from __future__ import annotations

import struct

import pytest
import torch

from hf_evopress.methods.maths.codebook import (
    CODEBOOKS,
    codebook,
    spread,
    weyl_half,
    weyl_multiplier,
)
from hf_evopress.methods.maths.viterbi import encode


def half(bits):
    return struct.unpack("<e", struct.pack("<H", bits))[0]


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_values_are_half_precision_numbers_of_about_unit_width(name, bits):
    values = codebook(name, 12, bits)
    assert values.shape == (4096,) and values.dtype == torch.float32
    assert torch.equal(values.half().float(), values)
    assert abs(float(values.mean())) < 0.05
    assert 0.95 < spread(name, 12, bits) < 1.3


@pytest.mark.parametrize("state", [0, 1, 77, 4095])
def test_computed_values_are_their_formulas(state):
    x = 0x83DCD12D * state % 2**32
    expected = half(0x6400 + sum(x.to_bytes(4, "little"))) * half(0x1EEE) + half(0xC931)
    assert float(codebook("mul1", 12, 2)[state]) == pytest.approx(expected, abs=2e-3)
    for name, x in (("3inst", 89226354 * state + 64248484), ("mcg", 0xCBAC1FED * state)):
        y = (x % 2**32 & 0x8FFF8FFF) ^ 0x3B603B60
        expected = half(y & 0xFFFF) + half(y >> 16)
        assert float(codebook(name, 12, 2)[state]) == pytest.approx(expected, abs=2e-3)


def test_weyl_is_a_polynomial_of_the_multiples_of_one_number():
    def times(x, y):
        return (x * y + 2**14) // 2**15

    for state_bits, bits in ((4, 2), (12, 3), (16, 4)):
        a = (0x50E42 >> (16 + bits - state_bits)) % 2**state_bits | 1
        values = codebook("weyl", state_bits, bits)
        for state in (0, 1, 7, 2**state_bits - 1):
            t = a * state % 2**state_bits * 2 ** (16 - state_bits) + weyl_half(state_bits)
            t = t - 2**16 * (t >= 2**15) if state_bits < 16 else (t - 1 | 1) - 2**16 * (t > 2**15)
            t4 = times(times(t, t), times(t, t))
            t16 = times(times(t4, t4), times(t4, t4))
            inner = times(t4, 381 + times(times(t16, t16), 489))
            assert float(values[state]) == times(t, 666 + inner) / 512


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weyl_follows_one_past_by_numbers_evenly_apart(bits):
    multiplier, n = weyl_multiplier(12, bits), 2**12
    after = torch.arange(n).view(-1, 2**bits) * multiplier % n  # of one past each
    after = after.sort(1).values
    gaps = torch.cat([after[:, 1:], after[:, :1] + n], 1) - after
    assert gaps.min() > 0.75 * n / 2**bits and gaps.max() < 1.8 * n / 2**bits


def test_weyl_is_as_near_to_gaussian_numbers_as_strata():
    x = torch.randn(12, 256, generator=torch.Generator().manual_seed(0))
    left = {}
    for name in ("strata", "weyl", "mul1"):
        values = codebook(name, 8, 3)
        gain = 1.09 / spread(name, 8, 3)
        states = encode(x / gain, values, 3, tail_biting=True).long()
        left[name] = float((x - gain * values[states]).square().mean())
    assert left["weyl"] < left["strata"] < left["mul1"]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_states_after_one_past_lie_in_different_strata(bits):
    values = codebook("strata", 10, bits)
    rank = values.argsort().argsort()  # halves near zero are all different at 2^10 states
    strata = (rank >> (10 - bits)).view(-1, 2**bits).sort(1).values
    assert torch.equal(strata, torch.arange(2**bits).expand_as(strata))


@pytest.mark.parametrize("name", ["strata", "gauss"])
def test_tables_deal_out_the_same_quantiles(name):
    values = codebook(name, 8, 3).sort().values
    assert torch.equal(values, codebook("gauss", 8, 1).sort().values)
    assert torch.allclose(values, -values.flip(0))


FROZEN = [
    -1.8623046875,
    -0.5791015625,
    0.07843017578125,
    0.7763671875,
    -1.318359375,
    -0.40234375,
    0.2371826171875,
    1.009765625,
    -0.2371826171875,
    -1.009765625,
    1.318359375,
    0.40234375,
    -0.07843017578125,
    -0.7763671875,
    1.8623046875,
    0.5791015625,
]


def test_the_table_never_changes():
    assert codebook("strata", 4, 2).tolist() == FROZEN


def test_an_unknown_codebook_is_refused():
    with pytest.raises(ValueError, match="no codebook 'gaus'; known: strata, gauss"):
        codebook("gaus", 8, 2)
