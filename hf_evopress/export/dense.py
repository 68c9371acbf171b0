"""A stock checkpoint with the decompressed weights: no smaller, but read by everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..methods import compose
from ..models.dropped import dropped_units, set_zero
from ..models.plain import make_stock
from ..plans.plan import Plan
from .base import Export, States


class DenseExport(Export):
    """Weights as the plan's levels decompress them, rounded to the model's 16-bit dtype.

    Dropped sub-blocks are there with weights of zero.
    """

    name = "dense"
    takes_any_class = True

    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        for unit in dropped_units(plan):
            set_zero(model.get_submodule(unit))
        write_weights(model, plan, states)
        make_stock(model)
        model.save_pretrained(folder)


@torch.no_grad()
def write_weights(model: Any, plan: Plan, states: States) -> None:
    """Put the weights that the levels of `plan` stand for into the layers of `model`."""
    for unit, level in plan.items():
        if level.is_dense or level.is_drop:
            continue
        linear, state = model.get_submodule(unit), states(unit, level)
        shape = (linear.weight.shape[0], linear.weight.shape[1])
        linear.weight.copy_(compose.decompress(level, state, shape, linear.weight.dtype))
        fix = compose.bias_fix(level, state)
        if fix is not None and linear.bias is None:
            raise ValueError(
                f"{unit}: level '{level}' corrects the bias, and a stock checkpoint of this "
                "architecture has none here; use the evopress export, or leave centred out"
            )
        if fix is not None:
            linear.bias.add_(fix.to(linear.bias))
