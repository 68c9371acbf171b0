"""The linear layers of a vision tower, which can be compressed beside the text part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..base.patterns import matches
from .plain import shape_of
from .units import Unit, is_linear

BLOCK = -2  # where they stand in the order of blocks: before the embedding


def find_vision_units(model: nn.Module, *, skip: Sequence[str] = ()) -> list[Unit]:
    """Return the linear layers in the blocks of a model's vision tower, in module order.

    Left out are projections into the text part, layers inside nn.MultiheadAttention, whose weight
    is read without a call, and those that a pattern of `skip` matches. ValueError without a tower.
    """
    tower: Any = getattr(model, "get_encoder", lambda modality: model)(modality="image")
    if tower is model or not isinstance(tower, nn.Module):
        raise ValueError(f"{type(model).__name__} has no vision tower")
    path = next(name for name, module in model.named_modules() if module is tower)
    closed = [n for n, m in tower.named_modules() if isinstance(m, nn.MultiheadAttention)]
    units = [
        Unit(f"{path}.{name}.{inner}", shape_of(linear), BLOCK)
        for name, blocks in tower.named_modules()
        if isinstance(blocks, nn.ModuleList)
        for inner, linear in blocks.named_modules()
        if is_linear(linear) and not any(f"{name}.{inner}".startswith(f"{c}.") for c in closed)
    ]
    units = list({unit.name: unit for unit in units}.values())
    kept = [u for u in units if not any(matches(u.name, pattern) for pattern in skip)]
    if not kept:
        raise ValueError(f"the vision tower of {type(model).__name__} has no layer to compress")
    return kept
