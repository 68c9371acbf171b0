"""Magnitude pruning: keep the largest weights; needs no data.

A baseline (Han et al. 2015, arXiv:1506.02626; the layer-wise form). Unstructured, the largest of
the whole weight; n:m, the largest n of every m neighbours. Kept weights are not adjusted; with
bits=b, each is rounded to the nearest code of its group.

Stores what `maths/sparse.py` says: 16 (1 - s) + 1 bits per weight at sparsity s, with bits=b
b (1 - s) + 1 + (16 + b) / group_size; pattern=2:4 takes 0.75 instead of 1 for the places. Sparsity
saves bytes, not time.

When to use it: as a yardstick, where no data are at hand, and for a few outliers after a `+`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import State
from .maths.linalg import Stats
from .maths.sparse import ANY, SparseMethod, largest, largest_of_each, n_kept, round_kept


class Magnitude(SparseMethod):
    """`magnitude:sparsity=0.5`: small weights are dropped."""

    name = "magnitude"
    examples = (
        "magnitude:sparsity=0.5",
        "magnitude:pattern=4:8,values=bfloat16",
        "magnitude:sparsity=0.7,bits=4,group_size=32",
    )

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        shape = (W.shape[0], W.shape[1])
        self.check_shape(shape, **params)
        W = W.float()
        if params["pattern"] == ANY:
            mask = largest(W.abs(), n_kept(shape, params))
        else:
            mask = largest_of_each(W.abs(), params["pattern"])
        return round_kept(W, mask, **params)
