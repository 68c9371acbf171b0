"""Storage of the factors of a weight: floats, or symmetric codes with one scale per row.

A factor X (n, m) is `X` in float16 or bfloat16, or with kind=int3 ... int8 `X_codes` uint8 (n,
packed bytes of a row) and `X_scales` float16 (n, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import State
from .grid import dequantize, find_grid, quantize
from .packing import pack, packed_bytes, unpack

FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16}
BITS = {f"int{bits}": bits for bits in range(3, 9)}
KINDS = (*FLOATS, *BITS)


def factor_bits(n: int, m: int, kind: str) -> int:
    """Return the bits that a factor (n, m) takes."""
    if kind in FLOATS:
        return 16 * n * m
    return n * (8 * packed_bytes(m, BITS[kind]) + 16)


def empty_factor(name: str, n: int, m: int, kind: str) -> State:
    """Return the tensors of a factor (n, m) on the meta device."""
    if kind in FLOATS:
        return {name: torch.empty(n, m, dtype=FLOATS[kind], device="meta")}
    codes = torch.empty(n, packed_bytes(m, BITS[kind]), dtype=torch.uint8, device="meta")
    scales = torch.empty(n, 1, dtype=torch.float16, device="meta")
    return {f"{name}_codes": codes, f"{name}_scales": scales}


def pack_factor(name: str, X: Tensor, kind: str) -> State:
    """Return the tensors of X (n, m), each number rounded by itself."""
    if kind in FLOATS:
        most = torch.finfo(FLOATS[kind]).max
        return {name: X.clamp(-most, most).to(FLOATS[kind]).contiguous()}
    X, maxq = X.float(), float(2 ** BITS[kind] - 1)
    scale, zero = find_grid(X, maxq, symmetric=True)
    return pack_codes(name, quantize(X, scale[:, None], zero[:, None], maxq), scale, kind)


def pack_codes(name: str, q: Tensor, scale: Tensor, kind: str) -> State:
    """Return the tensors of codes q (n, m), whole numbers, and scales (n,) that float16 has."""
    codes = pack(q.to(torch.uint8), BITS[kind])
    return {f"{name}_codes": codes, f"{name}_scales": scale[:, None].to(torch.float16)}


def unpack_factor(name: str, state: State, m: int, kind: str) -> Tensor:
    """Return the factor (n, m), float32 where it is coded."""
    if kind in FLOATS:
        return state[name]
    scale = state[f"{name}_scales"].float()
    q = unpack(state[f"{name}_codes"], BITS[kind], m)
    return dequantize(q, scale, scale.new_tensor(2 ** (BITS[kind] - 1)))
