"""The rank of each layer's EoRA adapter: fixed, by an error limit, or shared out by bytes.

The spectrum of a layer's error is its whole error curve, so ranks are chosen exactly: rank r
leaves the tail of the spectrum behind r. With output-gradient moments G each component counts
by what it costs the model, 1/2 lambda_i u_i^T G u_i nats; without, by its squared output error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..base.resources import format_size
from ..methods.base import Shape
from ..search.knapsack import solve
from ..search.space import SearchSpace
from .folder import adapter_bytes

RANKS = (0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)


@dataclass(frozen=True)
class ErrorCurve:
    """What each rank leaves of a layer's error.

    left (n + 1,) float64: loss left at rank 0, 1, ..., n; squared (n + 1,): squared output error
    left; output: the squared output of the dense layer, in the same metric.
    """

    shape: Shape
    left: Tensor
    squared: Tensor
    output: float

    @staticmethod
    def of(shape: Shape, values: Tensor, U: Tensor, output: float, G: Tensor | None) -> ErrorCurve:
        """Return the curve of an error with spectrum `values` (n,) and directions U (out, n)."""
        weights = torch.ones_like(values)
        if G is not None:
            weights = 0.5 * ((G.to(U) @ U) * U).sum(0)
        return ErrorCurve(shape, _tails(values * weights), _tails(values), output)

    def rank_for(self, error: float) -> int:
        """Return the smallest rank that leaves at most `error` of the squared output."""
        enough = (self.squared <= error * self.output).nonzero()
        return int(enough[0]) if len(enough) else len(self.squared) - 1


def _tails(values: Tensor) -> Tensor:
    """Return sum(values[r:]) for r = 0 ... n, (n + 1,)."""
    tails = values.flip(0).cumsum(0).flip(0)
    return torch.cat([tails, tails.new_zeros(1)])


def ranks_for_size(
    curves: Mapping[str, ErrorCurve], budget_bytes: int, *, ranks: tuple[int, ...] = RANKS
) -> dict[str, int]:
    """Return the rank of each layer that leaves the least loss in a file of `budget_bytes`.

    The optimum of the knapsack over `ranks`, headers counted. Raises ValueError where not even
    one layer fits.
    """
    shapes = {name: curve.shape for name, curve in curves.items()}
    fixed = adapter_bytes({}, {})
    menu: dict[str, list[tuple[str, int]]] = {}
    losses: list[list[float]] = []
    for name, curve in curves.items():
        offered = [r for r in ranks if r < len(curve.left)]
        costs = [adapter_bytes(shapes, {name: r}) - fixed for r in offered]
        menu[name] = [(f"rank:rank={r}", 8 * c) for r, c in zip(offered, costs, strict=True)]
        losses.append([float(curve.left[r]) for r in offered])
    space = SearchSpace.build({n: s[0] * s[1] for n, s in shapes.items()}, menu)
    order = [gene.units[0] for gene in space.genes]
    by_name = dict(zip(curves, losses, strict=True))
    solution = solve(space, [by_name[name] for name in order], 8 * max(0, budget_bytes - fixed))
    chosen = space.levels(solution.genome)
    found = {name: int(chosen[name].rpartition("=")[2]) for name in curves}
    if not any(found.values()):
        least = fixed + min(
            adapter_bytes(shapes, {n: r}) - fixed for n in curves for r in ranks[1:2]
        )
        raise ValueError(
            f"an adapter of {format_size(budget_bytes)} holds nothing: the smallest useful one "
            f"has {format_size(least)}"
        )
    return found
