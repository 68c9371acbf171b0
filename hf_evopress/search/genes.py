"""Build genes from units and their levels: ties, pins, forbidden levels, sub-blocks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..base.patterns import matches
from ..base.plugins import did_you_mean

# unit -> (level, cost in bits), or (level, cost in bits, values kept) where values are budgeted
Menu = Mapping[str, Sequence[tuple[str, int] | tuple[str, int, int]]]


@dataclass(frozen=True)
class Option:
    """One level a gene may take, and the bits that all units of the gene store at it.

    values: the weights or entries of factors that are kept, where a budget counts those.
    """

    level: str
    cost_bits: int
    values: int | None = None

    @property
    def cost(self) -> int:
        """What counts against the budget: bits, or the values kept."""
        return self.cost_bits if self.values is None else self.values

    @property
    def is_drop(self) -> bool:
        return self.level == "drop"


@dataclass(frozen=True)
class Gene:
    """One decision: tied units, and their options from the cheapest to the dearest.

    `inside` is the number of the gene of the droppable sub-block that contains these units;
    while that gene is at `drop` this one costs nothing. `block` is the decoder block.
    """

    units: tuple[str, ...]
    options: tuple[Option, ...]
    inside: int | None = None
    block: int = 0
    n_weights: int = 0
    is_end: bool = False  # the embedding or the head: its bits are not those of the decoder

    @property
    def is_cache(self) -> bool:
        """Whether this is the key-value cache of an attention layer: no part of the checkpoint."""
        return self.kind == "kv_cache"

    @property
    def kind(self) -> str:
        """The last word of the name, such as `up_proj`: genes of a kind behave alike."""
        return self.units[0].rpartition(".")[2]

    def option(self, level: str) -> int:
        """Return the number of the option at `level`."""
        known = [option.level for option in self.options]
        if level not in known:
            raise ValueError(f"{self.units[0]} has no level {level!r}{did_you_mean(level, known)}")
        return known.index(level)

    def nearest(self, rate: Fraction, *, level: str = "") -> int:
        """Return the option at `level`, else the dearest that costs at most `rate` per weight."""
        kept = [n for n, option in enumerate(self.options) if not option.is_drop] or [0]
        for n in kept:
            if self.options[n].level == level:
                return n
        fits = [n for n in kept if self.options[n].cost <= rate * self.n_weights]
        return (fits or kept[:1])[-1]


@dataclass(frozen=True)
class DropCount:
    """How many of some droppable sub-blocks a plan drops: of `genes`, at_least to at_most."""

    kind: str
    genes: tuple[int, ...]
    at_least: int
    at_most: int


def build_genes(
    units: Mapping[str, int],
    options: Menu,
    *,
    ties: Sequence[Sequence[str]],
    pins: Mapping[str, str],
    forbid: Mapping[str, str | Sequence[str]],
    inside: Mapping[str, str],
    blocks: Mapping[str, int],
    ends: Sequence[str] = (),
) -> tuple[Gene, ...]:
    """Return one gene per untied unit or tie, in the order of `units`; see SearchSpace.build."""
    _check_units(options, units, "options")
    _check_units([*inside, *inside.values()], units, "inside")
    menu = _menu(units, options, pins, forbid)
    groups = _groups(units, ties)
    number = {unit: i for i, group in enumerate(groups) for unit in group}
    genes = []
    for group in groups:
        outer = {number[inside[unit]] if unit in inside else None for unit in group}
        if len(outer) > 1:
            raise ValueError(f"tied units must lie in the same droppable sub-block: {group}")
        genes.append(
            Gene(
                units=group,
                options=_shared_options(group, menu),
                inside=outer.pop(),
                block=min(blocks.get(unit, _block_in_name(unit)) for unit in group),
                n_weights=sum(units[unit] for unit in group),
                is_end=any(unit in ends for unit in group),
            )
        )
    return tuple(genes)


def _menu(
    units: Mapping[str, int],
    options: Menu,
    pins: Mapping[str, str],
    forbid: Mapping[str, str | Sequence[str]],
) -> dict[str, dict[str, Option]]:
    """Return unit -> level -> option, after the rules."""
    menu = {unit: {o[0]: Option(*o) for o in options.get(unit, ())} for unit in units}
    for pattern, levels in forbid.items():
        bad = [levels] if isinstance(levels, str) else list(levels)
        for unit in _matching(pattern, units, "forbid"):
            menu[unit] = {
                level: option
                for level, option in menu[unit].items()
                if not any(matches(level, b) for b in bad)
            }
            if not menu[unit]:
                raise ValueError(f"{unit} has no level left: {bad} of {pattern!r} forbids them all")
    pinned = {u: level for pattern, level in pins.items() for u in _matching(pattern, units, "pin")}
    for unit, level in pinned.items():
        if level not in menu[unit]:
            known = list(menu[unit])
            raise ValueError(f"cannot pin {unit} to {level!r}{did_you_mean(level, known)}")
        menu[unit] = {level: menu[unit][level]}
    return menu


def _shared_options(
    group: Sequence[str], menu: Mapping[str, Mapping[str, Option]]
) -> tuple[Option, ...]:
    """Return the options that all units of a tie offer, cheapest first, costs added up."""
    levels = [lv for lv in menu[group[0]] if all(lv in menu[unit] for unit in group)]
    if not levels:
        raise ValueError(f"no level is offered by all of {', '.join(group)}; untie them or add one")
    made = [_sum(level, [menu[unit][level] for unit in group]) for level in levels]
    if any(min(option.cost_bits, option.cost) < 0 for option in made):
        raise ValueError(f"{group[0]} has a level of negative cost: {made}")
    # A drop frees what lies inside it, so it is the cheapest even among options of no cost.
    return tuple(sorted(made, key=lambda o: (o.cost, not o.is_drop, o.cost_bits, o.level)))


def _sum(level: str, options: Sequence[Option]) -> Option:
    values = [option.values for option in options if option.values is not None]
    bits = sum(option.cost_bits for option in options)
    return Option(level, bits, sum(values) if len(values) == len(options) else None)


def _groups(units: Iterable[str], ties: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Return the units of each gene, ordered by their first unit."""
    tie_of: dict[str, int] = {}
    for i, tie in enumerate(ties):
        _check_units(tie, units, "ties")
        for unit in tie:
            if unit in tie_of:
                raise ValueError(f"{unit} is tied twice; join the two ties into one")
            tie_of[unit] = i
    groups: dict[object, list[str]] = {}
    for unit in units:
        groups.setdefault(tie_of.get(unit, unit), []).append(unit)
    return [tuple(group) for group in groups.values()]


def _matching(pattern: str, units: Iterable[str], rule: str) -> list[str]:
    found = [unit for unit in units if matches(unit, pattern)]
    if not found:
        raise ValueError(f"{rule}: {pattern!r} matches no unit{did_you_mean(pattern, list(units))}")
    return found


def _check_units(names: Iterable[str], units: Iterable[str], rule: str) -> None:
    known = set(units)
    for name in names:
        if name not in known:
            hint = did_you_mean(name, sorted(known))
            raise ValueError(f"{rule}: {name!r} is no unit of the model{hint}")


def _block_in_name(unit: str) -> int:
    found = re.search(r"\.(\d+)(\.|$)", unit)
    return int(found[1]) if found else 0
