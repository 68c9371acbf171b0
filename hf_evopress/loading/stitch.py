"""Apply a plan to a dense model in memory: calibrate, compress and replace block by block."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.devices import find_device
from ..base.placement import computing_on, place_of
from ..base.progress import Progress
from ..calibration.end_moments import load_ends
from ..calibration.input_moments import calibrate, load_stats
from ..calibration.output_moments import load_moments, output_moments
from ..methods import compose
from ..methods.maths.linalg import Stats
from ..models.classes import text_length
from ..models.dropped import replace_dropped
from ..models.ends import find_ends
from ..models.plain import match_plan
from ..models.units import Unit, find_units
from ..plans.level import Level
from ..plans.plan import Plan
from ..recipes.recipe import Search
from .layers import planned_levels
from .replace import replace


def compress_model(
    model: Any, plan: Plan, tokens: Tensor | None, *, progress: Progress | None = None
) -> None:
    """Replace, in place, the linear layers and sub-blocks of `model` by their levels in `plan`.

    tokens (n_sequences, seq_len) calibrate levels that need it, and may be None if none does;
    statistics are those of the dense model, sensitivities by a recipe's default number of tokens
    included, as in the level store, so the same text gives the same tensors. The statistics of
    all blocks pass through a temporary folder; one block's are in memory.
    """
    with computing_on(model, find_device()):
        _compress(model, plan, tokens, progress)


def _compress(model: Any, plan: Plan, tokens: Tensor | None, progress: Progress | None) -> None:
    match_plan(model, plan)
    levels = planned_levels(model, plan)
    absent = [name for name in levels if model.get_submodule(name).weight.is_meta]
    if absent:
        raise ValueError(
            f"device_map keeps {absent[0]} on the CPU and lends it to another device while it "
            "runs, and such a model cannot be compressed with calibration data: load it without "
            "device_map, save it, and load the result with this device_map"
        )
    units = [unit for unit in find_units(model) if unit.name in levels]
    if unknown := set(levels) - {u.name for u in [*units, *find_ends(model)]}:
        raise ValueError(
            f"the plan has a level for {min(unknown)}, which is outside the blocks of the text "
            "part: make such a model with compress --vision"
        )
    ends = [unit for unit in find_ends(model) if unit.name in levels]
    with tempfile.TemporaryDirectory(prefix="evopress-") as folder, torch.no_grad():
        if any(compose.needs_stats(level) for level in levels.values()):
            assert tokens is not None
            made = [unit for unit in ends if compose.needs_stats(levels[unit.name])]
            calibrate_levels(model, tokens, folder, [*units, *made], levels, progress=progress)
        for block in sorted({unit.block for unit in units}):
            of_block = [unit for unit in units if unit.block == block]
            _replace(model, of_block, levels, block_stats(folder, of_block, levels))
            if progress:
                progress("compress", block + 1, units[-1].block + 1)
        known = [unit for unit in ends if compose.needs_stats(levels[unit.name])]
        moments = load_ends(folder, known)
        _replace(model, ends, levels, {name: of.stats() for name, of in moments.items()})
    replace_dropped(model, plan)


def calibrate_levels(
    model: Any,
    tokens: Tensor,
    folder: str | Path,
    units: Sequence[Unit],
    levels: Mapping[str, Level],
    *,
    progress: Progress | None = None,
) -> None:
    """Write to `folder` the statistics that `levels` of `units`, ends among them, are made from."""
    calibrate(model, tokens, folder, units=units, progress=progress)
    felt = [unit for unit in units if unit.is_end or compose.uses_outputs(levels[unit.name])]
    if felt:
        n = max(1, Search().sensitivity_tokens // text_length(model, tokens))
        output_moments(model, tokens[:n], folder, units=felt, counted=tokens, progress=progress)


def block_stats(
    folder: str | Path, units: Sequence[Unit], levels: Mapping[str, Level]
) -> Mapping[str, Stats]:
    """Return what is known of each unit of one block, its outputs' moments where there are some."""
    if not any(compose.needs_stats(levels[unit.name]) for unit in units):
        return {}
    block = units[0].block
    stats = load_stats(folder, block)
    if not any(compose.uses_outputs(levels[unit.name]) for unit in units):
        return stats
    try:
        moments = load_moments(folder, block)
    except FileNotFoundError:  # an earlier run's, which took no sensitivities
        return stats
    return {name: of.with_outputs([moments.get(name)]) for name, of in stats.items()}


def _replace(
    model: Any, units: list[Unit], levels: Mapping[str, Level], stats: Mapping[str, Stats]
) -> None:
    brought: dict[int, Stats] = {}  # units with one input share them, and their factors
    for unit in units:
        level = levels[unit.name]
        weight = model.get_submodule(unit.name).weight.detach()
        W = place_of(model).on_device(weight).float()
        known = stats.get(unit.name)
        if known is not None and known.gram.device != W.device:
            if id(known) not in brought:
                brought[id(known)] = known.map(lambda t, to=W.device: t.to(to))  # type: ignore[misc]
            known = brought[id(known)]
        try:
            state = compose.compress(level, W, known)
        except ValueError as error:
            raise ValueError(f"{unit.name}: {error}") from error
        state = {name: tensor.to(weight.device) for name, tensor in state.items()}
        replace(model, unit.name, level, state)
