"""Which widths of a recipe can be searched, found out before any weight is loaded."""

from __future__ import annotations

import copy
import logging

import torch
from torch import nn

from ..models.narrow import CHANNELS, kept_channels, narrowed, widths
from ..models.units import find_blocks
from ..recipes.recipe import Recipe
from ..recipes.targets import channel_step
from .problem import pose

logger = logging.getLogger(__name__)


def channels_to_try(skeleton: nn.Module, recipe: Recipe) -> tuple[int, ...]:
    """Return how many channels of each MLP the widths of `recipe` leave, those that fit its size.

    ValueError for models that cannot be narrowed, and where no width fits.
    """
    if not recipe.widths:
        return ()
    step = channel_step(recipe.export)
    found, errors = [], []
    for channels in kept_channels(skeleton, recipe.widths, skip=recipe.skip, step=step):
        try:
            pose(narrow_skeleton(skeleton, channels), recipe)
        except ValueError as error:
            errors.append(error)
            logger.warning("%d channels: %s; this width is left out", channels, error)
        else:
            found.append(channels)
    if not found:
        raise errors[-1]
    return tuple(found)


def has_own_width(skeleton: nn.Module, channels: tuple[int, ...]) -> bool:
    """Return whether a model is among the widths that are tried, as it is where none are."""
    return not channels or widths(skeleton)[CHANNELS] in channels


def narrow_skeleton(skeleton: nn.Module, channels: int) -> nn.Module:
    """Return a copy of a model without weights that has fewer channels."""
    kept = torch.arange(channels, device="meta")
    n_blocks = len(find_blocks(skeleton)[1])
    made: nn.Module = narrowed(copy.deepcopy(skeleton), channels=[kept] * n_blocks)
    return made
