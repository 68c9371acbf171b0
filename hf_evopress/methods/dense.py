"""Keep the weight as it is, in 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Method, Shape, State
from .maths.linalg import Stats


class Dense(Method):
    """`dense`: the level that costs 16 bits per weight and loses nothing a 16-bit model has."""

    name = "dense"
    examples = ("dense",)
    is_trainable = True

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        return 16 * shape[0] * shape[1]

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        """Return W in bfloat16 where that is exact, else in float16 unless it overflows."""
        short = W.to(torch.bfloat16)
        fits = float(W.abs().max()) <= torch.finfo(torch.float16).max if W.numel() else True
        is_exact = torch.equal(short.to(W.dtype), W)
        return {"weight": short if is_exact or not fits else W.to(torch.float16)}

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        return state["weight"].to(dtype)

    def decompress_rows(
        self, state: State, shape: Shape, rows: Tensor, dtype: torch.dtype, **params: Any
    ) -> Tensor:
        return state["weight"][rows].to(dtype)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        return {"weight": torch.empty(shape, dtype=dtype, device="meta")}
