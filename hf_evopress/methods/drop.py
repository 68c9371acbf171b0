"""Leave out a whole attention or MLP sub-block: its residual branch adds nothing.

A level of sub-blocks (`model.layers.3.self_attn`, `model.layers.3.mlp`), not of single weights.
Costs 0 bits, frees the bits of everything inside, and saves all of its time. EvoPress (Sieberling
et al. 2024, arXiv:2410.14649, depth pruning) searches which; on SmolLM2-135M single drops cost
between 0.004 nat (attention 26) and 1.3 nat (last MLP). When to use it: where time matters, and
in a joint search, which drops what is cheap to lose and spends the bits elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Method, Shape, State
from .maths.linalg import Stats

_NOT_A_SUB_BLOCK = (
    "drop is a level of whole sub-blocks such as model.layers.3.self_attn, not of a linear "
    "weight; use zero to store nothing for one weight"
)


class Drop(Method):
    """`drop`: the sub-block is gone; see `models/dropped.py` for what stands in its place."""

    name = "drop"

    def check_shape(self, shape: Shape, **params: Any) -> None:
        raise ValueError(_NOT_A_SUB_BLOCK)

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        return 0

    def kept_values(self, shape: Shape, **params: Any) -> int:
        return 0

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        raise ValueError(_NOT_A_SUB_BLOCK)

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        return {}
