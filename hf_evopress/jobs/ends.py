"""What a recipe leaves open of a model's ends: searched within the budget, at one level, or dense.

auto     heads of models that write no text: dense;
         budgets of size and ratio: searched, for they are of the whole file;
         budgets of bits: 8 bits, outside the budget, which is of the decoder's weights;
         budgets of sparsity and of drops: dense
budget   searched, and a budget of bits counts the weights of the ends as well
dense    as they are
a level  at that level, outside a budget of bits
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..base.patterns import matches
from ..base.resources import parse_size
from ..methods import compose
from ..methods.menu import family_menu, fits
from ..models.classes import class_of
from ..models.ends import find_ends
from ..models.units import Unit
from ..plans.level import DENSE, Level
from ..recipes.recipe import Recipe
from ..recipes.targets import APART

logger = logging.getLogger(__name__)

Shape = tuple[int, int]

# 8 bits cost SmolLM2-135M 0.0003 nats
FIXED_BITS = 8
BITS = (3, 4, 5, 6, 8)
FINE_BITS = (3, 4, 5)  # at half groups as well
# rows at two bit-widths (rest, top, share of the top): of SmolLM2-135M 15.8 MB lose 0.040 nats
# by (4, 6, 0.1), where all rows at 4 bits lose 0.097 in 15.1 MB
ROWS = ((3, 5, 0.1), (3, 6, 0.25), (4, 6, 0.1), (4, 6, 0.25), (5, 8, 0.1), (6, 8, 0.1))
# Below 3 bits an embedding loses much: only files of fewer than 3 bits per weight are offered that.
SMALL = 3
SMALL_ROWS = ((2, 3, 0.25), (2, 4, 0.1), (2, 5, 0.25))


@dataclass(frozen=True)
class Ends:
    """The ends that are compressed: those searched with their menus, and those at one level."""

    units: tuple[Unit, ...] = ()
    menus: Mapping[str, list[Level]] = field(default_factory=dict)
    fixed: Mapping[str, Level] = field(default_factory=dict)
    every: tuple[Unit, ...] = ()  # those that stay dense as well

    def size_bytes(self, levels: Mapping[str, Level]) -> dict[str, int]:
        """Return what each end takes in a file of a plan's levels."""
        return {
            unit.name: compose.cost_bits(levels.get(unit.name, DENSE), unit.shape) // 8
            for unit in self.every
        }

    @property
    def fixed_bits(self) -> int:
        """Stored bits of the ends at one level."""
        shapes = {unit.name: unit.shape for unit in self.units}
        return sum(compose.cost_bits(level, shapes[u]) for u, level in self.fixed.items())


def are_in_budget(recipe: Recipe) -> bool:
    """Return whether the bytes of the ends count, so that their levels are searched."""
    return recipe.ends == "budget" or (recipe.ends == "auto" and recipe.budget.counts_file)


def choose_ends(skeleton: nn.Module, recipe: Recipe, *, small: bool = False) -> Ends:
    """Return what `recipe` leaves open of the ends of a model.

    small: offer levels below 3 bits whatever the budget, as where nothing else is within it.
    """
    said, budget, every = recipe.ends, recipe.budget, tuple(find_ends(skeleton))
    if recipe.export == "vllm":
        if said not in ("auto", "dense"):
            raise ValueError(f"embedding and head stay dense for vllm, got ends={said!r}")
        return Ends(every=every)
    if budget.sparsity is not None or budget.drop is not None:
        if said not in ("auto", "dense"):
            raise ValueError(
                f"ends={said!r} needs a budget of bits, size or ratio; under a budget of sparsity "
                "or of drops the embedding and the head stay dense"
            )
        return Ends(every=every)
    if said == "dense":
        return Ends(every=every)
    units = find_ends(skeleton, skip=recipe.skip)
    _say_skipped([unit for unit in every if unit not in units])
    if recipe.export == "exl3":
        units = [unit for unit in units if unit.role == "head"]  # it has no packed embedding
    if said == "auto" and not class_of(skeleton).generates:
        units = [unit for unit in units if unit.role == "embedding"]
    if are_in_budget(recipe):
        is_small = small or bits_per_weight(skeleton, recipe) < SMALL
        offered = {u.name: _menu(u, recipe, is_small=is_small) for u in units}
        return Ends(tuple(units), offered, every=every)
    fixed = {u.name: _level(u, said, recipe) for u in units}
    return Ends(tuple(units), {name: [level] for name, level in fixed.items()}, fixed, every)


def _say_skipped(units: Sequence[Unit]) -> None:
    """Say what ends that stay dense cost."""
    for unit in units:
        dense, level = 2 * unit.shape[0] * unit.shape[1], default_level(unit.shape)
        packed = compose.cost_bits(level, unit.shape) / 8
        logger.warning(
            "%s is skipped and stays dense: %.3g MB of 16 bits, of which 8 bits would save %.3g MB",
            unit.name,
            dense / 1e6,
            (dense - packed) / 1e6,
        )


def default_level(shape: Shape) -> Level:
    """Return the level of an end that is not searched."""
    return compose.normalize(f"rtn:bits={FIXED_BITS},group_size={_group(shape)}")


def bits_per_weight(skeleton: nn.Module, recipe: Recipe) -> float:
    """Return what the budget leaves a weight of the whole model, in bits."""
    budget = recipe.budget
    if budget.size is None:
        return budget.bits if budget.bits is not None else 16 * (budget.ratio or 1.0)
    return 8 * parse_size(budget.size) / sum(p.numel() for p in skeleton.parameters())


def _menu(unit: Unit, recipe: Recipe, *, is_small: bool) -> list[Level]:
    """Return the levels that an end is offered, cheapest first: ours, and those of the user.

    Of the latter an embedding is offered those whose rows can be looked up one by one. is_small:
    whether the budget leaves so few bits that some below 3 are offered as well.
    """
    shape = unit.shape
    if recipe.export in APART:
        words = [*family_menu(shape, recipe.offered_families, None), *(recipe.levels or ())]
        found = dict.fromkeys(compose.normalize(word) for word in words)
        return _by_cost([x for x in found if not x.is_drop and _serves(x, shape)], shape)
    group = _group(shape)
    words = [f"gptq:bits={b},group_size={group}" for b in BITS]
    if group % 64 == 0:
        words += [f"gptq:bits={b},group_size={group // 2}" for b in FINE_BITS]
    rows = (*SMALL_ROWS, *ROWS) if is_small else ROWS
    words += [f"rows:bits={b},top_bits={t},top={s},group_size={group}" for b, t, s in rows]
    if is_small:
        words.append(f"gptq:bits=2,group_size={group}")
    offered = dict.fromkeys([compose.normalize(w) for w in words] + [default_level(shape)])
    for level in map(compose.normalize, recipe.levels or ()):
        is_able = unit.role == "head" or compose.looks_up_rows(level)
        is_own = not (level.is_dense or level.is_drop or compose.n_shared(level))
        if is_able and is_own and _serves(level, shape):
            offered[level] = None
    return _by_cost(offered, shape)


def _by_cost(levels: Iterable[Level], shape: Shape) -> list[Level]:
    return sorted(levels, key=lambda level: (compose.cost_bits(level, shape), str(level)))


def _serves(level: Level, shape: Shape) -> bool:
    """Return whether an end takes a level: an embedding has no bias that could be corrected."""
    is_corrected = fits(level, shape) and "bias_fix" in compose.empty(level, shape, torch.float32)
    return fits(level, shape) and not is_corrected


def _level(unit: Unit, said: str, recipe: Recipe) -> Level:
    """Return the level of an end outside the budget; the last pin that matches it wins."""
    level = compose.normalize(said) if said != "auto" else default_level(unit.shape)
    if said == "auto" and recipe.export in APART:
        level = family_menu(unit.shape, recipe.offered_families, None)[-1]  # of 8 bits
    for pattern, text in recipe.pin.items():
        if matches(unit.name, pattern):
            level = compose.normalize(text)
    if level.is_drop:
        raise ValueError(f"{unit.name} cannot be dropped; give it a level, or dense")
    if fits(level, unit.shape) and not _serves(level, unit.shape):
        raise ValueError(f"{unit.name}: level '{level}' corrects a bias; leave centred out")
    try:
        compose.check_shape(level, unit.shape)
    except ValueError as error:
        raise ValueError(f"{unit.name}: {error}") from error
    return level


def _group(shape: Shape) -> int:
    return next((g for g in (64, 32, 16) if shape[1] % g == 0), -1)
