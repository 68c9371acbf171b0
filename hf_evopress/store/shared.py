"""Levels that two neighbouring layers share: one weight for both, and each one's own difference.

Of layers with weights A and B and second moments of their inputs G and H, the weight in common is
the best for the sum of both outputs' errors, S = (A G + B H) (G + H)^-1. It is compressed once,
along the mean of both moments; what each layer has left is compressed along its own. Sharing
by layers, where Desai and Shrivastava (arXiv:2310.11611, STABLE-RPS) share weights at random.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods import compose
from ..methods.base import State
from ..methods.maths.linalg import Stats
from ..plans.level import Level

RIDGE = 1e-6  # of the mean diagonal: moments of a short text are singular


def shared_states(level: Level, Ws: Sequence[Tensor], stats: Sequence[Stats]) -> list[State]:
    """Return the states of two layers (out, in) at a level that shares its first terms.

    The tensors of these terms are the same in both.
    """
    n = compose.n_shared(level)
    first = Level(level.terms[:n])
    grams = [one.hessian() for one in stats]
    S, shape = _in_common(Ws, grams), (Ws[0].shape[0], Ws[0].shape[1])
    base = compose.compress(first, S, Stats((grams[0] + grams[1]) / 2))
    stored = compose.decompress(first, base, shape, torch.float32)
    made = []
    for W, own in zip(Ws, stats, strict=True):
        rest = Level(level.terms[n:])
        state = compose.compress(rest, W.float() - stored, own)
        made.append({**base, **compose.renumbered(rest, state, n)})
    return made


def _in_common(Ws: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """Return the weight of least summed output error of both layers, float32."""
    # in float64 on the CPU: not every device has it
    (A, B), (G, H) = ([t.double().cpu() for t in pair] for pair in (Ws, grams))
    M = G + H
    M.diagonal().add_(RIDGE * M.diagonal().mean())
    return torch.linalg.solve(M, (A @ G + B @ H).T).T.float().to(Ws[0].device)
