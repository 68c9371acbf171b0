"""A chunk of the cache: declared bytes, exact outliers, and errors that shrink as they should."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_evopress.methods.maths.gear import Gear, chunk_bytes, compress, decompress

PLAIN = Gear(bits=2, rank=0, outliers=0)
KINDS = pytest.mark.parametrize("is_key", [True, False], ids=["keys", "values"])


def chunk(*, batch: int = 2, heads: int = 3, tokens: int = 128, channels: int = 32) -> Tensor:
    """Keys as they are found: channels of other scales, some values far out, a low-rank part."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    X = random(batch, heads, tokens, channels) * (0.2 + random(1, heads, 1, channels).abs())
    X += random(batch, heads, tokens, 2) @ random(batch, heads, 2, channels)
    X[..., 0, :4] += 40.0
    return X


def round_trip(X: Tensor, gear: Gear, is_key: bool) -> Tensor:
    state = compress(X, gear, is_key=is_key)
    return decompress(state, X.shape, X.dtype, gear, is_key=is_key)


def error(X: Tensor, gear: Gear, is_key: bool) -> float:
    return float((round_trip(X, gear, is_key) - X).square().mean())


@KINDS
@pytest.mark.parametrize("bits", range(1, 9))
def test_what_is_declared_is_what_is_stored(is_key: bool, bits: int) -> None:
    for gear in (
        Gear(bits=bits),
        Gear(bits=bits, rank=0, group_size=32),
        replace(PLAIN, bits=bits),
    ):
        for X in (chunk(), chunk(batch=1, heads=1, channels=1), chunk(tokens=512, channels=40)):
            state = compress(X, gear, is_key=is_key)
            stored = sum(t.numel() * t.element_size() for t in state.values())
            assert stored == chunk_bytes(X.shape, gear, is_key=is_key)


@KINDS
def test_codes_take_their_bits(is_key: bool) -> None:
    X = chunk()
    for bits in (2, 3, 4):
        codes = compress(X, replace(PLAIN, bits=bits), is_key=is_key)["codes"]
        assert codes.dtype == torch.uint8 and codes.numel() * 8 == bits * X.numel()


@KINDS
def test_every_number_of_bits_uses_all_of_its_steps(is_key: bool) -> None:
    """The published code takes bits^2 - 1 steps: 8 of 7 at 3 bits, 63 of 255 at 8."""
    X = chunk()
    errors = [error(X, replace(PLAIN, bits=b), is_key) for b in range(1, 9)]
    ratios = [a / b for a, b in pairwise(errors[1:])]
    assert all(3.0 < ratio < 7.0 for ratio in ratios)  # (2^(b+1) - 1)^2 / (2^b - 1)^2


@KINDS
def test_each_part_lowers_the_error(is_key: bool) -> None:
    X = chunk()
    plain, low_rank = error(X, PLAIN, is_key), error(X, replace(PLAIN, rank=4), is_key)
    both = error(X, Gear(bits=2, rank=4, outliers=0.02), is_key)
    assert both < low_rank < plain and both < 0.5 * plain


@KINDS
def test_outliers_come_back_as_they_were(is_key: bool) -> None:
    X = chunk().bfloat16()
    back = round_trip(X, Gear(bits=1, rank=2, outliers=0.3), is_key)
    assert torch.equal(back[..., 0, :4], X[..., 0, :4])


@KINDS
def test_constant_and_single_numbers_are_exact(is_key: bool) -> None:
    for X in (torch.full((1, 2, 64, 16), 0.5), torch.zeros(1, 1, 64, 1)):
        assert torch.equal(round_trip(X, Gear(bits=2), is_key), X)


@KINDS
def test_numbers_beyond_float16_stay_finite(is_key: bool) -> None:
    X = chunk() * 1e5
    back = round_trip(X, Gear(bits=8), is_key)
    assert torch.isfinite(back).all() and (back - X).norm() < 0.02 * X.norm()


@KINDS
def test_it_is_deterministic_and_a_batch_changes_nothing(is_key: bool) -> None:
    X, gear = chunk(), Gear(bits=2)
    whole = round_trip(X, gear, is_key)
    assert torch.equal(whole, round_trip(X, gear, is_key))
    assert torch.allclose(whole[1:], round_trip(X[1:], gear, is_key), atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 9}, "1 to 8 bits"),
        ({"bits": 0}, "got bits=0"),
        ({"group_size": 12}, "multiple of 8"),
        ({"buffer": 40}, "multiple of group_size=64"),
        ({"rank": -1}, "rank is 0 or more"),
        ({"outliers": 0.5}, "share from 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Gear(**settings)
