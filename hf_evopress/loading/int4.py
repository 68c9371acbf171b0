"""Runtime int4: PyTorch's int4 kernel for CPUs, on a copy of the codes in its own layout.

4.5 bits per weight beside the packed tensors, twice that for levels of 5 to 8 bits. The kernel
computes in bfloat16 and rounds scales, not weights, to it: it is off by what a dense bfloat16
model is off. Levels that it cannot take compute as `auto` does.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods import compose
from ..methods.base import Method, Shape, State
from ..plans.level import Level
from .runtime import Runtime

KERNEL_GROUPS = (256, 128, 64, 32)  # weights per scale that the kernel takes
KERNEL_ROWS = 16  # its outputs come in multiples of this
MIDDLE = 8  # its code for 0
# Tokens up to which it beats computing the weight: its time grows with every token, even at 50
# for a weight of 4096 x 4096 (tests/benchmarks/decode.py).
MOST_TOKENS = 32


class Int4(Runtime):
    """Codes for the int4 kernel of CPUs; nothing for levels that it cannot take."""

    def make(self, level: Level, state: State, shape: Shape, dtype: torch.dtype) -> State:
        part, params, own, _ = next(compose.terms(level, state))
        if type(part).operator is not Method.operator:
            return {}  # such as thin factors: there is no weight to compute
        found = part.codes(own, shape, **params) if _has_kernel(own, dtype) else None
        group = None if found is None else _kernel_group(shape[1] // found[1].shape[1])
        if found is None or group is None:
            return {}
        q, scale, zero = found
        spread = shape[1] // group // scale.shape[1]
        scale, zero = (x.repeat_interleave(spread, dim=1) for x in (scale, zero))
        planes = [_for_kernel(*plane) for plane in _planes(q, scale, zero)]
        return {
            "codes": torch.stack([codes for codes, _ in planes]),
            "grids": torch.stack([grid for _, grid in planes]),
        }

    def takes(self, x: Tensor, made: State) -> bool:
        needs_graph = x.requires_grad and torch.is_grad_enabled()
        is_short = x.numel() <= MOST_TOKENS * x.shape[-1]
        return bool(made) and x.dtype == torch.bfloat16 and is_short and not needs_graph

    def run(
        self, x: Tensor, made: State, level: Level, state: State, shape: Shape, bias: Tensor | None
    ) -> Tensor:
        flat, group = x.reshape(-1, shape[1]), shape[1] // made["grids"].shape[1]
        planes = zip(made["codes"], made["grids"], strict=True)
        parts = [_kernel(flat, codes, group, grid)[:, : shape[0]] for codes, grid in planes]
        for part, params, own, _ in list(compose.terms(level, state))[1:]:
            parts.append(part.operator(own, None, shape, x.dtype, **params)(flat))
        parts += [] if bias is None else [bias]
        total = parts[0]
        for term in parts[1:]:
            total = total.float() + term  # rounded to bfloat16 once, when it is complete
        return total.to(x.dtype).view(*x.shape[:-1], shape[0])


def _kernel(x: Tensor, codes: Tensor, group: int, grid: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, group, grid)


@lru_cache(maxsize=None)
def has_int4_kernel() -> bool:
    """Return whether this PyTorch has the kernel for this processor, not only its reference."""
    known = hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu")
    return known and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def _has_kernel(state: State, dtype: torch.dtype) -> bool:
    is_on_cpu = all(tensor.device.type == "cpu" for tensor in state.values())
    return is_on_cpu and dtype == torch.bfloat16 and has_int4_kernel()


def _kernel_group(group: int) -> int | None:
    """Return the largest group of the kernel that divides this one: 192 is three of 64."""
    return next((g for g in KERNEL_GROUPS if group % g == 0), None)


def _planes(q: Tensor, scale: Tensor, zero: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return codes below 16 (out, in) with scale and shift (out, groups): the weight is the sum
    over planes of (codes - 8) * scale + shift.

    q (out, in) uint8, scale and zero (out, groups, 1). The codes of a group are moved until its
    zero point is the kernel's own 0, as far as there is room: a shift of 0 needs no rounding.
    """
    q = q.to(torch.int32).unflatten(1, (scale.shape[1], -1))
    low, high = q.amin(-1, keepdim=True), q.amax(-1, keepdim=True)
    fits = int((high - low).max()) < 16
    most, middle = (15, MIDDLE) if fits else (255, 17 * MIDDLE)
    wanted = middle - zero.to(torch.int32)
    moved = torch.minimum(torch.maximum(wanted, -low), most - high)
    q, shift = (q + moved).flatten(1), ((wanted - moved) * scale).squeeze(-1)
    scale = scale.squeeze(-1)
    if fits:
        return [(q, scale, shift)]
    return [(q >> 4, 16 * scale, torch.zeros_like(shift)), (q & 15, scale, shift)]


def _for_kernel(q: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes (out', in / 2) uint8 and scale and shift (groups, out', 2) bfloat16.

    out' is out, rounded up to what the kernel takes.
    """
    more = -q.shape[0] % KERNEL_ROWS
    grid = F.pad(torch.stack([scale, shift], dim=-1), (0, 0, 0, 0, 0, more)).transpose(0, 1)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(F.pad(q, (0, 0, 0, more)), 1)
    return codes, grid.contiguous().to(torch.bfloat16)
