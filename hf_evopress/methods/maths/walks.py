"""Walks through a trellis as bits: packed into bytes, and read from any position.

A state has L bits; each weight brings k new ones: state' = ((state << k) | new) mod 2^L
(the bitshift trellis of QTIP, Tseng et al. 2024, arXiv:2406.11235). A walk of 256 weights is thus
a string of 256 k bits, and the state of a weight is the last L bits up to its own. What
comes before the first bit is the end of the same string where the walk bites its tail, or else
a start that is stored beside it, as many bits as the first state has besides its own.

At 2.5 bits even weights bring 2 and odd ones 3, and so at every half. It leaves 0.0363 of the
variance of Gaussian weights (2^12 states), nearly the geometric mean of what 2 and 3 bits leave,
0.0356; half of the weights at 2 and half at 3 bits leave the arithmetic mean, 0.0441.

Bit i of a walk is bit 7 - i mod 8 of byte i div 8: 32 k bytes per walk. Starts are one string for
all walks, padded to whole bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

LENGTH = 256  # weights in a walk
BITS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 7, 8)  # per weight
_EACH = 16  # weights that take whole bytes at any rate


def up_to(weights: int, bits: float) -> int:
    """Return how many bits that many first weights of a walk bring."""
    return int(weights * bits)


def own_bits(bits: float) -> tuple[int, int]:
    """Return how many bits even and odd weights bring."""
    return int(bits), up_to(2, bits) - int(bits)


def walk_bytes(bits: float) -> int:
    """Return the bytes of a walk."""
    return up_to(LENGTH, bits) // 8


def pack_walks(states: Tensor, bits: float) -> Tensor:
    """Return walks (..., 256), states as integers, as bytes (..., 32 * bits) uint8."""
    even, odd = own_bits(bits)
    new = (states[..., ::2] & (2**even - 1)) << odd | states[..., 1::2] & (2**odd - 1)
    return _to_bytes(_to_bits(new, even + odd).flatten(-2))


def pack_starts(states: Tensor, bits: float, state_bits: int) -> Tensor:
    """Return what comes before each walk of states (..., 256), as one row of bytes."""
    own = int(bits)
    starts = (states[..., 0] >> own).flatten()
    string = _to_bits(starts, state_bits - own).flatten()
    return _to_bytes(torch.nn.functional.pad(string, (0, -string.numel() % 8)))


def start_bytes(walks: int, bits: float, state_bits: int) -> int:
    """Return the number of bytes that `pack_starts` makes of that many walks."""
    return (walks * (state_bits - int(bits)) + 7) // 8


def unpack_walks(
    codes: Tensor, bits: float, state_bits: int, starts: Tensor | None = None
) -> Tensor:
    """Return the states (walks, 256) int32 of codes (walks, 32 * bits) uint8.

    starts: what `pack_starts` made of them, or None where walks bite their tails.
    """
    past = state_bits - int(bits)
    if starts is None:
        # the string before its beginning is its own end, as often as L asks for
        before = codes[:, -((past + 7) // 8) :] if past else codes[:, :0]
    else:
        before = _start_rows(starts, codes.shape[0], past)
    ahead, step = before.shape[1], up_to(_EACH, bits) // 8
    string = torch.cat([before, codes, codes[:, :2]], dim=1)  # two more bytes to read over
    # a window of L <= 16 bits lies in three bytes; 16 weights later it is `step` bytes further
    bytes_ = string.int()
    three = (bytes_[:, :-2] << 16) | (bytes_[:, 1:-1] << 8) | bytes_[:, 2:]
    shape = len(codes), LENGTH // _EACH, _EACH
    states = torch.empty(shape, dtype=torch.int32, device=codes.device)
    for place in range(_EACH):
        start = 8 * ahead + up_to(place + 1, bits) - state_bits
        first = three[:, start // 8 :: step][:, : LENGTH // _EACH]
        torch.bitwise_right_shift(first, 24 - state_bits - start % 8, out=states[..., place])
    return states.flatten(1).bitwise_and_(2**state_bits - 1)


def _start_rows(starts: Tensor, walks: int, width: int) -> Tensor:
    """Return each walk's start (walks, bytes), its bits at the end of the row."""
    places = torch.arange(8, dtype=torch.uint8, device=starts.device).flip(0)
    string = ((starts.unsqueeze(-1) >> places) & 1).flatten()[: walks * width]
    return _to_bytes(torch.nn.functional.pad(string.view(walks, width), (-width % 8, 0)))


def _to_bits(values: Tensor, width: int) -> Tensor:
    """Return the bits (..., width) uint8 of integers, the most significant first."""
    places = torch.arange(width, device=values.device).flip(0)
    return ((values.unsqueeze(-1) >> places) & 1).to(torch.uint8)


def _to_bytes(string: Tensor) -> Tensor:
    """Return bits (..., 8 n) uint8 as bytes (..., n) uint8."""
    places = torch.arange(8, dtype=torch.uint8, device=string.device).flip(0)
    return (string.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)
