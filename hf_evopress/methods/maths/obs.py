"""Optimal brain surgeon on one weight: fix an input, let the inputs not yet fixed absorb its error.

The column loop of GPTQ (Frantar et al. 2022, arXiv:2210.17323) and SparseGPT (Frantar and
Alistarh 2023, arXiv:2301.00774). What an input's weights become (rounded, zero, both) is the
rule of the caller. O(in^2) per row and, in `Stats.inverse_factor`, O(in^3) per distinct input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import rounding_loops
from .grid import dequantize, find_grid, quantize

BLOCK = 128  # inputs between two updates of all later weights
STRIP = 16  # inputs between two updates of the later weights of a block
MAX_VALUES = 2**26  # float32 numbers worked on at once: 256 MB, whatever the layer

Rule = Callable[[Tensor, int], Tensor]  # (W, i) -> what W[i] becomes, (n,)


def solve(W: Tensor, U: Tensor, rule: Rule, group: int) -> None:
    """Call `rule` for each input of W (in, n) in turn; W is consumed, the rule keeps the result.

    n weights of one input lie in a row of W, so that the loop reads them once. U is upper, from
    `Stats.inverse_factor`. At an input that begins a group of `group` inputs, a block or a
    strip of STRIP, the rows of W up to its end carry every earlier error. A plain `Rounding` on
    a CPU takes whole groups instead of strips, by compiled loops.
    """
    whole = rule if type(rule) is Rounding and rounding_loops.serves(W) else None
    for low, high in blocks(W.shape[0], group):
        errors = torch.empty(high - low, W.shape[1], device=W.device)
        unit = min(group, high - low)
        for start, stop in _cuts(low, high, unit, STRIP if whole is None else unit):
            done = errors[start - low : stop - low]
            if whole is not None:
                whole.round_strip(W, U, done, start, stop)
            else:
                for i in range(start, stop):
                    error = done[i - start]
                    torch.div(W[i] - rule(W, i), U[i, i], out=error)
                    W[i + 1 : stop].addr_(U[i, i + 1 : stop], error, alpha=-1)
            W[stop:high].addmm_(U[start:stop, stop:high].T, done, alpha=-1)
        W[high:].addmm_(U[low:high, high:].T, errors, alpha=-1)


def blocks(columns: int, group: int) -> Iterator[tuple[int, int]]:
    """Yield the (low, high) of the blocks that `solve` cuts `columns` inputs into.

    Whole groups per block, or whole blocks per group: a group starts with all updates made.
    """
    unit, step = (columns, BLOCK // group * group) if group <= BLOCK else (group, BLOCK)
    yield from _cuts(0, columns, unit, step)


class Rounding:
    """The rule that rounds each weight to the grid of its group, and remembers the codes.

    A group's grid is found when the loop reaches its first input, from weights that carry
    every earlier error; the grid of a whole row is found up front. maxq (n,) is the largest
    code of each weight of a row of W.
    """

    def __init__(self, W: Tensor, U: Tensor, maxq: Tensor, group_size: int, **options: Any) -> None:
        self.group = W.shape[0] if group_size == -1 else group_size
        self.codes = torch.empty(W.shape, dtype=torch.uint8, device=W.device)  # (in, n)
        # The loss that rounding input i adds is (w - w_hat)^2 / U_ii^2: the clip search weighs
        # by it.
        self._weight = U.diagonal() ** -2
        self._maxq, self._options = maxq, options
        self._grids: list[tuple[Tensor, Tensor]] = []

    def __call__(self, W: Tensor, i: int) -> Tensor:
        if i % self.group == 0:
            self.begin(W[i : i + self.group], i)
        return self.round(W[i], i)

    def begin(self, group: Tensor, i: int) -> None:
        """Find the grid of the group (g, n) that begins at input i."""
        weight = self._weight[i : i + self.group]
        self._grids.append(find_grid(group.T, self._maxq, weight=weight, **self._options))

    def round(self, w: Tensor, i: int) -> Tensor:
        """Return the weights w (n,) of input i rounded to the grid of their group."""
        scale, zero = self._grids[-1]
        q = quantize(w, scale, zero, self._maxq)
        self.codes[i] = q
        return dequantize(q, scale, zero)

    def round_strip(self, W: Tensor, U: Tensor, errors: Tensor, low: int, high: int) -> None:
        """Round inputs low .. high of one group on a CPU; errors (high - low, n) is written."""
        if low % self.group == 0:
            self.begin(W[low : low + self.group], low)
        own = slice(low, high)
        rounding_loops.round_strip(
            W[own], U[own, own], *self._grids[-1], self._maxq, self.codes[own], errors
        )

    @property
    def grids(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every group, each (groups, n) float32."""
        scale, zero = (torch.stack(x) for x in zip(*self._grids, strict=True))
        return scale, zero


def _cuts(start: int, stop: int, unit: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (low, high) that cut start .. stop into units and each unit into steps."""
    for first in range(start, stop, unit):
        last = min(first + unit, stop)
        for low in range(first, last, step):
            yield low, min(low + step, last)
