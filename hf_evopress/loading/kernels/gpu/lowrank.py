"""A matrix of codes, or a sparse one, and a low-rank term beside it, on a GPU: two launches.

Without this they are three, and the sum of the low-rank term goes through memory in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..matrix import Tensors
from .kinds import Codes, Floats, Sparse
from .launch import launch, needs_exact
from .matrix import OnGPU, at_word

FAMILY = "lowrank"


@dataclass(frozen=True)
class WithLowRank:
    """W + B A: W (rows, n) of codes or sparse, B (rows, rank) of codes or numbers."""

    W: OnGPU
    A: OnGPU
    B: OnGPU

    def product(self, state: Tensors, x: Tensor, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        """Return x (W + B A)^T + bias in `dtype`; x (tokens, n) contiguous."""
        (rows, n), tokens = self.W.shape, len(x)
        y = torch.empty(tokens, rows, dtype=dtype, device=x.device)
        tile = self.W.tile(tokens)
        given = {
            **{
                "x": at_word(x, 8),
                "narrow": self.A.product(state, x, torch.float32),
                "bias": bias,
                "y": y,
            },
            **{"tokens": tokens, "rows": rows, "n": n, "ONE": tokens == 1},
            "EXACT": x.dtype == torch.float32 or needs_exact(x.device),
            **self.W.constants,
            **self.W.tensors(state),
            **self._factor(state),
            **tile,
        }
        grid = (-(-rows // tile["BN"]), -(-tokens // tile["BM"]))
        launch(FAMILY, f"product_{self.W.family}", grid, x.device, given)
        return y

    def _factor(self, state: Tensors) -> dict[str, Any]:
        """Return what the kernel takes of B."""
        own, tensors = self.B.constants, self.B.tensors(state)
        return {
            "factor": tensors["codes" if self.B.family == Codes.family else "values"],
            "factor_scales": tensors.get("scales"),
            "factor_zeros": tensors.get("zeros"),
            "rank": self.B.shape[1],
            "factor_octets": own.get("octets", 1),
            "factor_zero_octets": own.get("zero_octets", 1),
            "factor_groups": own.get("groups", 1),
            "FACTOR_BITS": own.get("BITS", 16),
            "FACTOR_GROUP": own.get("GROUP", 1),
            "FACTOR_WIDE": own.get("WIDE", 1),
        }


def with_low_rank(terms: Sequence[Sequence[Any]]) -> WithLowRank | None:
    """Return the sum of a level's terms, pairs before matrices, as one; None for other levels."""
    if [len(matrices) for matrices in terms] != [2, 1]:
        return None
    (A, B), (W,) = terms
    fits = isinstance(W, (Codes, Sparse)) and isinstance(B, (Codes, Floats))
    return WithLowRank(W, A, B) if fits else None
