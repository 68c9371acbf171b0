"""Find units that a level breaks at single tokens, which averages over tokens hide.

The predicted loss of a level, `1/2 tr(G dW H dW^T)`, is an average. Beside it stands the
token-level estimate `1/2 mean_t (g_t . dW x_t)^2`, split by position: where it is far above the
prediction, or most of it sits on position 0, the level breaks an attention sink, as GPTQ does
that was calibrated without its moment. A diagnostic, never an objective: it is noisy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.placement import place_of
from ..calibration.output_moments import TokenLoss, token_losses
from ..methods import compose
from ..plans.level import Level
from ..store.level_store import LevelStore

FAR_ABOVE = 10.0  # token-level loss / predicted loss
MOSTLY_FIRST = 0.5  # share of the token-level loss at position 0
COUNTS = 1e-3  # of the loss of all units: less is noise


@dataclass(frozen=True)
class Finding:
    """A unit at a level: token-level and predicted loss in nats per token."""

    unit: str
    tokens: TokenLoss
    predicted: float | None
    share: float  # of the token-level loss of all units

    @property
    def first_share(self) -> float:
        """The share of the token-level loss that arises at position 0."""
        return self.tokens.first / self.tokens.total if self.tokens.total else 0.0

    @property
    def is_alarm(self) -> bool:
        """Whether the level should not be trusted on this unit."""
        if self.share < COUNTS:
            return False
        far = self.predicted is not None and self.tokens.total > FAR_ABOVE * self.predicted
        return far or self.first_share > MOSTLY_FIRST


def diagnose(model: Any, store: LevelStore, level: str | Level, tokens: Tensor) -> list[Finding]:
    """Return what `level` does to each unit that offers it, the largest token-level loss first.

    tokens (n_sequences, seq_len): one forward and backward over them; a few thousand suffice.
    ValueError where no unit has the level.
    """
    deltas = _Deltas(model, store, compose.normalize(level))
    if not deltas:
        known = dict.fromkeys(str(x) for unit in store.units for x in store.levels(unit))
        raise ValueError(f"no unit has the level {level}; the store has: {', '.join(known)}")
    losses = token_losses(model, tokens, deltas)
    total = sum(loss.total for loss in losses.values())
    found = [
        Finding(
            unit,
            loss,
            store.scores(unit, deltas.level).get("sensitivity_nats"),
            loss.total / total if total else 0.0,
        )
        for unit, loss in losses.items()
    ]
    return sorted(found, key=lambda finding: -finding.tokens.total)


class _Deltas(Mapping[str, Tensor]):
    """The error of the level on each unit (out, in) float32, made when it is looked at."""

    def __init__(self, model: Any, store: LevelStore, level: Level) -> None:
        self.model, self.store, self.level = model, store, level
        self.units = [
            unit.name
            for unit in store.units.values()
            if not unit.is_end and level in store.levels(unit.name)
        ]

    def __getitem__(self, unit: str) -> Tensor:
        on_device = place_of(self.model).on_device
        weight = on_device(self.model.get_submodule(unit).weight.detach()).float()
        made = self.store.weight(unit, self.level, torch.float32)
        return made.to(weight.device) - weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.units)

    def __len__(self) -> int:
        return len(self.units)
