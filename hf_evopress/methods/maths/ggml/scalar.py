"""Types of one code per weight: Q4_0 to Q8_0, the K-quants, IQ4_NL and IQ4_XS.

A weight is scale * value(code) + offset, with one scale and offset per 16 or 32 weights of a block.
Layouts are those of ggml-quants.c; sums and products come in its order, in float32, so that
weights are those of ggml's own decoder bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Scales = Callable[[Tensor], tuple[Tensor, Tensor | None]]

# the codebook of IQ4_NL and IQ4_XS, kvalues_iq4nl of ggml-common.h
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Plane:
    """Some bits of every code: bytes start .. stop of a block, cut into chunks of `width` bytes.

    The lowest `bits` of a chunk's bytes belong to its first `width` weights, and so on up.
    """

    start: int
    stop: int
    width: int
    bits: int
    shift: int = 0  # where in the code these bits go


@dataclass(frozen=True)
class Layout:
    """How a block is stored: the planes of its codes, and its scales.

    sub: weights per scale; top: the largest code; zero: the code of 0; scales: block bytes
    (..., bytes) uint8 -> scale and offset or None, (..., subs) float32; values: a codebook.
    """

    sub: int
    top: int
    zero: int
    planes: tuple[Plane, ...]
    scales: Scales
    values: tuple[int, ...] | None = None

    def codes(self, raw: Tensor) -> Tensor:
        """Return the codes (..., block) uint8 of blocks (..., bytes) uint8."""
        found = [
            _spread(raw[..., p.start : p.stop], p.width, p.bits) << p.shift for p in self.planes
        ]
        return found[0] if len(found) == 1 else found[0] | found[1]

    def with_codes(self, raw: Tensor, codes: Tensor) -> Tensor:
        """Return the blocks with other codes (..., block) uint8 and the same scales."""
        made = raw.clone()
        for p in self.planes:
            part = (codes >> p.shift) & (2**p.bits - 1)
            made[..., p.start : p.stop] = _gather(part, p.width, p.bits)
        return made

    def table(self, device: torch.device) -> Tensor:
        """Return the value of every code, (top + 1,) float32 in rising order of their codes."""
        if self.values is not None:
            return torch.tensor(self.values, dtype=torch.float32, device=device)
        return torch.arange(self.top + 1, dtype=torch.float32, device=device) - self.zero

    def decode(self, raw: Tensor) -> Tensor:
        """Return the weights (..., block) float32 of blocks (..., bytes) uint8."""
        codes = self.codes(raw).unflatten(-1, (-1, self.sub))
        if self.values is None:
            values = codes.float() - self.zero
        else:
            values = self.table(raw.device)[codes.long()]
        scale, offset = self.scales(raw)
        weights = scale.unsqueeze(-1) * values
        return (weights if offset is None else weights + offset.unsqueeze(-1)).flatten(-2)


def _spread(part: Tensor, width: int, bits: int) -> Tensor:
    """Return the codes (..., n) of `bits` bits in bytes; see Plane."""
    if bits == 8:
        return part ^ 0x80  # signed bytes, as codes that rise from 0
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=part.device)
    chunks = part.unflatten(-1, (-1, 1, width)) >> shifts[:, None]
    return (chunks & (2**bits - 1)).flatten(-3)


def _gather(codes: Tensor, width: int, bits: int) -> Tensor:
    """Return the bytes of codes, the inverse of `_spread`."""
    if bits == 8:
        return codes ^ 0x80
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    chunks = codes.unflatten(-1, (-1, len(shifts), width)) << shifts[:, None]
    return chunks.sum(-2, dtype=torch.uint8).flatten(-2)


def half(raw: Tensor, at: int) -> Tensor:
    """Return the half-precision number at byte `at` of blocks, (..., 1) float32."""
    pair = raw[..., at : at + 2].clone(memory_format=torch.contiguous_format)
    return pair.view(torch.float16).float()


def _one(raw: Tensor) -> tuple[Tensor, None]:
    return half(raw, 0), None


def _one_and_minimum(raw: Tensor) -> tuple[Tensor, Tensor]:
    return half(raw, 0), half(raw, 2)


def _q2_k(raw: Tensor) -> tuple[Tensor, Tensor]:
    packed = raw[..., :16]
    return half(raw, 80) * (packed & 15).float(), -(half(raw, 82) * (packed >> 4).float())


def _q3_k(raw: Tensor) -> tuple[Tensor, None]:
    # 16 scales of 6 bits: low nibbles in 8 bytes, two high bits of four scales in each of 4
    low, high = _spread(raw[..., 96:104], 8, 4), _spread(raw[..., 104:108], 4, 2)
    return half(raw, 108) * ((low | (high << 4)).float() - 32), None


def _q4_k(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of 6 bits: those of four sub-blocks whole, of the others split."""
    a, b, rest = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]
    scales = torch.cat([a & 63, (rest & 15) | ((a >> 2) & 48)], -1)
    minima = torch.cat([b & 63, (rest >> 4) | ((b >> 2) & 48)], -1)
    return half(raw, 0) * scales.float(), -(half(raw, 2) * minima.float())


def _q6_k(raw: Tensor) -> tuple[Tensor, None]:
    signed = (raw[..., 192:208] ^ 0x80).float() - 128
    return half(raw, 208) * signed, None


def _iq4_xs(raw: Tensor) -> tuple[Tensor, None]:
    high = _spread(raw[..., 2:4], 1, 2)
    low = _spread(raw[..., 4:8], 1, 4)
    return half(raw, 0) * ((low | (high << 4)).float() - 32), None


LAYOUTS = {
    "q4_0": Layout(32, 15, 8, (Plane(2, 18, 16, 4),), _one),
    "q4_1": Layout(32, 15, 0, (Plane(4, 20, 16, 4),), _one_and_minimum),
    "q5_0": Layout(32, 31, 16, (Plane(6, 22, 16, 4), Plane(2, 6, 1, 1, 4)), _one),
    "q5_1": Layout(32, 31, 0, (Plane(8, 24, 16, 4), Plane(4, 8, 1, 1, 4)), _one_and_minimum),
    "q8_0": Layout(32, 255, 128, (Plane(2, 34, 1, 8),), _one),
    "q2_k": Layout(16, 3, 0, (Plane(16, 80, 32, 2),), _q2_k),
    "q3_k": Layout(16, 7, 4, (Plane(32, 96, 32, 2), Plane(0, 32, 32, 1, 2)), _q3_k),
    "q4_k": Layout(32, 15, 0, (Plane(16, 144, 32, 4),), _q4_k),
    "q5_k": Layout(32, 31, 0, (Plane(48, 176, 32, 4), Plane(16, 48, 32, 1, 4)), _q4_k),
    "q6_k": Layout(16, 63, 32, (Plane(0, 128, 64, 4), Plane(128, 192, 32, 2, 4)), _q6_k),
    "iq4_nl": Layout(32, 15, 8, (Plane(2, 18, 16, 4),), _one, IQ4_VALUES),
    "iq4_xs": Layout(32, 15, 8, (Plane(8, 136, 16, 4),), _iq4_xs, IQ4_VALUES),
}
