"""The search space: genes, their options, and exact costs in stored bits or kept values.

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
from math import ceil
from typing import Any

from .genes import DropCount, Gene, Menu, Option, build_genes

__all__ = ["DropCount", "Gene", "Genome", "Option", "SearchSpace", "Table"]

Genome = tuple[int, ...]
Table = Sequence[Sequence[float]]  # a value per gene and option: bits, or a predicted loss


@dataclass(frozen=True)
class SearchSpace:
    """All genes, the bits shipped besides them, and the counts that budgets are relative to.

    n_weights: the weights that are compressed; dense_bits: the whole dense checkpoint.
    counts: how many sub-blocks plans may drop; nothing said: any number.
    """

    genes: tuple[Gene, ...]
    fixed_bits: int
    n_weights: int
    dense_bits: int
    counts: tuple[DropCount, ...] = ()

    def __post_init__(self) -> None:
        if all(gene.is_end for gene in self.genes) or self.n_weights <= 0:
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
        if len({option.values is None for gene in self.genes for option in gene.options}) > 1:
            raise ValueError("a budget counts bits or values; some options do not say their values")
        for count in self.counts:
            _check_count(count, self.genes)

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
        ends: Sequence[str] = (),
    ) -> SearchSpace:
        """Return the space of `units` (name -> number of weights, in model order).

        options: unit -> (level, cost in bits) pairs, or with the values kept as a third entry,
        which the budget then counts instead of bits. ties: lists of units that share a level,
        one that all of them offer. pins: unit pattern -> its only level (a later pattern wins).
        forbid: unit pattern -> patterns of levels it may not take. inside: unit -> the droppable
        sub-block, itself a unit, that contains it. blocks: unit -> decoder block, by default the
        first number in its name. ends: units outside the decoder. dense_bits: the dense
        checkpoint, by default 16 per weight.
        """
        genes = build_genes(
            units,
            options,
            ties=ties,
            pins=pins or {},
            forbid=forbid or {},
            inside=inside or {},
            blocks=blocks or {},
            ends=ends,
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

    @property
    def counts_values(self) -> bool:
        """Whether costs are values kept, not bits."""
        return self.genes[0].options[0].values is not None

    @cached_property
    def costs(self) -> tuple[tuple[int, ...], ...]:
        """What counts against the budget, per gene and option: bits, or values kept."""
        return tuple(tuple(option.cost for option in gene.options) for gene in self.genes)

    @cached_property
    def bits(self) -> tuple[tuple[int, ...], ...]:
        """Stored bits per gene and option."""
        return tuple(tuple(option.cost_bits for option in gene.options) for gene in self.genes)

    def is_dropped(self, genome: Genome, i: int) -> bool:
        """Return whether gene i, of a sub-block, is at `drop`."""
        return self.genes[i].options[genome[i]].is_drop

    def keeps_counts(self, genome: Genome) -> bool:
        """Return whether the genome drops as many sub-blocks as `counts` say."""
        return all(
            count.at_least <= sum(self.is_dropped(genome, i) for i in count.genes) <= count.at_most
            for count in self.counts
        )

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
        """Return the bits (or the values) kept of the units; `fixed_bits` are not among them."""
        return int(sum(self.values(self.costs, genome)))

    def cost_bits(self, genome: Genome) -> int:
        """Return the bits stored for the units of the space, whatever the budget counts."""
        return int(sum(self.values(self.bits, genome)))

    def cache_bits(self, genome: Genome) -> int:
        """Return the bits of key-value caches, which are no part of the checkpoint."""
        return sum(
            self.bits[i][choice]
            for i, choice in enumerate(genome)
            if self.genes[i].is_cache and self.is_active(genome, i)
        )

    def bits_per_weight(self, genome: Genome) -> float:
        """Return the stored bits per weight of the decoder, scales and zero points counted."""
        ends = [i for i, gene in enumerate(self.genes) if gene.is_end]
        bits = self.cost_bits(genome) - self.cache_bits(genome)
        bits -= sum(self.bits[i][genome[i]] for i in ends)
        return bits / (self.n_weights - sum(self.genes[i].n_weights for i in ends))

    def size_bytes(self, genome: Genome) -> int:
        """Return the bytes of the whole checkpoint."""
        stored = self.cost_bits(genome) - self.cache_bits(genome)
        return ceil((self.fixed_bits + stored) / 8)

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
        droppable sub-block is kept. Where sub-blocks must be dropped, no plan is uniform.
        Where caches are searched, each such plan is there once per setting of all caches.
        """
        caches = [gene for gene in self.genes if gene.is_cache]
        settings = {o.level: None for gene in caches for o in gene.options if len(gene.options) > 1}
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
            cost = sum(gene.options[gene.option(level)].cost for gene in genes)
            rate = Fraction(cost, weights)
            for setting in settings or [""]:
                name = f"{level}, cache {setting}" if setting else level
                plans[name] = tuple(
                    gene.nearest(rate, level=setting if gene.is_cache else level)
                    for gene in self.genes
                )
        return plans

    @cached_property
    def cheapest(self) -> Genome:
        """The genome of the smallest cost."""
        choices = [0] * len(self.genes)  # options are sorted by cost, a drop first
        keeping: dict[int, tuple[int, int]] = {}  # gene at drop -> cost of keeping it, that option
        for outer, gene in enumerate(self.genes):
            kept = [n for n, option in enumerate(gene.options) if not option.is_drop]
            if gene.options[0].is_drop and kept:
                inside = sum(self.genes[i].options[0].cost for i in self.inner.get(outer, ()))
                keeping[outer] = (gene.options[kept[0]].cost + inside, kept[0])
        counted = {i for count in self.counts for i in count.genes}
        for outer, (cost, n) in keeping.items():
            # Keeping a sub-block may cost nothing; then it is kept.
            if cost == 0 and outer not in counted:
                choices[outer] = n
        for count in self.counts:
            dropped = [i for i in count.genes if self.genes[i].options[0].is_drop]
            most = min(count.at_most, len(dropped))
            can = sorted((i for i in dropped if i in keeping), key=lambda i: keeping[i])
            for i in can[: len(dropped) - most]:
                choices[i] = keeping[i][1]
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
        counts = tuple(
            DropCount(**{**count, "genes": tuple(count["genes"])}) for count in data["counts"]
        )
        return SearchSpace(**{**data, "genes": genes, "counts": counts})


def _check_count(count: DropCount, genes: Sequence[Gene]) -> None:
    droppable = [any(o.is_drop for o in genes[i].options) for i in count.genes]
    forced = sum(all(o.is_drop for o in genes[i].options) for i in count.genes)
    if not (max(forced, count.at_least) <= min(count.at_most, sum(droppable))):
        raise ValueError(
            f"{count.at_least} to {count.at_most} {count.kind} sub-blocks are to be dropped; "
            f"{sum(droppable)} of {len(droppable)} can be and {forced} must be"
        )
