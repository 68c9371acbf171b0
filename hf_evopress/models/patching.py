"""Temporarily replace the forward of modules by that of their levels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..methods import compose
from ..methods.base import State
from ..plans.level import Level
from .dropped import dropped_forward
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
        module = model.get_submodule(unit)
        if level.is_drop:
            forwards[unit] = dropped_forward(model, subs[unit])
        elif unit in states and not level.is_dense:
            assert isinstance(module, nn.Linear)
            shape, weight = (module.out_features, module.in_features), module.weight
            state = {k: v.to(weight.device) for k, v in states[unit].items()}
            forwards[unit] = compose.operator(level, state, module.bias, shape, weight.dtype)
    return forwards


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
