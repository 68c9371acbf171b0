"""Types of one code per 4 or 8 weights: IQ1, IQ2 and IQ3, whose codes are points of a lattice.

A weight is scale * sign * point, with tables of points that the `gguf` package holds. Layouts are
those of ggml-quants.c; sums and products come in its order, in float32.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ....base.lasting import lasting
from .scalar import half

EXTRA = 'pip install "hf-evopress[gguf]"'
DELTA = 0.125  # what IQ1 types add to or take from every point


def decode(name: str, raw: Tensor) -> Tensor:
    """Return the weights (..., 256) float32 of blocks (..., bytes) uint8 of an IQ1-3 type."""
    return _DECODERS[name](raw)


def _iq2_xxs(raw: Tensor) -> Tensor:
    # per 32 weights: four bytes of points, then 28 bits of signs and 4 of the scale
    words = raw[..., 2:66].unflatten(-1, (8, 8))
    signs, top = _signs_of_28(words[..., 4:])
    scale = half(raw, 0) * (0.5 + top) * 0.25
    points = _points("IQ2_XXS", raw.device)[words[..., :4].long()]
    return (scale[..., None, None] * points * signs).flatten(-3)


def _iq2_xs(raw: Tensor) -> Tensor:
    codes = _uint16(raw[..., 2:66])
    scale = half(raw, 0) * (0.5 + _nibbles(raw[..., 66:74]).float()) * 0.25
    points = _points("IQ2_XS", raw.device)[codes & 511].unflatten(-2, (16, 2))
    signs = _signs(_parity_signs(raw.device)[codes >> 9]).unflatten(-2, (16, 2))
    return (scale[..., None, None] * points * signs).flatten(-3)


def _iq2_s(raw: Tensor) -> Tensor:
    scale = half(raw, 0) * (0.5 + _nibbles(raw[..., 74:82]).float()) * 0.25
    high = _pieces(raw[..., 66:74], (0, 2, 4, 6)) & 3
    codes = raw[..., 2:34].long() | (high << 8)
    points = _points("IQ2_S", raw.device)[codes].unflatten(-2, (16, 2))
    signs = _signs(raw[..., 34:66].long()).unflatten(-2, (16, 2))
    return (scale[..., None, None] * points * signs).flatten(-3)


def _iq3_xxs(raw: Tensor) -> Tensor:
    signs, top = _signs_of_28(raw[..., 66:98].unflatten(-1, (8, 4)))
    scale = half(raw, 0) * (0.5 + top) * 0.5
    points = _points("IQ3_XXS", raw.device)[raw[..., 2:66].long()]
    points = points.flatten(-2).unflatten(-1, (8, 4, 8))
    return (scale[..., None, None] * points * signs).flatten(-3)


def _iq3_s(raw: Tensor) -> Tensor:
    scale = half(raw, 0) * (1 + 2 * _nibbles(raw[..., 106:110])).float()
    high = _pieces(raw[..., 66:74], tuple(range(8))) & 1
    points = _points("IQ3_S", raw.device)[raw[..., 2:66].long() | (high << 8)]
    points = points.flatten(-2).unflatten(-1, (8, 4, 8))
    signs = _signs(raw[..., 74:106].long()).unflatten(-2, (8, 4))
    return (scale[..., None, None] * points * signs).flatten(-3)


def _iq1_s(raw: Tensor) -> Tensor:
    high = _uint16(raw[..., 34:50])
    scale = half(raw, 0) * (2 * ((high >> 12) & 7) + 1).float()
    delta = torch.where(high & 0x8000 == 0, DELTA, -DELTA)[..., None, None]
    shifts = torch.tensor((0, 3, 6, 9), device=raw.device)
    codes = raw[..., 2:34].long() | (((high.unsqueeze(-1) >> shifts) & 7) << 8).flatten(-2)
    points = _points("IQ1_S", raw.device)[codes].unflatten(-2, (8, 4))
    return (scale[..., None, None] * (points + delta)).flatten(-3)


def _iq1_m(raw: Tensor) -> Tensor:
    # the half-precision scale lies in the top nibbles of four 16-bit words of scales
    words = _uint16(raw[..., 48:56])
    nibbles = words >> 12
    whole = nibbles[..., 0] | nibbles[..., 1] << 4 | nibbles[..., 2] << 8 | nibbles[..., 3] << 12
    bits = torch.where(whole >= 0x8000, whole - 0x10000, whole).to(torch.int16)
    d = bits.unsqueeze(-1).view(torch.float16).float()
    shifts = torch.tensor((0, 3, 6, 9), device=raw.device)
    scale = d * (2 * ((words.unsqueeze(-1) >> shifts) & 7) + 1).flatten(-2).float()
    high = _pieces(raw[..., 32:48], (0, 4))
    codes = raw[..., :32].long() | ((high & 7) << 8)
    delta = torch.where(high & 8 == 0, DELTA, -DELTA)
    points = _points("IQ1_M", raw.device)[codes] + delta.unsqueeze(-1)
    return (scale[..., None, None] * points.unflatten(-2, (16, 2))).flatten(-3)


_DECODERS = {
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
}


def _uint16(part: Tensor) -> Tensor:
    """Return the 16-bit words, low byte first, of bytes (..., 2 n) as (..., n) int64."""
    pairs = part.unflatten(-1, (-1, 2)).long()
    return pairs[..., 0] | pairs[..., 1] << 8


def _pieces(part: Tensor, shifts: tuple[int, ...]) -> Tensor:
    """Return bytes (..., n) shifted by each of `shifts` in turn, (..., n * shifts) int64."""
    by = torch.tensor(shifts, device=part.device)
    return (part.long().unsqueeze(-1) >> by).flatten(-2)


def _nibbles(part: Tensor) -> Tensor:
    return _pieces(part, (0, 4)) & 15


def _signs(mask: Tensor) -> Tensor:
    """Return 1 or -1 for the 8 weights of each mask (...) int64, (..., 8) float32."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, device=mask.device) & 1
    return 1 - 2 * bits.float()


def _signs_of_28(part: Tensor) -> tuple[Tensor, Tensor]:
    """Return the signs (..., 4, 8) and the top four bits (...) float32 of 32-bit words.

    Seven bits per 8 weights: the eighth sign makes the number of negative ones even.
    """
    word = _uint16(part[..., :2])[..., 0] | _uint16(part[..., 2:])[..., 0] << 16
    shifts = torch.tensor((0, 7, 14, 21), device=part.device)
    codes = (word.unsqueeze(-1) >> shifts) & 127
    return _signs(_parity_signs(part.device)[codes]), (word >> 28).float()


def _parity_signs(device: torch.device) -> Tensor:
    seven = torch.arange(128, device=device)
    ones = sum((seven >> i) & 1 for i in range(7))
    return seven | (ones & 1) << 7  # type: ignore[operator]


@lru_cache(maxsize=None)
@lasting
def _points(name: str, device: torch.device) -> Tensor:
    """Return the table of points, (codes, 4 or 8) float32."""
    try:
        from gguf import quants
    except ImportError as error:
        kind = name.lower()
        raise ImportError(f"the tables of gguf:type={kind} are in gguf: {EXTRA}") from error
    holder = getattr(quants, name)
    holder.init_grid()
    return torch.from_numpy(holder.grid.copy()).flatten(0, -2).to(device)
