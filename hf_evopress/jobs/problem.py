"""The search space and budget of a recipe: units, their menus, sub-blocks that may be dropped.

Nothing here needs weights: a model on the meta device has names, shapes and dtypes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ..base.patterns import matches
from ..methods import compose
from ..methods.menu import menus
from ..models.kv_cache import CacheUnit, cache_level, cache_menus, find_caches
from ..models.size import NOTICE, header_bytes
from ..models.sub_blocks import KINDS, Droppable, SubBlock, droppable, find_sub_blocks
from ..models.units import Unit, find_units
from ..models.vision import find_vision_units
from ..plans.level import DENSE, DROP, Level
from ..plans.plan import Plan
from ..recipes.recipe import Recipe
from ..recipes.targets import fused_for
from ..search.budget import Budget
from ..search.drop_counts import drop_counts
from ..search.space import Genome, SearchSpace
from .ends import Ends, are_in_budget, bits_per_weight, choose_ends, default_level
from .for_gguf import check_menus, fitting_menus, fixed_bits, is_for_gguf
from .for_target import check_for_exl3, check_for_vllm
from .shared_levels import check_shared, with_shared
from .starting_plans import with_starts

NOTHING = Droppable({}, {}, {})
# what stands in for dropped attention counts tokens by a key and a value of one 16-bit number
STAND_IN_BITS = 2 * 16


@dataclass(frozen=True)
class Problem:
    """The units to compress, the levels offered to each, what may be dropped; space and budget.

    Under a budget of drops no unit is searched: what is kept stays dense. `ends` are among the
    units; those at one level are in every plan, and not in the space. `caches`, under a budget with
    a context, are genes of the space whose levels are the plan's `cache`.
    """

    units: tuple[Unit, ...]
    menus: Mapping[str, list[Level]]
    added: Droppable
    space: SearchSpace
    budget: Budget
    ends: Ends = field(default_factory=Ends)
    caches: Mapping[str, CacheUnit] = field(default_factory=dict)

    def levels(self, genome: Genome) -> dict[str, Level]:
        """Return the levels of a plan: unit -> level, and the sub-blocks that are dropped."""
        found = self.added.plan_levels(self.space.levels(genome))
        made = {unit: _normal(level) for unit, level in found.items()}
        return {**made, **self.ends.fixed}

    def genome(self, levels: Mapping[str, Any]) -> Genome:
        """Return the genome of a plan, or of its levels, the inverse of `levels`."""
        said = {u: str(_normal(x)) for u, x in levels.items() if u not in self.ends.fixed}
        said |= {u: str(_normal(level)) for u, level in getattr(levels, "cache", {}).items()}
        for name in self.caches:
            if self.added.inside.get(name) not in said:  # else dropped: there is no cache
                said.setdefault(name, str(DENSE))
        for end in self.ends.units:  # plans of before left them dense
            if end.name in self.menus and end.name not in {*said, *self.ends.fixed}:
                said[end.name] = str(default_level(end.shape))
        return self.space.genome(self.added.space_levels(said))

    def cache_bytes(self, genome: Genome, context: int) -> int:
        """Return the bytes of the cache of `context` tokens, with stand-ins of dropped layers."""
        kept = self.space.levels(genome)
        bits = self.space.cache_bits(genome)
        bits += sum(STAND_IN_BITS * context for name in self.caches if name not in kept)
        return bits // 8

    def starts(self, plans: Sequence[str]) -> list[Genome]:
        """Return the genomes of plans to begin a search with: files, folders, Hub repositories.

        Raises ValueError that names one that is over the budget or not of these menus.
        """
        found = []
        for name in plans:
            plan = Plan.from_pretrained(name)
            try:
                genome = self.genome(plan)
            except ValueError as error:
                fits = {*plan.levels} <= {*self.menus, *self.added.options}
                how = "; offer the plan's levels as well (--level), skip what it has not (--skip)"
                tail = how if fits else ""
                raise ValueError(f"the search cannot start from {name}: {error}{tail}") from error
            if not self.budget.allows(self.space, genome):
                bits = self.space.bits_per_weight(genome)
                raise ValueError(
                    f"the search cannot start from {name}, of {bits:.3f} bits per weight: the "
                    f"budget is {self.budget.text}"
                )
            found.append(genome)
        return found


def pose(skeleton: nn.Module, recipe: Recipe, *, is_searched: bool = True) -> Problem:
    """Return the problem that `recipe` poses for a model, in the dtype to ship, on any device.

    Where no plan is within the budget, the ends are offered their smallest levels as well.
    is_searched: False where its units are looked at alone, so that any size will do.
    """
    bits = budget_bits(skeleton, recipe)
    parts = _parts(skeleton, recipe, bits)
    if not is_searched:
        return Problem(**parts, budget=Budget(parts["space"].max_cost, "none"))
    try:
        budget = _budget(recipe, parts)
    except ValueError:
        if not are_in_budget(recipe):
            raise
        parts = _parts(skeleton, recipe, bits, small_ends=True)
        budget = _budget(recipe, parts)
    return Problem(**parts, budget=budget)


def budget_bits(skeleton: nn.Module, recipe: Recipe) -> tuple[float, float] | None:
    """Return the least and the most that the budgets of a recipe leave a weight, in bits.

    None for all of the dense size, which is no limit. What caches take of a size is not known
    before the search: as little as 0 may be left.
    """
    if recipe.budget.ratio == 1.0:
        return None
    high = bits_per_weight(skeleton, recipe)
    if recipe.budget.context is not None:
        return 0.0, high
    least = 0.0 if recipe.search.strategy == "pareto" else high
    return float(recipe.search.settings.get("low", least)), high


def _parts(
    skeleton: nn.Module,
    recipe: Recipe,
    bits: tuple[float, float] | None,
    *,
    small_ends: bool = False,
) -> dict[str, Any]:
    """Return all of a problem but its budget, by the names of its fields."""
    said = recipe.budget
    units = [] if said.drop is not None else find_units(skeleton, skip=recipe.skip)
    if recipe.vision and said.drop is None:
        units = [*find_vision_units(skeleton, skip=recipe.skip), *units]
    shapes = {unit.name: unit.shape for unit in units}
    if is_for_gguf(recipe) and recipe.levels:
        offered = fitting_menus(shapes, recipe.levels)
    else:
        families = recipe.families if recipe.levels else recipe.offered_families
        offered = menus(shapes, recipe.levels, families=families, sparsity=said.sparsity, bits=bits)
        if not recipe.levels:
            offered = with_starts(offered, shapes, recipe.search.start)
    offered, pairs = with_shared(offered, shapes, recipe)
    ends = choose_ends(skeleton, recipe, small=small_ends)
    units, offered = [*units, *ends.units], {**offered, **ends.menus}
    offered = _pinned(offered, recipe.pin)
    check_shared(offered, pairs)
    if is_for_gguf(recipe):
        check_menus(offered)
    if recipe.export == "vllm":
        check_for_vllm(offered)
    if recipe.export == "exl3":
        check_for_exl3(offered, {unit.name: unit.shape for unit in units})
    added = NOTHING
    if recipe.drop.kinds or said.drop is not None:
        added = droppable(
            skeleton,
            units,
            kinds=recipe.drop.kinds or KINDS,  # type: ignore[arg-type]
            keep_first=recipe.drop.keep_first,
            keep_last=recipe.drop.keep_last,
        )
    caches = {} if said.context is None else {cache.name: cache for cache in find_caches(skeleton)}
    added = _with_caches(added, caches.values())
    space = _space(skeleton, units, offered, added, recipe, ends, caches, pairs)
    return {
        "units": tuple(units),
        "menus": offered,
        "added": added,
        "space": space,
        "ends": ends,
        "caches": caches,
    }


def _budget(recipe: Recipe, parts: Mapping[str, Any]) -> Budget:
    said, space = recipe.budget, parts["space"]
    if said.drop is not None:
        return Budget.of_drops(space)
    inside = sum(cache.name in parts["added"].inside for cache in parts["caches"].values())
    return Budget.parse(
        space,
        bits=said.bits,
        size=said.size,
        ratio=said.ratio,
        sparsity=said.sparsity,
        context=said.context,
        reserved_bits=STAND_IN_BITS * (said.context or 0) * inside,
    )


def _with_caches(added: Droppable, caches: Iterable[CacheUnit]) -> Droppable:
    """Return what may be dropped with the caches of attention among what lies inside."""
    inside = {c.name: c.attention for c in caches if c.attention in added.options}
    return replace(added, inside={**added.inside, **inside})


def _space(
    skeleton: nn.Module,
    units: Sequence[Unit],
    offered: Mapping[str, list[Level]],
    added: Droppable,
    recipe: Recipe,
    ends: Ends,
    caches: Mapping[str, CacheUnit],
    pairs: Sequence[tuple[str, str]],
) -> SearchSpace:
    fixed, dense = _fixed_bits(skeleton, units, offered)
    if is_for_gguf(recipe):
        fixed = fixed_bits(skeleton, units, recipe)
    fixed += ends.fixed_bits
    units = [unit for unit in units if unit.name not in ends.fixed]
    outside = {unit.name for unit in ends.units}
    sub_blocks = {sub.name: sub for sub in find_sub_blocks(skeleton)} if added.options else {}
    menu: dict[str, Any] = {
        unit.name: [_option(level, unit, recipe) for level in offered[unit.name]] for unit in units
    }
    menu |= {sub: _sub_options(options, recipe) for sub, options in added.options.items()}
    menu |= {
        name: [(str(x), caches[name].cost_bits(x, recipe.budget.context or 0)) for x in levels]
        for name, levels in cache_menus(list(caches.values()), recipe.cache).items()
    }
    sizes = {unit.name: unit.n_weights for unit in units}
    # Where only drops are searched, a sub-block stands for the weights in it.
    inside = {u.name: u.n_weights for u in find_units(skeleton)} if not units else {}
    for sub in added.options:
        sizes[sub] = sum(inside.get(u, 0) for u in sub_blocks[sub].units)
    sizes |= dict.fromkeys(caches, 0)
    space = SearchSpace.build(
        sizes,
        menu,
        fixed_bits=fixed - added.kept_bits,
        dense_bits=dense,
        ties=pairs or _ties([*((u.name, u.block) for u in units), *added.blocks.items()], recipe),
        pins=_pins(menu, recipe.pin, outside=[*ends.fixed]),
        forbid=_forbidden(menu, added, recipe.forbid),
        inside=added.inside,
        blocks={
            **{unit.name: unit.block for unit in units},
            **added.blocks,
            **{name: cache.block for name, cache in caches.items()},
        },
        ends=[unit.name for unit in units if unit.name in outside],
    )
    limits = _drop_limits(sub_blocks, recipe)
    kinds = {sub: sub_blocks[sub].kind for sub in added.options}
    return replace(space, counts=drop_counts(space, kinds, limits)) if limits else space


def _normal(level: str | Level) -> Level:
    """Return a level, or a setting of a cache, in its canonical spelling."""
    is_setting = str(level).startswith("kv:")
    return cache_level(level) if is_setting else compose.normalize(level)


def _fixed_bits(
    skeleton: nn.Module, units: Sequence[Unit], offered: Mapping[str, list[Level]]
) -> tuple[int, int]:
    """Return the most bits shipped besides the units, and the bits of the dense checkpoint."""
    unit_keys = {f"{unit.name}.weight" for unit in units}
    tied = set(getattr(skeleton, "all_tied_weights_keys", ()))
    others = {
        key: tensor
        for key, tensor in skeleton.state_dict().items()
        if key not in unit_keys and key not in tied
    }
    rest = sum(16 * tensor.numel() for tensor in others.values())
    # every packed tensor of a unit, and the empty `weight` that makes loading without us fail
    packed = [
        f"{unit.name}.{key}"
        for unit in units
        for key in {"weight", *(k for x in offered[unit.name] for k in _keys(x, unit.shape))}
    ]
    dense = rest + 16 * sum(unit.n_weights for unit in units)
    return rest + 8 * header_bytes([NOTICE, *others, *packed]), dense


@lru_cache(maxsize=None)
def _keys(level: Level, shape: tuple[int, int]) -> tuple[str, ...]:
    return tuple(compose.empty(level, shape, torch.bfloat16))


def _option(level: Level, unit: Unit, recipe: Recipe) -> tuple[str, int] | tuple[str, int, int]:
    # a level that is shared is offered to both of a pair only, which take it together
    bits = compose.cost_bits(level, unit.shape) - compose.shared_bits(level, unit.shape) // 2
    if recipe.budget.sparsity is None:
        return str(level), bits
    return str(level), bits, compose.kept_values(level, unit.shape)


def _sub_options(options: Sequence[tuple[str, int]], recipe: Recipe) -> list[Any]:
    if recipe.budget.sparsity is None:
        return list(options)
    return [(level, bits, 0) for level, bits in options]


def _pinned(offered: dict[str, list[Level]], pins: Mapping[str, str]) -> dict[str, list[Level]]:
    """Return the menus with one level only for units that a pattern pins; the last one wins."""
    made = dict(offered)
    for pattern, level in pins.items():
        if _normal(level) != DROP:
            names = [unit for unit in offered if matches(unit, pattern)]
            made.update({unit: [compose.normalize(level)] for unit in names})
    return made


def _pins(
    menu: Mapping[str, Sequence[Any]], pins: Mapping[str, str], *, outside: Sequence[str]
) -> dict[str, str]:
    """Return unit -> pinned level. Sub-blocks take `drop` and `dense` only, units no `drop`.

    outside: ends that are not searched, whose pins are known already.
    """
    made: dict[str, str] = {}
    for pattern, text in pins.items():
        level = str(_normal(text))
        found = [unit for unit in menu if matches(unit, pattern)]
        able = [unit for unit in found if level in {option[0] for option in menu[unit]}]
        if not able and not any(matches(unit, pattern) for unit in outside):
            what = "units that do not take it" if found else f"none of the {len(menu)} units"
            raise ValueError(
                f"pin {pattern}={level} matches {what}; only sub-blocks can be dropped, and only "
                "where drops are searched"
            )
        made.update(dict.fromkeys(able, level))
    return made


def _forbidden(
    menu: Mapping[str, Sequence[Any]], added: Droppable, forbid: Mapping[str, str]
) -> dict[str, list[str]]:
    """Return unit -> patterns of levels; of a sub-block only `drop` can be forbidden."""
    made: dict[str, list[str]] = {}
    for pattern, levels in forbid.items():
        found = [unit for unit in menu if matches(unit, pattern)]
        if not found:
            raise ValueError(f"forbid {pattern}={levels} matches none of the {len(menu)} units")
        for unit in found:
            if unit not in added.options:
                made.setdefault(unit, []).append(levels)
            elif matches(str(DROP), levels) and not matches(str(DENSE), levels):
                made.setdefault(unit, []).append(str(DROP))
    return made


def _drop_limits(sub_blocks: Mapping[str, SubBlock], recipe: Recipe) -> dict[str, tuple[int, int]]:
    """Return kind -> how many sub-blocks must and may go; shares are of all that the model has."""
    drop, share = recipe.drop, recipe.budget.drop
    if share is None and drop.max is None:
        return {}
    limits: dict[str, tuple[int, int]] = {}
    for kind in KINDS:
        n = sum(sub.kind == kind for sub in sub_blocks.values())
        # By way of the decimal text: 0.1 of 30 is 3, not one less.
        least = int(Fraction(str(share or 0)) * n)
        most = int(Fraction(str(drop.max)) * n) if share is None else least
        limits[kind] = (least, most)
        if share is not None and n and not least:
            raise ValueError(f"{share} of {n} {kind} sub-blocks is none; ask for 1/{n} or more")
    return limits


def _ties(units: Sequence[tuple[str, int]], recipe: Recipe) -> list[list[str]]:
    """Return the units to tie: those of one block whose last name part is in one tuple of `tie`.

    units: (name, block), droppable sub-blocks among them.
    """
    known, tie = {name.rpartition(".")[2] for name, _ in units}, recipe.tie
    for part in (p for parts in tie for p in parts):
        if part not in known:
            raise ValueError(f"tie names {part!r}; units of this model are {sorted(known)}")
    groups: dict[tuple[int, int], list[str]] = {}
    for name, block in units:
        for number, parts in enumerate(tie or fused_for(recipe.export)):
            if name.rpartition(".")[2] in parts:
                groups.setdefault((block, number), []).append(name)
    return [names for names in groups.values() if len(names) > 1]
