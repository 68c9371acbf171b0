"""What a model's modules compute at their levels, kept while there is room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..base.placement import place_of
from ..methods.base import Operator
from ..models.patching import unit_operators
from ..plans.level import Level
from ..store.level_store import LevelStore


class OperatorCache:
    """Operators of (unit, level) by module path, least recently used dropped first."""

    def __init__(self, model: Any, store: LevelStore, limit_bytes: int) -> None:
        self.model, self.store, self.limit_bytes = model, store, limit_bytes
        self.size_bytes = 0
        self._kept: OrderedDict[tuple[str, Level, str], tuple[Any, int]] = OrderedDict()

    def clear(self) -> None:
        """Forget all."""
        self._kept.clear()
        self.size_bytes = 0

    def get(self, unit: str, level: Level) -> dict[str, Operator]:
        def make() -> dict[str, Operator]:
            return unit_operators(self.model, unit, level, self.store.state(unit, level))

        return self._get((unit, level, "operators"), make)

    def head_weight(self, unit: str, level: Level) -> Tensor:
        """Return the dense weight of the head at a level."""
        own = self.model.get_submodule(unit).weight

        def make() -> Tensor:
            dtype = place_of(self.model).dtype or own.dtype
            made = self.store.weight(unit, level, dtype)
            return made.to(place_of(self.model).device or own.device)

        return self._get((unit, level, "weight"), make)

    def _get(self, key: tuple[str, Level, str], make: Callable[[], Any]) -> Any:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        made = make()
        shape = self.store.units[key[0]].shape
        size = shape[0] * shape[1] * self.model.get_submodule(key[0]).weight.element_size()
        self._kept[key] = (made, size)
        self.size_bytes += size
        while self.size_bytes > self.limit_bytes and len(self._kept) > 1:
            _, (_, freed) = self._kept.popitem(last=False)
            self.size_bytes -= freed
        return made
