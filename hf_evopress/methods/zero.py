"""Store nothing: the weight is all zeros, the bias stays.

Costs 0 bits. The base of a low-rank layer that is shipped as a stock LoRA adapter (`zero` in the
checkpoint, B A in the adapter: LoRD, Kaushal et al. 2023, arXiv:2309.14021), and the far end of
what one linear weight can be pruned to. To drop a whole attention or MLP sub-block, which also
saves its time, use `drop`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import Method, Operator, Shape, State
from .maths.linalg import Stats


class Zero(Method):
    """`zero`: a linear layer that answers with its bias."""

    name = "zero"
    examples = ("zero",)

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        return 0

    def kept_values(self, shape: Shape, **params: Any) -> int:
        return 0

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        # no elements, no bytes; it says which device the layer is on
        return {"nothing": torch.empty(0, dtype=torch.uint8, device=W.device)}

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=state["nothing"].device)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        return {"nothing": torch.empty(0, dtype=torch.uint8, device="meta")}

    def operator(
        self, state: State, bias: Tensor | None, shape: Shape, dtype: torch.dtype, **params: Any
    ) -> Operator:
        rows = shape[0]

        def answer(x: Tensor) -> Tensor:
            # from x, not new: device, dtype under autocast and the graph of gradients are x's
            zeros = x.new_zeros(()).expand(*x.shape[:-1], rows)
            return zeros.clone() if bias is None else zeros + bias

        return answer
