"""Integer codes as ONNX Runtime multiplies them: MatMulNBits and GatherBlockQuantized of 4 bits.

Codes of 2 and 3 bits are stored in 4. Codes of 5 to 8 bits are two planes of 4 bits, q = 16 h + l,
and so are their zero points: the weight is (h - zh) 16 s + (l - zl) s, two products that are added,
exact but for the order of sums. The operator has 2 and 8 bits of its own, but for float32 inputs no
kernel on CPUs: ONNX Runtime 1.32 unpacks the weight at each call (2048 x 2048, one thread, one
token: 25 ms at 8 bits, 26 at 2, against 0.7 at 4).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

DOMAIN = "com.microsoft"
BITS, BASE = 4, 16
DEFAULT_ZERO = BASE // 2  # what the operators take where there are no zero points
LEAST_BLOCK, MOST_BLOCK = 16, 256


def block_of(group: int) -> int | None:
    """Return the weights per scale that the operators take for groups of `group`, if any.

    A power of 2 that divides it: a group of 96 becomes three of 32 with the same scale.
    """
    block = min(group & -group, MOST_BLOCK)
    return block if block >= LEAST_BLOCK else None


class Codes(nn.Module):
    """A weight of codes, scales and zero points: q (out, in), the others (out, groups, 1).

    scale_dtype: a 16-bit dtype that has the scales. `block_of` has a block for the groups.
    """

    scales: Tensor

    def __init__(self, q: Tensor, scale: Tensor, zero: Tensor, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.columns = q.shape
        group = self.columns // scale.shape[1]
        block = block_of(group)
        assert block is not None  # layers.py has asked
        self.block = block
        q, zero = q.to(torch.int16), zero.squeeze(-1).to(torch.int16)
        if bool((zero == zero.flatten()[0]).all()) and int(q.max()) < BASE:
            # one zero point for all: move the codes so that it is the one that need not be stored
            moved = q + (DEFAULT_ZERO - zero.flatten()[0])
            if int(moved.min()) >= 0 and int(moved.max()) < BASE:
                q, zero = moved, torch.full_like(zero, DEFAULT_ZERO)
        zero = zero.repeat_interleave(group // block, 1)
        scale = scale.squeeze(-1).repeat_interleave(group // block, 1)
        self.register_buffer("scales", scale.to(scale_dtype).contiguous())
        two = max(int(q.max()), int(zero.max())) >= BASE
        self.factors: tuple[int, ...] = (BASE, 1) if two else (1,)
        self.has_zeros: list[bool] = []
        for i, factor in enumerate(self.factors):
            z = zero // factor % BASE
            self.register_buffer(f"codes_{i}", _nibbles(q // factor % BASE))
            self.has_zeros.append(bool((z != DEFAULT_ZERO).any()))
            if self.has_zeros[i]:
                self.register_buffer(f"zeros_{i}", _nibbles(z))

    def weight(self) -> Tensor:
        """Return the weight (out, in) float32."""
        q, z = self._joined("codes", self.columns), self._joined("zeros", self.scales.shape[1])
        steps = q.unflatten(1, (-1, self.block)) - z.unsqueeze(-1)
        return (steps * self.scales.float().unsqueeze(-1)).flatten(1)

    def _joined(self, name: str, n: int) -> Tensor:
        total = torch.zeros(self.rows, n)
        for i, factor in enumerate(self.factors):
            if name == "zeros" and not self.has_zeros[i]:
                total += factor * DEFAULT_ZERO
            else:
                packed = self.get_buffer(f"{name}_{i}")
                codes = torch.stack([packed % BASE, packed // BASE], -1).flatten(1)[:, :n]
                total += factor * codes.float()
        return total

    def matmul(self, x: Tensor) -> Tensor:
        """Return x W^T for x (..., in) float32."""
        if not torch.compiler.is_exporting():
            return nn.functional.linear(x, self.weight())
        shape = (*x.shape[:-1], self.rows)
        found = [
            torch.onnx.ops.symbolic(
                f"{DOMAIN}::MatMulNBits",
                (x, self._codes(i), scales.flatten(), *(z.flatten() for z in zeros)),
                {"K": self.columns, "N": self.rows, "bits": BITS, "block_size": self.block},
                dtype=x.dtype,
                shape=shape,
                version=1,
            )
            for i, (scales, zeros) in enumerate(self._grids())
        ]
        return sum(found[1:], start=found[0])

    def look_up(self, rows: Tensor) -> Tensor:
        """Return rows (...) of the weight, (..., in) float32."""
        if not torch.compiler.is_exporting():
            return self.weight()[rows]
        found = [
            torch.onnx.ops.symbolic(
                f"{DOMAIN}::GatherBlockQuantized",
                (self._codes(i).flatten(1), rows, scales, *zeros),
                {"gather_axis": 0, "quantize_axis": 1, "block_size": self.block, "bits": BITS},
                dtype=torch.float32,
                shape=(*rows.shape, self.columns),
                version=1,
            )
            for i, (scales, zeros) in enumerate(self._grids())
        ]
        return sum(found[1:], start=found[0])

    def _codes(self, i: int) -> Tensor:
        return self.get_buffer(f"codes_{i}").unflatten(1, (-1, self.block * BITS // 8))

    def _grids(self) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Return scales in float32 and zero points of each plane; ONNX Runtime makes them once."""
        scales = self.scales.float()
        return [
            (
                scales * factor if factor > 1 else scales,
                (self.get_buffer(f"zeros_{i}"),) if self.has_zeros[i] else (),
            )
            for i, factor in enumerate(self.factors)
        ]


def _nibbles(codes: Tensor) -> Tensor:
    """Return 4-bit codes (rows, n) as bytes (rows, ceil(n / 2)), the first in the lower half."""
    codes = nn.functional.pad(codes.to(torch.uint8), (0, codes.shape[1] % 2))
    return (codes[:, 0::2] + codes[:, 1::2] * BASE).contiguous()
