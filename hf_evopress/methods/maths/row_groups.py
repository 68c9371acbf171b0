"""Round the rows of weights in groups, so that later rows absorb the errors of earlier ones.

With the second moment G = N E N^T of the gradients at a weight's outputs, N upper triangular with
identities in its diagonal blocks, the rows of group r are rounded towards

    W_r + sum_{r' < r} (N^T)_rr' dW_r'

where dW is what rounding the groups before has lost (YAQA, Tseng, Sun and De Sa 2025,
arXiv:2505.22988). How rows are rounded is the caller's: whatever rounds each row by itself, as
GPTQ does, becomes two-sided (`two_sided` does so for tiles).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..base import Param
from .two_sided import TILE, block_factor

GROUPS = 16  # per weight, at most: each takes the caller's loop over inputs once more
MAX_LOST = 2**28  # float32 numbers that all weights and levels of a loop lose: 1 GB
# Uniform 3 bits, SmolLM2-135M, G from 41k tokens, KL: 0.488 without outputs, 0.448 at 0.2, 0.432
# at 0.5, 0.428 at 1.0. G of fewer tokens is noisier.
DAMP_OUTPUTS = 1.0

OUTPUT_PARAMS: Mapping[str, Param] = {
    "outputs": Param(bool, "later rows absorb errors, too, by the outputs' moments", default=True),
    "damp_outputs": Param(
        float, "share of their mean diagonal added", default=DAMP_OUTPUTS, at_least=0.0
    ),
}

Made = tuple[Tensor, ...]  # what rows are rounded to, as (levels, rows, ...) each
Rounder = Callable[[Tensor], Made]  # of rows (levels, n, in)
Decoder = Callable[[Made], Tensor]  # -> the weights (levels, n, in) that rows were rounded to


def round_rows(
    Ws: Sequence[Tensor],
    outputs: Sequence[Tensor | None] | None,
    damp: float,
    rounder: Rounder,
    decode: Decoder,
    *,
    levels: int = 1,
) -> list[Made]:
    """Return what `rounder` makes of the rows of each weight (out_i, in), float32.

    outputs: G (out, out) of each weight, None where unknown; None or () for all: then all rows
    go to the rounder at once. damp: the share of G's mean diagonal that is added to it. Rows are
    rounded `levels` times at once, as each level loses something else.
    """
    known = outputs or [None] * len(Ws)
    if all(G is None for G in known):  # a view: the rounder copies what it works on
        made = rounder(torch.cat(list(Ws)).expand(levels, -1, -1))
        sizes = [len(W) for W in Ws]
        return list(zip(*(x.split(sizes, dim=1) for x in made), strict=True))
    rows = [_Rows(W, G, damp, levels) for W, G in zip(Ws, known, strict=True)]
    while waiting := [one for one in rows if not one.is_done]:
        targets = [one.targets() for one in waiting]
        made = rounder(torch.cat(targets, dim=1))
        parts = zip(*(x.split([T.shape[1] for T in targets], dim=1) for x in made), strict=True)
        for one, own in zip(waiting, parts, strict=True):
            one.accept(own, decode)
    return [tuple(torch.cat(x, dim=1) for x in zip(*one.made, strict=True)) for one in rows]


def levels_at_once(Ws: Sequence[Tensor]) -> int:
    """Return at how many levels weights can be rounded together, by what they lose."""
    return max(1, MAX_LOST // sum(W.numel() for W in Ws))


class _Rows:
    """A weight whose rows are being rounded, and what was lost on the way."""

    def __init__(self, W: Tensor, G: Tensor | None, damp: float, levels: int) -> None:
        self.W = W.expand(levels, *W.shape)
        self.size, self._next = len(W), 0
        self.made: list[Made] = []
        self._lost: Tensor | None = None
        if G is None:
            return
        if G.shape[0] != W.shape[0]:
            raise ValueError(
                f"a weight of shape {tuple(W.shape)} has {W.shape[0]} outputs, the moments of "
                f"its gradients have {G.shape[0]}"
            )
        self.size = max(TILE, -(-len(W) // (GROUPS * TILE)) * TILE)
        self._feedback = block_factor(G.to(W.device), damp, upper=True, block=self.size).T
        self._lost = W.new_empty(levels, *W.shape)

    @property
    def is_done(self) -> bool:
        return self._next >= self.W.shape[1]

    def targets(self) -> Tensor:
        """Return what the rows of the next group are rounded towards, (levels, n, in)."""
        low, high = self._next, min(self._next + self.size, self.W.shape[1])
        T = self.W[:, low:high]
        if self._lost is None or not low:
            return T
        return T + self._feedback[low:high, :low] @ self._lost[:, :low]

    def accept(self, made: Made, decode: Decoder) -> None:
        """Take note of what the rows of the group were rounded to."""
        low, self._next = self._next, self._next + made[0].shape[1]
        self.made.append(made)
        if self._lost is not None and not self.is_done:
            self._lost[:, low : self._next] = self.W[:, low : self._next] - decode(made)
