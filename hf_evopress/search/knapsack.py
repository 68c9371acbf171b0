"""The exact multiple-choice knapsack: least total loss within a budget of bits.

Lagrangian relaxation first: for a price `lam` per bit every gene chooses alone, and the best
price bounds the optimum from below (Everett 1963; the same dual as SPDY and L-GreCo allocate
by). What is left between that bound and the best plan is closed exactly: only options that
waste less than the gap can be in a better plan, and a dynamic programme over those few, with
dominated states dropped, finds the optimum (the core idea of Pisinger 1995, MCKNAP).

A droppable sub-block and the genes inside it form one node: its loss is that of the drop, or
of the best choices inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import fsum, isfinite

from .space import Genome, SearchSpace, Table

Link = tuple["Link | None", int, int]  # choices so far: (earlier, gene, option)
State = tuple[int, float, Link | None]  # bits, loss, choices


@dataclass(frozen=True)
class Solution:
    """A plan, its total loss and bits, and a proven lower bound on the loss of any plan."""

    genome: Genome
    loss: float
    cost_bits: int
    lower_bound: float

    @property
    def is_optimal(self) -> bool:
        return self.loss <= self.lower_bound


@dataclass(frozen=True)
class Part:
    """The options of one gene that no other beats in both bits and loss, cheapest first."""

    gene: int
    points: tuple[tuple[int, float, int], ...]  # bits, loss, option

    def least(self, lam: float) -> tuple[float, tuple[int, float, int]]:
        """Return the smallest loss + lam * bits and the point that has it."""
        best = min(self.points, key=lambda p: p[1] + lam * p[0])
        return best[1] + lam * best[0], best


@dataclass(frozen=True)
class Node:
    """A choice between dropping (no `drop`: not possible) and keeping all `parts`."""

    drop: Part | None
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Relaxed:
    """The best independent choices at a price per bit."""

    chosen: dict[int, int]
    loss: float
    cost: int


def solve(
    space: SearchSpace, losses: Table, limit_bits: int, *, max_states: int = 50_000
) -> Solution:
    """Return the plan of least total loss with cost <= limit_bits.

    losses[gene][option], any finite numbers; what lies inside a dropped sub-block counts
    nothing. `lower_bound` equals `loss` where the optimum is proven, which fails only if more
    than `max_states` partial plans would have to be kept.
    """
    check_table(space, losses)
    nodes = _nodes(space, losses)
    best = _cheapest(nodes)
    if best.cost > limit_bits:
        raise ValueError(f"no plan has at most {limit_bits} bits; the smallest has {best.cost}")
    free = _relax(nodes, 0.0)
    if free.cost <= limit_bits:
        genome = _genome(space, free.chosen)
        loss = total_loss(space, losses, genome)
        return Solution(genome, loss, space.cost(genome), loss)
    best, lam, bound = _best_price(nodes, free, best, limit_bits)
    genome = fill(space, losses, _genome(space, best.chosen), limit_bits)
    loss = total_loss(space, losses, genome)
    noise = 1e-13 * fsum(abs(v) for row in losses for v in row)  # of sums of floats
    gap = loss - bound
    width, proven = gap / 1024, bound
    while loss - proven > noise:
        width = min(width, gap)
        found, is_whole = _core(nodes, lam, width + noise, limit_bits, max_states)
        if found is not None and found[1] < loss:
            genome, loss = _genome(space, _chosen(found[2])), found[1]
        # Every plan within `width` of the bound was seen, so the best is that good or better.
        if is_whole:
            proven = bound + width
        if not is_whole or width >= gap or loss <= proven:
            break
        width *= 4
    exact = total_loss(space, losses, genome)
    proven = exact if loss <= proven + noise else min(proven, exact)
    return Solution(space.canonical(genome), exact, space.cost(genome), proven)


def front(
    space: SearchSpace,
    losses: Table,
    *,
    low_bits: int | None = None,
    high_bits: int | None = None,
    points: int = 17,
) -> list[Solution]:
    """Return optimal plans for `points` budgets spread evenly, the cheapest first.

    The result is non-dominated in (bits, loss); equal plans appear once.
    """
    low = space.min_cost if low_bits is None else max(low_bits, space.min_cost)
    high = space.max_cost if high_bits is None else high_bits
    if points < 1 or high < low:
        raise ValueError(f"no budgets between {low} and {high} bits at points={points}")
    limits = [low + (high - low) * i // max(1, points - 1) for i in range(points)]
    found: list[Solution] = []
    for solution in (solve(space, losses, limit) for limit in limits):
        if not found or solution.loss < found[-1].loss:
            found.append(solution)
    return found


def fill(
    space: SearchSpace,
    losses: Table,
    genome: Genome,
    limit_bits: int,
    *,
    genes: Iterable[int] | None = None,
) -> Genome:
    """Return the genome after the best raises that still fit, until none that helps is left.

    Only `genes` are raised, by default all.
    """
    choices, costs = list(genome), space.costs
    slack = limit_bits - space.cost(genome)
    raises: list[tuple[float, int, int, int]] = []  # -gain, gene, from option, to option

    def offer(i: int) -> None:
        here, row = choices[i], losses[i]
        for n in range(here + 1, len(row)):
            if costs[i][n] - costs[i][here] > slack:
                break
            if row[n] < row[here]:
                heappush(raises, (row[n] - row[here], i, here, n))

    for i in range(len(choices)) if genes is None else genes:
        if not space.genes[i].options[choices[i]].is_drop and space.is_active(genome, i):
            offer(i)
    while raises:
        _, i, here, n = heappop(raises)
        # What no longer fits never will: the slack only shrinks.
        if choices[i] == here and costs[i][n] - costs[i][here] <= slack:
            choices[i] = n
            slack -= costs[i][n] - costs[i][here]
            offer(i)
    return tuple(choices)


def total_loss(space: SearchSpace, losses: Table, genome: Genome) -> float:
    """Return the sum of the predicted losses of all choices that matter."""
    return fsum(space.values(losses, genome))


def check_table(space: SearchSpace, losses: Table) -> None:
    """Raise ValueError unless there is one finite loss per option of every gene."""
    if len(losses) != len(space.genes):
        raise ValueError(f"{len(losses)} rows of losses for {len(space.genes)} genes")
    for gene, row in zip(space.genes, losses, strict=True):
        if len(row) != len(gene.options) or not all(map(isfinite, row)):
            raise ValueError(f"{gene.units[0]} needs {len(gene.options)} finite losses, got {row}")


def _nodes(space: SearchSpace, losses: Table) -> list[Node]:
    def part(i: int, numbers: Sequence[int]) -> Part:
        points: list[tuple[int, float, int]] = []
        for cost, loss, n in sorted(
            (space.genes[i].options[n].cost, losses[i][n], n) for n in numbers
        ):
            if not points or loss < points[-1][1]:
                points.append((cost, loss, n))
        return Part(i, tuple(points))

    nodes = []
    for i, gene in enumerate(space.genes):
        if gene.inside is not None:
            continue
        inner = space.inner.get(i, ())
        everything = range(len(gene.options))
        drops = [n for n in everything if inner and gene.options[n].is_drop]
        keeps = [n for n in everything if n not in drops]
        parts = [part(i, keeps), *(part(k, range(len(losses[k]))) for k in inner)]
        nodes.append(Node(part(i, drops) if drops else None, tuple(parts) if keeps else ()))
    return nodes


def _relax(nodes: Sequence[Node], lam: float) -> Relaxed:
    """Return the choices that minimise loss + lam * bits, each node alone."""
    chosen: dict[int, int] = {}
    points: list[tuple[int, float, int]] = []
    for node in nodes:
        kept = [(part.gene, *part.least(lam)) for part in node.parts]
        if node.drop is not None:
            dropped = (node.drop.gene, *node.drop.least(lam))
            if not kept or dropped[1] <= fsum(value for _, value, _ in kept):
                kept = [dropped]
        for gene, _, point in kept:
            chosen[gene] = point[2]
            points.append(point)
    return Relaxed(chosen, fsum(p[1] for p in points), sum(p[0] for p in points))


def _cheapest(nodes: Sequence[Node]) -> Relaxed:
    """Return the choices of fewest bits and, among those, of least loss."""
    chosen: dict[int, int] = {}
    points: list[tuple[int, float, int]] = []
    for node in nodes:
        kept = [(part.gene, part.points[0]) for part in node.parts]
        if node.drop is not None:
            dropped = (node.drop.gene, node.drop.points[0])
            keep = (sum(p[0] for _, p in kept), fsum(p[1] for _, p in kept))
            if not kept or dropped[1][:2] <= keep:
                kept = [dropped]
        for gene, point in kept:
            chosen[gene] = point[2]
            points.append(point)
    return Relaxed(chosen, fsum(p[1] for p in points), sum(p[0] for p in points))


def _best_price(
    nodes: Sequence[Node], over: Relaxed, within: Relaxed, limit: int
) -> tuple[Relaxed, float, float]:
    """Return the best plan within the limit that a price can buy, that price, the lower bound.

    The dual is concave and piecewise linear in the price: step to where the lines of the plans
    on either side of the limit cross, until no plan lies below the crossing.
    """
    while True:
        lam = (within.loss - over.loss) / (over.cost - within.cost)
        middle = _relax(nodes, lam)
        value, crossing = middle.loss + lam * middle.cost, over.loss + lam * over.cost
        if value >= crossing - 1e-12 * (abs(crossing) + abs(over.loss)):
            return within, lam, value - lam * limit
        if middle.cost <= limit:
            within = middle
        else:
            over = middle


def _core(
    nodes: Sequence[Node], lam: float, width: float, limit: int, max_states: int
) -> tuple[State | None, bool]:
    """Return the best plan whose loss is within `width` of the bound, and whether all were seen.

    At the price lam a plan's loss is the bound + what its choices waste + lam * unused bits, so
    a choice that wastes more than `width` cannot be part of one.
    """
    nodes = [_narrow(node, lam, width) for node in nodes]
    nodes.sort(key=_freedom)
    ranges = [_range(node) for node in nodes]
    fewest, most = sum(r[0] for r in ranges), sum(r[1] for r in ranges)
    states: list[State] = [(0, 0.0, None)]
    floor, is_whole = 0.0, True

    def merge(states: list[State], part: Part, floor: float, few: int, many: int) -> list[State]:
        """Return states x points that may still end within the width, dominated ones left out."""
        made: list[State] = []
        for bits, loss, link in states:
            for cost, more, n in part.points:
                total, worse = bits + cost, loss + more
                left = width - (worse + lam * total - floor)
                if left >= 0 and total + few <= limit and lam * (limit - total - many) <= left:
                    made.append((total, worse, (link, part.gene, n)))
        return _undominated(made)

    for node, (few, many) in zip(nodes, ranges, strict=True):
        floor += _value(node, lam)
        fewest, most = fewest - few, most - many
        dropped = merge(states, node.drop, floor, fewest, most) if node.drop else []
        kept = states if node.parts else []
        for k, part in enumerate(node.parts):
            rest = node.parts[k + 1 :]
            kept = merge(
                kept,
                part,
                floor - fsum(p.least(lam)[0] for p in rest),
                fewest + sum(p.points[0][0] for p in rest),
                most + sum(p.points[-1][0] for p in rest),
            )
        states = _undominated(dropped + kept) if dropped else kept
        if len(states) > max_states:
            states = sorted(sorted(states, key=lambda s: s[1] + lam * s[0])[:max_states])
            is_whole = False
    return (states[-1] if states else None), is_whole


def _undominated(states: list[State]) -> list[State]:
    """Return the states that no other beats in both bits and loss, by bits."""
    states.sort(key=lambda s: s[:2])
    kept: list[State] = []
    for state in states:
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def _narrow(node: Node, lam: float, width: float) -> Node:
    """Return the node without the choices that alone waste more than `width` at the price."""
    value = _value(node, lam)

    def narrow(part: Part, wasted: float) -> Part:
        least = part.least(lam)[0] - wasted
        return Part(part.gene, tuple(p for p in part.points if p[1] + lam * p[0] - least <= width))

    drop = node.drop and narrow(node.drop, node.drop.least(lam)[0] - value)
    opening = fsum(part.least(lam)[0] for part in node.parts) - value
    parts = tuple(narrow(part, opening) for part in node.parts)
    return Node(drop if drop and drop.points else None, parts if opening <= width else ())


def _value(node: Node, lam: float) -> float:
    """Return the smallest loss + lam * bits of a node."""
    kept = [fsum(part.least(lam)[0] for part in node.parts)] if node.parts else []
    return min(kept + ([node.drop.least(lam)[0]] if node.drop else []))


def _range(node: Node) -> tuple[int, int]:
    """Return the fewest and the most bits a node can take."""
    ends = [(p.points[0][0], p.points[-1][0]) for p in ([node.drop] if node.drop else [])]
    if node.parts:
        firsts = sum(part.points[0][0] for part in node.parts)
        ends.append((firsts, sum(part.points[-1][0] for part in node.parts)))
    return min(e[0] for e in ends), max(e[1] for e in ends)


def _freedom(node: Node) -> tuple[bool, int]:
    """Sort key: nodes without a choice first, they add no states; then the widest range of bits."""
    few, many = _range(node)
    choices = (node.drop is not None) + sum(len(part.points) - 1 for part in node.parts)
    return choices > 0, few - many


def _chosen(link: Link | None) -> dict[int, int]:
    chosen: dict[int, int] = {}
    while link is not None:
        link, gene, number = link
        chosen[gene] = number
    return chosen


def _genome(space: SearchSpace, chosen: dict[int, int]) -> Genome:
    return tuple(chosen.get(i, 0) for i in range(len(space.genes)))
