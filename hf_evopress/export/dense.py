"""A stock checkpoint with the decompressed weights: no smaller, but read by everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .. import compose
from ..plan import Plan
from .base import Export, States


class DenseExport(Export):
    """Weights as the plan's levels decompress them, rounded to the model's 16-bit dtype."""

    name = "dense"

    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        with torch.no_grad():
            for unit, level in plan.items():
                if not level.is_dense:
                    weight = model.get_submodule(unit).weight
                    shape = (weight.shape[0], weight.shape[1])
                    weight.copy_(
                        compose.decompress(level, states(unit, level), shape, weight.dtype)
                    )
        model.save_pretrained(folder)
