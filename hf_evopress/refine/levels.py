"""Refine chosen levels before the search, so that it compares what will ship.

Refinement can change which of two plans is better: what the search compares should then be levels
that are tuned already. Each chosen level is given to every unit that offers it, and the blocks are
tuned one by one, each on the dense model's inputs, as the plan that it will stand in is not known
yet. A level takes the time of `refine --mode best` once (2700 CPU s for one level of
SmolLM2-135M), and serves every budget.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.fingerprint import text_fingerprint
from ..base.patterns import matches
from ..base.plugins import did_you_mean
from ..base.progress import Progress
from ..methods import compose
from ..methods.base import State
from ..plans.level import Level
from ..store.level_store import LevelStore
from .blockwise import Settings, refine
from .states import RefinedStates, read_notes

logger = logging.getLogger(__name__)


class RefinedLevels(LevelStore):
    """A level store in which some levels are tuned, with the losses to expect of them."""

    def __init__(self, store: LevelStore, made: Mapping[Level, RefinedStates]) -> None:
        self.__dict__.update(store.__dict__)
        self.store, self.made = store, dict(made)
        refined = sorted(f"{level} {states.refined.name}" for level, states in made.items())
        fingerprint = {**store.index["fingerprint"], "refined": refined}
        self.index = {**store.index, "fingerprint": fingerprint}
        self._gains: dict[tuple[Level, int], float] = {}

    def state(self, unit: str, level: Level | str) -> State:
        """Return the packed tensors of `unit` at `level`."""
        return self.made.get(compose.normalize(level), self.store).state(unit, level)

    def scores(self, unit: str, level: Level | str) -> dict[str, float]:
        """Return the store's scores; the expected KL shrinks as the block's held-out loss did."""
        level = compose.normalize(level)
        scores = self.store.scores(unit, level)
        if level not in self.made or "sensitivity_nats" not in scores:
            return scores
        gain = self._gain(level, self.units[unit].block)
        return {**scores, "sensitivity_nats": gain * scores["sensitivity_nats"]}

    def _gain(self, level: Level, block: int) -> float:
        if (level, block) not in self._gains:
            file = self.made[level].file(block)
            notes = read_notes(file) if file.is_file() else {}
            losses = [value for value in notes.values() if isinstance(value, float)]
            is_known = bool(losses) and notes["before"] > 0
            self._gains[level, block] = min(losses) / notes["before"] if is_known else 1.0
        return self._gains[level, block]


def refine_levels(
    model: Any,
    store: LevelStore,
    patterns: Sequence[str],
    tokens: Tensor,
    heldout: Tensor,
    folder: str | Path,
    *,
    settings: Settings,
    loss: Callable[[LevelStore, Mapping[str, Level]], float],
    moments: Callable[[int], Mapping[str, Tensor]] | None = None,
    progress: Progress | None = None,
) -> LevelStore:
    """Return `store` with the levels that match any of `patterns` tuned, kept in `folder`.

    loss(store, levels): of a plan, on tokens that make no level; a level stays as it was unless
    the plan that gives it to all units is better with it. A run that was stopped goes on at the
    next block. Raises ValueError for a pattern that no level matches.
    """
    settings = dataclasses.replace(settings, mode="best", alphas=(), is_alone=True)
    made = {}
    units = [unit.name for unit in store.units.values() if not unit.is_end]
    offered = (level for unit in units for level in store.levels(unit))
    for level in chosen(offered, patterns):
        levels = {unit: level for unit in units if level in store.levels(unit)}
        name = text_fingerprint(str(level), repr(settings), *levels)
        label = f"refine {level}"
        states = refine(
            model,
            store,
            levels,
            tokens,
            heldout,
            Path(folder) / name,
            settings=settings,
            moments=moments,
            progress=(lambda _, *done, at=label: progress(at, *done)) if progress else None,
        )
        before, after = loss(store, levels), loss(states, levels)
        logger.info("%s: %.4f before, %.4f after, on search tokens", label, before, after)
        if after < before:
            made[level] = states
        else:
            logger.warning("%s did not help (%.4f -> %.4f) and is not kept", label, before, after)
    return RefinedLevels(store, made)


def chosen(levels: Iterable[Level], patterns: Sequence[str]) -> list[Level]:
    """Return those of `levels`, but dense ones, that match any of `patterns`."""
    offered = {str(level): level for level in levels if not level.is_dense}
    for pattern in patterns:
        if not any(matches(name, pattern) for name in offered):
            hint = did_you_mean(pattern, sorted(offered))
            raise ValueError(f"refine_levels: no level offered matches {pattern!r}{hint}")
    return [x for n, x in offered.items() if any(matches(n, pattern) for pattern in patterns)]
