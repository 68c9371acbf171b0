"""Compress for a target: this machine's where none is said, what vLLM and exllamav3 take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ..export.exl3_format.tensors import LEVEL, obstacles
from ..export.vllm_limits import ON_GPUS
from ..methods import compose
from ..methods.base import Shape
from ..methods.maths.codes import CodedMethod
from ..plans.level import Level
from ..recipes.recipe import Recipe
from ..recipes.targets import DEFAULT, default_target


def for_this_machine(recipe: Recipe, device: torch.device) -> Recipe:
    """Return the recipe with the target of the machine, where neither it nor levels are said."""
    is_open = recipe.export == DEFAULT and not (recipe.levels or recipe.families)
    target = default_target(device.type)
    return dataclasses.replace(recipe, export=target) if is_open else recipe


def check_for_vllm(menus: Mapping[str, Sequence[Level]]) -> None:
    """Raise ValueError that names a level which vLLM's own kernels do not read."""
    for unit, menu in menus.items():
        for level in menu:
            if not _is_for_vllm(level):
                raise ValueError(
                    f"{unit} is offered '{level}', which vLLM does not read from an export to "
                    "compressed_tensors: offer codes of 4 or 8 bits, dense, or leave levels out"
                )


def check_for_exl3(menus: Mapping[str, Sequence[Level]], shapes: Mapping[str, Shape]) -> None:
    """Raise ValueError that names a level which exllamav3 does not read."""
    for unit, menu in menus.items():
        for level in menu:
            if not level.is_dense and (why := next(obstacles(level, shapes[unit]), None)):
                raise ValueError(
                    f"{unit}: exllamav3 does not read what it is offered: {why}; offer levels such "
                    f"as {LEVEL.format(bits=3)}, dense, or leave levels out"
                )


def _is_for_vllm(level: Level) -> bool:
    if level.is_dense:
        return True
    known = compose.normalize(level)
    parts = list(compose.parts(known))
    part, params, _ = parts[0]
    return len(parts) == 1 and isinstance(part, CodedMethod) and params["bits"] in ON_GPUS
