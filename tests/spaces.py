"""Random search spaces for property tests: ties, pins, ragged menus, droppable sub-blocks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from random import Random

from hf_evopress.search.space import Genome, SearchSpace


def random_space(rng: Random, *, max_blocks: int = 2, max_units: int = 3) -> SearchSpace:
    """Return a space of 1 to max_blocks blocks of 1 to max_units linears, some droppable."""
    units: dict[str, int] = {}
    menu: dict[str, list[tuple[str, int]]] = {}
    inside: dict[str, str] = {}
    ties: list[list[str]] = []
    for block in range(rng.randint(1, max_blocks)):
        sub = f"model.layers.{block}.mlp"
        is_droppable = rng.random() < 0.4
        if is_droppable:
            units[sub] = 0
            menu[sub] = [("dense", rng.choice([0, 3])), ("drop", 0)]
        names = [f"{sub}.w{n}" for n in range(rng.randint(1, max_units))]
        for name in names:
            units[name] = rng.choice([10, 20, 64])
            bits = sorted(rng.sample(range(1, 9), rng.randint(1, 4)))
            menu[name] = [(f"rtn:bits={b}", b * units[name] + rng.choice([0, 3])) for b in bits]
            if is_droppable:
                inside[name] = sub
        if len(names) > 1 and rng.random() < 0.3:
            shared = [("rtn:bits=2", 20), ("rtn:bits=4", 40)]
            menu[names[0]], menu[names[1]] = shared, shared
            ties.append(names[:2])
    return SearchSpace.build(units, menu, ties=ties, inside=inside, fixed_bits=rng.randint(0, 99))


def random_table(rng: Random, space: SearchSpace, *, is_whole: bool = False) -> list[list[float]]:
    """Return random losses; whole numbers make many plans equal."""
    draw = (lambda: float(rng.randint(0, 4))) if is_whole else (lambda: rng.uniform(-1, 3))
    return [[draw() for _ in gene.options] for gene in space.genes]


def all_genomes(space: SearchSpace) -> Iterator[Genome]:
    """Return every genome of a small space."""
    return product(*(range(len(gene.options)) for gene in space.genes))
