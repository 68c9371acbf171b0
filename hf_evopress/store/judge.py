"""What is measured of a level when it is made: its error, and the KL that it is expected to add."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..methods import compose
from ..methods.base import State
from ..methods.maths.linalg import Stats
from ..plans.level import Level

Loss = Callable[[Tensor], float]  # error dW (out, in) -> KL in nats per token that it is to add


class Judge:
    """Measures levels of one weight (out, in) float32; what the weight alone decides, once.

    stats: without them nothing is measured. loss: None where sensitivities are not known.
    """

    def __init__(self, W: Tensor, stats: Stats | None, loss: Loss | None) -> None:
        self.W, self.loss = W, loss
        moments = {} if stats is None else {"error": stats.gram, "heldout_error": stats.heldout}
        self.moments = {name: H for name, H in moments.items() if H is not None}
        self.energies = {name: _energy(W, H) for name, H in self.moments.items()}

    def scores(self, level: Level, state: State) -> dict[str, float]:
        """Return the scores of a level, as `LevelStore.scores` has them."""
        if not self.moments:
            return {}
        shape = (self.W.shape[0], self.W.shape[1])
        delta = self.W - compose.decompress(level, state, shape, torch.float32)
        found = {}
        for name, H in self.moments.items():
            energy = self.energies[name]
            found[name] = _energy(delta, H) / energy if energy > 0 else 0.0
        if self.loss is not None:
            found["sensitivity_nats"] = self.loss(delta)
        return found


def _energy(W: Tensor, H: Tensor) -> float:
    """Return tr(W H W^T)."""
    return float(((W @ H) * W).sum())
