"""Wanda: keep the weights that matter most to their output, |w| times the size of their input.

Sun et al. 2023 (arXiv:2306.11695): score |w_ij| sqrt(H_jj), compared within a row (an output), or
within m neighbours for n:m. A baseline: kept weights are not adjusted; with bits=b, each is rounded
to the nearest code of its group. `sink` weighs position 0 as in `gptq`; 0.0 is the published score.

Stores what `maths/sparse.py` says: 16 (1 - s) + 1 bits per weight at sparsity s, with bits=b
b (1 - s) + 1 + (16 + b) / group_size; pattern=2:4 takes 0.75 instead of 1 for the places. Sparsity
saves bytes, not time.

When to use it: as a yardstick, or where `sparsegpt` is too slow; it needs no factorisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Param, State
from .maths.linalg import SINK, Stats
from .maths.sparse import (
    ANY,
    SPARSE_PARAMS,
    SparseMethod,
    largest_of_each,
    n_kept,
    round_kept,
    share,
)


class Wanda(SparseMethod):
    """`wanda:sparsity=0.5`: each output keeps the weights that move it most."""

    name = "wanda"
    needs_stats = True
    params: ClassVar[Mapping[str, Param]] = {
        **SPARSE_PARAMS,
        "sink": Param(float, "weight of position 0 in the Hessian", default=SINK, at_least=0.0),
    }
    examples = (
        "wanda:sparsity=0.5",
        "wanda:pattern=2:4,sink=0.0",
        "wanda:sparsity=0.4,bits=3,group_size=-1,symmetric=true",
    )

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        stats, shape = self.required(stats, [W]), (W.shape[0], W.shape[1])
        self.check_shape(shape, **params)
        W = W.float()
        size = stats.hessian(sink=params["sink"]).diagonal().clamp(min=0.0).sqrt().to(W.device)
        scores = W.abs() * size
        if params["pattern"] == ANY:
            mask = _largest_of_rows(scores, n_kept(shape, params))
        else:
            mask = largest_of_each(scores, params["pattern"])
        return round_kept(W, mask, **params)


def _largest_of_rows(scores: Tensor, total: int) -> Tensor:
    """Return the mask of `total` scores, the largest of each row; rows differ by at most one."""
    rows = scores.shape[0]
    counts = [share(total, row, row + 1, rows) for row in range(rows)]
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    wanted = torch.arange(scores.shape[1], device=scores.device)
    first = wanted < torch.tensor(counts, device=scores.device)[:, None]
    return torch.zeros_like(first).scatter_(1, ranked, first)
