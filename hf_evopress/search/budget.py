"""How large a plan may be: bits per weight, bytes, a ratio, a sparsity, a number of drops.

All are one whole number that `SearchSpace.cost` must not exceed: stored bits, or values kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Any

from ..base.resources import format_size, parse_size
from .space import Genome, SearchSpace


@dataclass(frozen=True)
class Budget:
    """A limit on `SearchSpace.cost`, in bits or in values, with the words it was given in.

    >>> Budget.parse(space, bits=3.3).text
    '3.3 bits per weight'
    """

    limit: int
    text: str
    note: str = ""

    @staticmethod
    def parse(
        space: SearchSpace,
        *,
        bits: float | str | None = None,
        size: str | int | None = None,
        ratio: float | str | None = None,
        sparsity: float | str | None = None,
        context: int | None = None,
        reserved_bits: int = 0,
    ) -> Budget:
        """Return the budget said in exactly one way.

        bits: stored bits per compressed weight, scales and zero points counted; size: bytes of
        the whole checkpoint ("90MB"); ratio: of the size of the dense checkpoint; sparsity: the
        share of values that is removed, in a space that counts values. context: the tokens whose
        key-value cache a size includes; reserved_bits: what of it is in no option. ValueError names
        the smallest possible budget where none fits; one above the largest plan is cut down to it,
        as `note` says.
        """
        if sum(given is not None for given in (bits, size, ratio, sparsity)) != 1:
            raise ValueError(
                "say the budget in exactly one way: bits=3.3, size='90MB', ratio=0.25 or "
                "sparsity=0.5"
            )
        if (sparsity is not None) != space.counts_values:
            counted = "values kept" if space.counts_values else "bits"
            raise ValueError(f"this space counts {counted}; say the budget in those")
        if sparsity is not None:
            limit = floor((1 - _number("sparsity", sparsity)) * space.n_weights)
            text = f"sparsity {sparsity}"
        elif size is not None:
            limit = 8 * parse_size(size) - space.fixed_bits - reserved_bits
            text = f"{size} bytes" if isinstance(size, int) else str(size)
            text += f" with the cache of {context} tokens" if context else ""
        elif bits is not None:
            limit = floor(_number("bits", bits) * space.n_weights)
            ends = any(gene.is_end for gene in space.genes)
            text = f"{bits} bits per weight{', embedding and head counted' if ends else ''}"
        else:
            limit = floor(_number("ratio", ratio) * space.dense_bits) - space.fixed_bits
            text = f"ratio {ratio}"
        if limit < space.min_cost:
            said = {"bits": bits, "size": size, "sparsity": sparsity, "ratio": ratio}
            words = next(k for k, v in said.items() if v is not None)
            least = _least(space, words, reserved_bits)
            raise ValueError(f"no plan fits a budget of {text}; the smallest possible is {least}")
        if limit > space.max_cost:
            note = f"{text} is more than the largest plan needs; its size is the budget"
            note = "" if ratio == 1.0 else note  # nobody's limit: of the dense size, all
            return Budget(space.max_cost, text, note)
        return Budget(limit, text)

    def allows(self, space: SearchSpace, genome: Genome) -> bool:
        """Return whether the genome is within the budget and drops as many as the space says."""
        return space.cost(genome) <= self.limit and space.keeps_counts(genome)

    def to_json(self) -> dict[str, Any]:
        """Return the budget as JSON data."""
        return asdict(self)

    @staticmethod
    def of_drops(space: SearchSpace) -> Budget:
        """Return the budget of a space where `counts` alone say what must go."""
        parts = [f"{c.at_least} {c.kind} of {len(c.genes)}" for c in space.counts]
        return Budget(space.max_cost, f"drop {' and '.join(parts)}")

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


def _made_of(space: SearchSpace, reserved_bits: int) -> str:
    """Return what the smallest file consists of, in bytes; and the cache, where it is counted."""
    ends = sum(
        space.bits[i][space.cheapest[i]] for i, gene in enumerate(space.genes) if gene.is_end
    )
    cache = space.cache_bits(space.cheapest)
    decoder = space.cost_bits(space.cheapest) - ends - cache
    parts = {
        "the decoder": decoder,
        "embedding and head": ends,
        "the cache": cache + reserved_bits,
        "all else": space.fixed_bits,
    }
    return ", ".join(f"{k} {format_size(ceil(v / 8))}" for k, v in parts.items() if v)


def _least(space: SearchSpace, unit: str, reserved_bits: int) -> str:
    """Return the smallest possible budget in the words of `unit`, rounded so that it works."""
    if unit == "sparsity":
        most = floor((1 - Fraction(space.min_cost, space.n_weights)) * 10000) / 10000
        return f"sparsity {most:g}: the menu removes no more"
    whole = space.fixed_bits + space.min_cost + reserved_bits
    if unit == "size":
        made_of = _made_of(space, reserved_bits)
        return f"{ceil(whole / 8)}B ({format_size(ceil(whole / 8))}): {made_of}"
    top, bottom = (space.min_cost, space.n_weights) if unit == "bits" else (whole, space.dense_bits)
    least = ceil(Fraction(top, bottom) * 10000) / 10000
    return f"{least:g} bits per weight" if unit == "bits" else f"ratio {least:g}"
