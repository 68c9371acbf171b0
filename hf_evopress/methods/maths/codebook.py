"""What a state of a trellis code stands for: codebooks of 2^L values of about N(0, 1).

strata  the Gaussian quantiles Phi^-1((r + 1/2) / 2^L), rounded to half precision, dealt so that
        the 2^k states that follow one past u lie in 2^k different strata of equal probability, at
        the same place in each (set partitioning, Ungerboeck 1982): for state (u << k) | j
        r = ((j ^ (hash32(u) mod 2^k)) << (L - k)) | (u * a mod 2^(L - k)), a near 0.309 * 2^(L - k)
        and odd. As near to Gaussian weights as the random order with 4 times the states.
gauss   the same quantiles in a random order, that of hash32(state): for any rate k (QTIP).
mul1, mcg, 3inst   computed from the state s by integers modulo 2^32, for kernels without a table
        (QTIP, Tseng et al. 2024, arXiv:2406.11235, and its use in exllamav3):
        3inst   x = 89226354 s + 64248484, y = (x & 0x8FFF8FFF) ^ 0x3B603B60, the sum of y's two
                halves read as half-precision numbers;
        mcg     the same with x = 0xCBAC1FED s;
        mul1    x = 0x83DCD12D s, half(0x6400 + the sum of x's bytes) * half(0x1EEE)
                + half(0xC931).
weyl    computed as well, in integers of 16 bits, for vectors of CPUs, and nearer to Gaussian
        weights than strata at 2 to 4 bits: the multiples of a fraction a / 2^L modulo 1 (Weyl's
        sequence), through an odd polynomial near Phi^-1. With t = the signed 16 bits of
        (a s 2^(16 - L)) + half a step, a = 0x50E42 2^(L - 16 - k) mod 2^L, made odd, and
        x * y = (x y + 2^14) >> 15:
        value = t * (666 + t^4 * (381 + 489 * t^32)) / 512, t^32 by squaring five times.
        a is near 5.056 * 2^(L - k), so that the states that follow one past are about evenly
        apart: found by trying some hundred at 2 to 4 bits, 2^8 to 2^12 states. At 1.5 bits it is
        0x712E, at 2.5 bits 0x3B51, of 2^16: found in the same way.
At other half bits k is the whole number below, what even weights bring (walks.py). All values are
half-precision numbers, rounded once.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist

import torch
from torch import Tensor

from ...base.lasting import lasting
from .hashing import hash32, permutation

CODEBOOKS = ("strata", "gauss", "mul1", "mcg", "3inst", "weyl")
WEYL_STEP = 0x50E42
WEYL_STEPS = {1.5: 0x712E, 2.5: 0x3B51}
WEYL_POLYNOMIAL = (666, 381, 489)  # of t, t^5 and t^37
WEYL_UNIT = 512


@lru_cache(maxsize=32)
@lasting
def codebook(name: str, state_bits: int, bits: float, device: torch.device | None = None) -> Tensor:
    """Return the value of each of 2^state_bits states at `bits` per weight, float32."""
    n = 2**state_bits
    if name in ("strata", "gauss"):
        normal = NormalDist()
        quantiles = torch.tensor([normal.inv_cdf((r + 0.5) / n) for r in range(n)]).half()
        rank = permutation(n) if name == "gauss" else _strata(state_bits, int(bits))
        return quantiles.float()[rank].to(device)
    s = torch.arange(n, dtype=torch.int64)
    if name == "weyl":
        return _weyl(s, weyl_multiplier(state_bits, bits), state_bits).to(device)
    if name == "mul1":
        x = s * 0x83DCD12D
        total = sum((x >> shift) & 0xFF for shift in (0, 8, 16, 24))
        return _rounded(_half(0x6400 + total) * _half(0x1EEE) + _half(0xC931)).to(device)
    if name not in CODEBOOKS:
        raise ValueError(f"no codebook {name!r}; known: {', '.join(CODEBOOKS)}")
    x = s * 89226354 + 64248484 if name == "3inst" else s * 0xCBAC1FED
    y = (x & 0x8FFF8FFF) ^ 0x3B603B60
    return _rounded(_half(y & 0xFFFF) + _half((y >> 16) & 0xFFFF)).to(device)


@lru_cache(maxsize=32)
def spread(name: str, state_bits: int, bits: float) -> float:
    """Return the root mean square of a codebook's values."""
    return float(codebook(name, state_bits, bits).double().square().mean().sqrt())


def _strata(state_bits: int, bits: int) -> Tensor:
    """Return the rank of each state's value, (2^state_bits,) int64."""
    state = torch.arange(2**state_bits)
    past, new, width = state >> bits, state & (2**bits - 1), 2 ** (state_bits - bits)
    stratum = new ^ (hash32(past) & (2**bits - 1))
    return stratum * width + past * (309 * width // 1000 | 1) % width


def weyl_multiplier(state_bits: int, bits: float) -> int:
    """Return what `weyl` multiplies states by, an odd number below 2^state_bits."""
    if bits in WEYL_STEPS:
        return WEYL_STEPS[bits] >> (16 - state_bits) | 1
    return (WEYL_STEP >> (16 + int(bits) - state_bits)) % 2**state_bits | 1


def weyl_half(state_bits: int) -> int:
    """Return half of the step between the numbers of 16 bits that `weyl` takes, at least 1."""
    return 1 << max(0, 15 - state_bits)


def _weyl(state: Tensor, multiplier: int, state_bits: int) -> Tensor:
    t = (state * multiplier << (16 - state_bits)) & 0xFFFF
    t = t | weyl_half(state_bits)  # never -2^15, whose square has no 16 bits
    t = t - ((t & 0x8000) << 1)

    def times(x: Tensor, y: Tensor | int) -> Tensor:
        return (x * y + 2**14) >> 15

    power, first, (a, b, c) = t, t, WEYL_POLYNOMIAL
    for i in range(5):
        power = times(power, power)
        first = power if i == 1 else first  # t^4
    return times(t, a + times(first, b + times(power, c))).float() / WEYL_UNIT


def _half(bits: Tensor | int) -> Tensor:
    """Return the float64 of half-precision numbers given as integers below 2^16."""
    return torch.as_tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.float16).double()


def _rounded(values: Tensor) -> Tensor:
    return values.half().float()
