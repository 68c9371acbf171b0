"""HfQuantizer with one interface, whichever version of transformers it is from: 5.16 or later.

    5.16 - 5.20   update_weight_conversions(conversions), update_tp_plan(config)
    from 5.21     update_weight_conversions(conversions, model), update_parallel_plan(model, plan)

5.15 is not supported: its tokenizers are capped at 0.23.0, and nothing was run there.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers.quantizers.base import HfQuantizer

HAS_MODEL = "model" in inspect.signature(HfQuantizer.update_weight_conversions).parameters


class AnyHfQuantizer(HfQuantizer):
    """What our quantizer builds on, which defines the first three methods."""

    def look_at(self, model: Any) -> None:
        """Note what `conversions` has to know of a model, which is not passed up to 5.20."""

    def conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Return what transformers is to convert while it loads or saves."""
        return weight_conversions

    def check_parallel(self, config: Any) -> None:
        """Raise ValueError for a config that asks for parallelism which cannot be had."""

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Called while loading and saving, with the model from 5.21 on."""
        if model:
            self.look_at(*model)
        made = self.conversions(weight_conversions)
        return super().update_weight_conversions(made, *(model if HAS_MODEL else ()))

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Called from 5.21 on."""
        self.check_parallel(model.config)

    def update_tp_plan(self, config: Any) -> Any:
        """Called up to 5.20."""
        self.check_parallel(config)
        return config
