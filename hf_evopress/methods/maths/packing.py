"""Pack integer codes of 1 to 8 bits into bytes, with no bit to spare.

A code is cut into bit planes of 4, 2 and 1 bits, most significant first (7 = 4 + 2 + 1, 8 is
stored as it is). In a plane of p bits a row of n values, padded to a multiple of 8, takes
w = p * ceil(n / 8) bytes; value j sits in byte j mod w at shift p * (j div w). Unpacking is
thus one row of shifted copies of the plane: contiguous reads and writes, uint8 all the way, no
gather. It runs on any device, under torch.compile and through ONNX export.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def packed_bytes(n: int, bits: int) -> int:
    """Return the number of bytes that a row of `n` codes takes: bits * ceil(n / 8)."""
    _planes(bits)
    return bits * _octets(n)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Return codes (..., n) uint8, each below 2**bits, as (..., packed_bytes(n, bits)) uint8."""
    planes = _planes(bits)
    if codes.dtype != torch.uint8:
        raise TypeError(f"pack() takes uint8 codes, got {codes.dtype}")
    n = codes.shape[-1]
    codes = torch.nn.functional.pad(codes, (0, 8 * _octets(n) - n))
    packed, below = [], bits
    for p in planes:
        below -= p
        plane = (codes >> below) & (2**p - 1)
        slices = plane.unflatten(-1, (8 // p, p * _octets(n))).unbind(-2)
        byte = slices[0]
        for k in range(1, 8 // p):
            byte = torch.add(byte, slices[k], alpha=2 ** (p * k))  # no bit in common, no carry
        packed.append(byte)
    return torch.cat(packed, dim=-1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the codes (..., n) uint8 of `packed` (..., packed_bytes(n, bits)) uint8."""
    planes = _planes(bits)
    if packed.shape[-1] != bits * _octets(n):
        raise ValueError(
            f"{n} codes of {bits} bits take {bits * _octets(n)} bytes, got {packed.shape[-1]}"
        )
    widths = [p * _octets(n) for p in planes]
    first, *others = (_spread(x, p) for x, p in zip(packed.split(widths, -1), planes, strict=True))
    codes = first
    for values, p in zip(others, planes[1:], strict=True):
        codes = torch.add(values, codes, alpha=2**p)
    return codes.narrow(-1, 0, n)


def unpack_at(packed: Tensor, bits: int, n: int, index: Tensor) -> Tensor:
    """Return the codes uint8 at places `index` (any shape, int64) of one packed row of n codes.

    packed (packed_bytes(n, bits),) uint8. Only the bytes asked for are read.
    """
    total: Tensor | None = None
    for plane, p in zip(
        packed.split([p * _octets(n) for p in PLANES[bits]]), PLANES[bits], strict=True
    ):
        width = p * _octets(n)
        shift = p * torch.div(index, width, rounding_mode="floor")
        values = (plane[index % width].to(torch.int64) >> shift) & (2**p - 1)
        total = values if total is None else total * 2**p + values
    assert total is not None  # every number of bits has a plane
    return total.to(torch.uint8)


def _spread(plane: Tensor, p: int) -> Tensor:
    """Return the values (..., 8 / p * w) of one plane (..., w) of p-bit values."""
    if p == 8:
        return plane
    shifts = torch.arange(0, 8, p, dtype=torch.uint8, device=plane.device).unsqueeze(-1)
    if torch.compiler.is_exporting():  # ONNX has a division of uint8 tensors but no `>>`
        moved = plane.unsqueeze(-2) // 2**shifts
    else:
        moved = plane.unsqueeze(-2) >> shifts  # 10 times faster than the division
    return (moved & (2**p - 1)).flatten(-2)


def _octets(n: int) -> int:
    return (n + 7) // 8


def _planes(bits: int) -> tuple[int, ...]:
    if bits not in PLANES:
        raise ValueError(f"codes have 1 to 8 bits, got bits={bits}")
    return PLANES[bits]
