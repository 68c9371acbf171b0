"""What may be chosen (SearchSpace) and what it may cost (Budget), in exact stored bits.

A genome is a tuple of option numbers, one per gene; a gene is the level of one unit, or of
tied units that share one. Names, levels and integers only: no tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, floor
from typing import Any

from .genes import Gene, Menu, Option, build_genes
from .resources import format_size, parse_size

__all__ = ["Budget", "Gene", "Genome", "Option", "SearchSpace", "Table"]

Genome = tuple[int, ...]
Table = Sequence[Sequence[float]]  # a value per gene and option: bits, or a predicted loss


@dataclass(frozen=True)
class SearchSpace:
    """All genes, the bits shipped besides them, and the counts that budgets are relative to.

    n_weights: the weights that are compressed; dense_bits: the whole dense checkpoint.
    """

    genes: tuple[Gene, ...]
    fixed_bits: int
    n_weights: int
    dense_bits: int

    def __post_init__(self) -> None:
        if not self.genes or self.n_weights <= 0:
            raise ValueError("a search space needs at least one unit; is everything skipped?")
        for gene in self.genes:
            if gene.inside is None:
                continue
            outer = self.genes[gene.inside]
            if outer.inside is not None:
                raise ValueError(
                    f"{outer.units[0]} lies in another droppable sub-block; "
                    "only one of the two can be droppable"
                )
            if any(option.is_drop and option.cost_bits for option in outer.options):
                raise ValueError(f"{outer.units[0]} stores bits although it is dropped")

    @staticmethod
    def build(
        units: Mapping[str, int],
        options: Menu,
        *,
        fixed_bits: int = 0,
        dense_bits: int | None = None,
        ties: Sequence[Sequence[str]] = (),
        pins: Mapping[str, str] | None = None,
        forbid: Mapping[str, str | Sequence[str]] | None = None,
        inside: Mapping[str, str] | None = None,
        blocks: Mapping[str, int] | None = None,
    ) -> SearchSpace:
        """Return the space of `units` (name -> number of weights, in model order).

        options: unit -> (level, cost in bits) pairs. ties: lists of units that share a level,
        one that all of them offer. pins: unit pattern -> its only level (a later pattern wins).
        forbid: unit pattern -> patterns of levels it may not take. inside: unit -> the droppable
        sub-block, itself a unit, that contains it. blocks: unit -> decoder block, by default the
        first number in its name. dense_bits: the dense checkpoint, by default 16 per weight.
        """
        genes = build_genes(
            units,
            options,
            ties=ties,
            pins=pins or {},
            forbid=forbid or {},
            inside=inside or {},
            blocks=blocks or {},
        )
        total = sum(units.values())
        dense = fixed_bits + 16 * total if dense_bits is None else dense_bits
        return SearchSpace(genes, fixed_bits, total, dense)

    @cached_property
    def inner(self) -> dict[int, tuple[int, ...]]:
        """Gene of a droppable sub-block -> the genes inside it."""
        found: dict[int, tuple[int, ...]] = {}
        for i, gene in enumerate(self.genes):
            if gene.inside is not None:
                found[gene.inside] = (*found.get(gene.inside, ()), i)
        return found

    def is_active(self, genome: Genome, i: int) -> bool:
        """Return whether gene i matters: False inside a dropped sub-block."""
        outer = self.genes[i].inside
        return outer is None or not self.genes[outer].options[genome[outer]].is_drop

    @cached_property
    def costs(self) -> tuple[tuple[int, ...], ...]:
        """Bits per gene and option."""
        return tuple(tuple(option.cost_bits for option in gene.options) for gene in self.genes)

    def values(self, table: Table, genome: Genome) -> list[float]:
        """Return the entries of a table (per gene, per option) of all choices that matter."""
        if not self.inner:
            return [row[choice] for row, choice in zip(table, genome, strict=True)]
        return [table[i][c] for i, c in enumerate(genome) if self.is_active(genome, i)]

    def change(self, table: Table, genome: Genome, i: int, option: int) -> float:
        """Return by how much the sum of `values` changes when gene i goes to `option`."""
        if not self.is_active(genome, i):
            return 0
        gene, row = self.genes[i], table[i]
        difference = row[option] - row[genome[i]]
        if i in self.inner:
            was, now = gene.options[genome[i]].is_drop, gene.options[option].is_drop
            if was != now:
                inside = sum(table[k][genome[k]] for k in self.inner[i])
                difference += inside if was else -inside
        return difference

    def cost(self, genome: Genome) -> int:
        """Return the bits stored for the units of the space; `fixed_bits` are not among them."""
        return int(sum(self.values(self.costs, genome)))

    def bits_per_weight(self, genome: Genome) -> float:
        """Return the stored bits per compressed weight, scales and zero points counted."""
        return self.cost(genome) / self.n_weights

    def size_bytes(self, genome: Genome) -> int:
        """Return the bytes of the whole checkpoint."""
        return ceil((self.fixed_bits + self.cost(genome)) / 8)

    def canonical(self, genome: Genome) -> Genome:
        """Return the genome with choices inside dropped sub-blocks, which do nothing, at 0."""
        if not self.inner:
            return genome
        return tuple(c if self.is_active(genome, i) else 0 for i, c in enumerate(genome))

    def levels(self, genome: Genome) -> dict[str, str]:
        """Return unit -> level; units inside a dropped sub-block are left out."""
        return {
            unit: gene.options[choice].level
            for i, (gene, choice) in enumerate(zip(self.genes, genome, strict=True))
            if self.is_active(genome, i)
            for unit in gene.units
        }

    def genome(self, levels: Mapping[str, object]) -> Genome:
        """Return the genome of unit -> level, the inverse of `levels`.

        Raises ValueError for a missing unit, an unknown level or tied units that differ.
        """
        choices = []
        for i, gene in enumerate(self.genes):
            given = {str(levels[unit]) for unit in gene.units if unit in levels}
            missing = [unit for unit in gene.units if unit not in levels]
            if not given and self._is_dropped(levels, i):
                choices.append(0)
                continue
            if missing:
                raise ValueError(f"no level is given for {missing[0]}")
            if len(given) > 1:
                raise ValueError(f"tied units must share a level: {gene.units} have {given}")
            choices.append(gene.option(given.pop()))
        return self.canonical(tuple(choices))

    def _is_dropped(self, levels: Mapping[str, object], i: int) -> bool:
        outer = self.genes[i].inside
        return outer is not None and str(levels.get(self.genes[outer].units[0])) == "drop"

    def uniform(self) -> dict[str, Genome]:
        """Return level -> the genome with that level everywhere, for each common level.

        Common: offered by genes with most of the weights. A gene that lacks the level
        (another group size, a pin) takes its dearest option of no more bits per weight; a
        droppable sub-block is kept.
        """
        common: dict[str, list[Gene]] = {}
        for gene in self.genes:
            for option in gene.options:
                if gene.n_weights and not option.is_drop:
                    common.setdefault(option.level, []).append(gene)
        plans = {}
        for level, genes in common.items():
            weights = sum(gene.n_weights for gene in genes)
            if 2 * weights <= self.n_weights:
                continue
            bits = sum(gene.options[gene.option(level)].cost_bits for gene in genes)
            rate = Fraction(bits, weights)
            plans[level] = tuple(gene.nearest(rate, level=level) for gene in self.genes)
        return plans

    @cached_property
    def cheapest(self) -> Genome:
        """The genome of the smallest cost."""
        choices = [0] * len(self.genes)  # options are sorted by cost, a drop first
        for outer, inner in self.inner.items():
            kept = [n for n, option in enumerate(self.genes[outer].options) if not option.is_drop]
            bits = sum(self.genes[i].options[0].cost_bits for i in inner)
            # Keeping a sub-block may cost nothing; then it is kept.
            if kept and self.genes[outer].options[kept[0]].cost_bits + bits == 0:
                choices[outer] = kept[0]
        return tuple(choices)

    @cached_property
    def dearest(self) -> Genome:
        """The genome of the largest cost."""
        return tuple(len(gene.options) - 1 for gene in self.genes)

    @property
    def min_cost(self) -> int:
        return self.cost(self.cheapest)

    @property
    def max_cost(self) -> int:
        return self.cost(self.dearest)

    @property
    def fingerprint(self) -> str:
        """A hash of everything in the space: equal spaces, equal fingerprints."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """Return the space as JSON data; `from_json` reads it."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> SearchSpace:
        """Return the space that `to_json` wrote."""
        genes = tuple(
            Gene(
                **{
                    **gene,
                    "units": tuple(gene["units"]),
                    "options": tuple(Option(**option) for option in gene["options"]),
                }
            )
            for gene in data["genes"]
        )
        return SearchSpace(**{**data, "genes": genes})


@dataclass(frozen=True)
class Budget:
    """A limit on `SearchSpace.cost`, in bits, with the words it was given in.

    >>> Budget.parse(space, bits=3.3).text
    '3.3 bits per weight'
    """

    limit_bits: int
    text: str
    note: str = ""

    @staticmethod
    def parse(
        space: SearchSpace,
        *,
        bits: float | str | None = None,
        size: str | int | None = None,
        ratio: float | str | None = None,
    ) -> Budget:
        """Return the budget said in exactly one way.

        bits: stored bits per compressed weight, scales and zero points counted; size: bytes of
        the whole checkpoint ("90MB"); ratio: of the size of the dense checkpoint. ValueError
        names the smallest possible budget where none fits; one above the largest plan is cut
        down to it, as `note` says.
        """
        if sum(given is not None for given in (bits, size, ratio)) != 1:
            raise ValueError(
                "say the budget in exactly one way: bits=3.3, size='90MB' or ratio=0.25"
            )
        if size is not None:
            limit = 8 * parse_size(size) - space.fixed_bits
            text = f"{size} bytes" if isinstance(size, int) else str(size)
        elif bits is not None:
            limit = floor(_number("bits", bits) * space.n_weights)
            text = f"{bits} bits per weight"
        else:
            limit = floor(_number("ratio", ratio) * space.dense_bits) - space.fixed_bits
            text = f"ratio {ratio}"
        if limit < space.min_cost:
            least = _least(space, "bits" if bits is not None else "size" if size else "ratio")
            raise ValueError(f"no plan fits a budget of {text}; the smallest possible is {least}")
        if limit > space.max_cost:
            note = f"{text} is more than the largest plan needs; its size is the budget"
            return Budget(space.max_cost, text, note)
        return Budget(limit, text)

    def allows(self, space: SearchSpace, genome: Genome) -> bool:
        """Return whether the genome's cost is within the budget."""
        return space.cost(genome) <= self.limit_bits

    def to_json(self) -> dict[str, Any]:
        """Return the budget as JSON data."""
        return asdict(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Budget:
        """Return the budget that `to_json` wrote."""
        return Budget(**data)


def _number(name: str, value: float | str | None) -> Fraction:
    # By way of the decimal text: 3.3 means 33/10, not the nearest binary fraction below it.
    try:
        number = Fraction(str(value))
    except ValueError:
        raise ValueError(f"{name} must be a number, got {name}={value!r}") from None
    if number <= 0:
        raise ValueError(f"{name} must be above 0, got {name}={value!r}")
    return number


def _least(space: SearchSpace, unit: str) -> str:
    """Return the smallest possible budget in the words of `unit`, rounded up so that it works."""
    whole = space.fixed_bits + space.min_cost
    if unit == "size":
        return f"{ceil(whole / 8)}B ({format_size(ceil(whole / 8))})"
    top, bottom = (space.min_cost, space.n_weights) if unit == "bits" else (whole, space.dense_bits)
    least = ceil(Fraction(top, bottom) * 10000) / 10000
    return f"{least:g} bits per weight" if unit == "bits" else f"ratio {least:g}"
