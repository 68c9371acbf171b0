"""Weights corrected for inputs that come from already compressed layers.

With x the dense model's input of a layer and x' what the compressed prefix really produces, the
weight that makes up best for the difference is the least-squares answer to W x from x':

    W* = W E[x x'^T] E[x' x'^T]^-1 = W + W E[(x - x') x'^T] E[x' x'^T]^-1

GPTAQ (Li et al. 2025, arXiv:2504.02692) works the second term into GPTQ's column loop; here it
is added to the weight first, so that any method of the package can compress W* on the moments of
x'. Both moments give position 0 its due (see `Stats.hessian`), and the damping of the inverse
shrinks W* towards W in directions that few tokens took.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..methods.maths.linalg import Stats
from .input_moments import Moment

SINK = 0.05  # weight of position 0, as in the methods' own metric
DAMP = 0.1


@dataclass(frozen=True)
class Shift:
    """How far the dense inputs of a layer are from those of the compressed prefix.

    gram, sink (in, in) float32: E[(x - x') x'^T] over all tokens, and over position 0 only.
    """

    gram: Tensor
    sink: Tensor | None = None


class CrossMoment:
    """Running sums of x' x'^T and (x - x') x'^T, for x and x' of the same tokens."""

    def __init__(self, compressed: Tensor) -> None:
        n = compressed.shape[-1]
        self.own = Moment(compressed, torch.float32)
        self.total = torch.zeros(n, n, device=compressed.device)

    def add(self, dense: Tensor, compressed: Tensor) -> None:
        """Add the rows of two inputs (..., in)."""
        X = compressed.reshape(-1, compressed.shape[-1]).float()
        self.own.add(X)
        difference = dense.reshape(X.shape).float() - X
        self.total.addmm_(difference.T, X)

    def shift(self) -> Tensor:
        """Return E[(x - x') x'^T], (in, in) float32."""
        return self.total / self.own.n_tokens


def shifted_weight(
    W: Tensor,
    stats: Stats,
    shift: Shift,
    *,
    alpha: float = 1.0,
    damp: float = DAMP,
    sink: float = SINK,
) -> Tensor:
    """Return W + alpha W E[(x - x') x'^T] (E[x' x'^T] + damp)^-1, (out, in) float32.

    stats are those of x'. alpha 0 is W itself, 1 the whole least-squares correction.
    """
    if not alpha:
        return W
    C = shift.gram
    if sink and stats.sink is not None and shift.sink is not None:
        trace = stats.sink.diagonal().sum()
        if trace > 0:  # the weight that Stats.hessian gives to position 0
            C = C + sink * (stats.gram.diagonal().sum() / trace) * shift.sink
    U = stats.inverse_factor(sink=sink, damp=damp)
    return W + alpha * ((W @ C) @ U.T) @ U
