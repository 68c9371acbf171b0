"""Temporarily replace the forward of modules by that of their levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.placement import Place, place_of
from ..methods import compose
from ..methods.base import Shape, State
from ..plans.level import Level
from .dropped import dropped_forward
from .ends import embedding_forward, find_ends, output_head
from .sub_blocks import find_sub_blocks


def operators(
    model: nn.Module, levels: Mapping[str, Level], states: Mapping[str, State]
) -> dict[str, Any]:
    """Return unit -> forward at its level: of the packed tensors in `states`, or dropped.

    Units that are dense, or whose state is not given, are left out.
    """
    forwards: dict[str, Any] = {}
    subs = {}
    if any(level.is_drop for level in levels.values()):
        subs = {sub.name: sub for sub in find_sub_blocks(model)}
    for unit, level in levels.items():
        if level.is_drop:
            forwards[unit] = dropped_forward(model, subs[unit])
        elif unit in states and not level.is_dense:
            forwards |= unit_operators(model, unit, level, states[unit])
    return forwards


def unit_operators(model: nn.Module, unit: str, level: Level, state: State) -> dict[str, Any]:
    """Return module path -> forward of the modules that compute with the weight of one unit.

    One, or where the embedding's weight is the head's as well, two.
    """
    module: Any = model.get_submodule(unit)
    weight, place = module.weight, place_of(model)
    shape = (weight.shape[0], weight.shape[1])
    device, dtype = place.device or weight.device, place.dtype or weight.dtype
    state = {k: v.to(device) for k, v in state.items()}
    if not isinstance(module, nn.Embedding):
        return {unit: compose.operator(level, state, _brought(place, module.bias), shape, dtype)}

    def rows(ids: Tensor) -> Tensor:
        return look_up(level, state, shape, ids, dtype)

    made = {unit: embedding_forward(module, rows)}
    head = output_head(model)
    if head is not None and any(end.role == "tied" for end in find_ends(model)):
        made[head[0]] = compose.operator(level, state, _brought(place, head[1].bias), shape, dtype)
    return made


def _brought(place: Place, bias: Tensor | None) -> Tensor | None:
    return None if bias is None else place.bring(bias.detach())


def look_up(level: Level, state: State, shape: Shape, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows (..., in) of a packed weight for token ids (...)."""
    rows = compose.decompress_rows(level, state, shape, ids.reshape(-1), dtype)
    return rows.view(*ids.shape, shape[1])


@contextmanager
def patched(model: nn.Module, forwards: Mapping[str, Any]) -> Iterator[None]:
    """Replace the forwards of some modules for a while."""
    modules = {name: model.get_submodule(name) for name in forwards}
    saved = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = forwards[name]
        yield
    finally:
        for name, module in modules.items():
            if (forward := saved[name]) is not None:
                module.forward = forward
            elif "forward" in module.__dict__:
                del module.forward
