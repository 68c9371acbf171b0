"""A plan as a table and as a heat map, as text for the terminal.

Rows are decoder blocks, columns the kinds of units in them; a cell shows stored bits per
weight. Needs neither torch nor matplotlib; the same map as a picture is in `plots.py`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..plans.level import Level, Term
from ..plans.plan import Plan, Shape
from ..plans.widths import width_kept, widths_tried

DENSE_BITS = 16

# Six points of matplotlib's cividis: readable with any colour vision, and in grey.
_CIVIDIS = (
    (0, 34, 78),
    (53, 69, 108),
    (102, 105, 112),
    (148, 142, 119),
    (200, 184, 102),
    (254, 232, 56),
)


_VISION = re.compile(r"(?:^|\.)(?:vision_|visual|image_tower)")
_ENCODER = re.compile(r"(?:^|\.)encoder\.")
_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")  # of the block, in the name of a unit


@dataclass(frozen=True)
class Grid:
    """The bits of a plan by block and kind: the numbers behind every heat map.

    blocks: block numbers, the rows. kinds: paths inside a block ("mlp.up_proj"), the columns.
    cells: (block, kind) -> bits per weight; a block may lack a kind.
    row_means, column_means: over weights, not over cells.
    """

    blocks: tuple[int, ...]
    kinds: tuple[str, ...]
    cells: Mapping[tuple[int, str], float]
    row_means: tuple[float, ...]
    column_means: tuple[float, ...]
    mean: float

    @property
    def labels(self) -> tuple[str, ...]:
        """Short names of the kinds: "up" for "mlp.up_proj" where no other kind has that name."""
        short = [k.rpartition(".")[2].removesuffix("_proj") for k in self.kinds]
        return tuple(
            name if short.count(name) == 1 else kind
            for name, kind in zip(short, self.kinds, strict=True)
        )

    @property
    def span(self) -> tuple[float, float]:
        """Least and largest value of a cell, at least one bit apart, for colour scales."""
        low, high = min(self.cells.values()), max(self.cells.values())
        return low, max(high, low + 1.0)


def grid(plan: Plan, bits: Mapping[str, float] | None = None) -> Grid:
    """Return the bits per weight of `plan` by block and kind.

    `bits` holds the stored bits per weight of each unit (cost_bits / n_weights); without it,
    what the levels say of themselves is shown (`nominal_bits`), which leaves out scales.
    Experts of one block share a cell. A sub-block at `drop` is 0 for every unit inside it.
    Embedding and head are in no block, and left out. Of an encoder-decoder a row has the block of
    that number in both, the decoder's as kinds of their own.
    """
    values = nominal_bits(plan) if bits is None else _checked(plan, bits)
    weighted: dict[tuple[int, str], list[tuple[float, int]]] = defaultdict(list)
    ends = ends_of(plan)
    is_beside = any(_ENCODER.search(unit) for unit in plan) and any("decoder." in u for u in plan)
    for unit in (unit for unit in _matrices(plan) if unit not in ends):
        dropped = any(plan[part].is_drop for part in _containers(unit) if part in plan)
        rows, columns = plan.shapes.get(unit, (1, 1))
        weighted[_place(unit, is_beside=is_beside)].append(
            (0.0 if dropped else values[unit], rows * columns)
        )
    if not weighted:
        raise ValueError("the plan names whole blocks only; there are no weights to show")
    blocks = tuple(sorted({block for block, _ in weighted}))
    kinds = tuple(dict.fromkeys(sorted((k for _, k in weighted), key=_kind_order)))
    in_row = [[w for k in kinds for w in weighted.get((b, k), ())] for b in blocks]
    in_column = [[w for b in blocks for w in weighted.get((b, k), ())] for k in kinds]
    return Grid(
        blocks=blocks,
        kinds=kinds,
        cells={place: _mean(found) for place, found in weighted.items()},
        row_means=tuple(map(_mean, in_row)),
        column_means=tuple(map(_mean, in_column)),
        mean=_mean([w for row in in_row for w in row]),
    )


def nominal_bits(plan: Plan) -> dict[str, float]:
    """Return the bits per weight that each level names: `bits`, `sparsity`, `rank`.

    Scales, zero points and masks are not counted; the exact cost is `compose.cost_bits`.
    """
    return {unit: _nominal(level, plan.shapes.get(unit)) for unit, level in plan.items()}


def heat_map(plan: Plan, bits: Mapping[str, float] | None = None, *, color: bool = True) -> str:
    """Return the plan as lines of cells, with ANSI 24-bit background colours unless told not to.

    `bits` as in `grid`.
    """
    shown = grid(plan, bits)
    width = max(5, *(len(label) + 1 for label in shown.labels))
    low, high = shown.span

    def cell(value: float | None) -> str:
        text = ("" if value is None else f"{value:.1f}").center(width)
        return _painted(text, (value - low) / (high - low)) if color and value is not None else text

    lines = ["block " + "".join(label.center(width) for label in shown.labels) + "  mean"]
    for block, mean in zip(shown.blocks, shown.row_means, strict=True):
        cells = "".join(cell(shown.cells.get((block, kind))) for kind in shown.kinds)
        lines.append(f"{block:5d} {cells} {mean:5.2f}")
    means = "".join(f"{mean:.2f}".center(width) for mean in shown.column_means)
    lines.append(f" mean {means} {shown.mean:5.2f}")
    values = nominal_bits(plan) if bits is None else bits
    lines += [f"{unit} {values[unit]:.2f}" for unit in ends_of(plan)]
    return "\n".join(lines)


def level_table(plan: Plan, bits: Mapping[str, float] | None = None) -> str:
    """Return one line per level: units, share of the weights, bits per weight, and where.

    `bits` as in `grid`.
    """
    values = nominal_bits(plan) if bits is None else _checked(plan, bits)
    by_level: dict[str, list[str]] = defaultdict(list)
    for unit, level in plan.items():
        by_level[str(level)].append(unit)
    total = sum(_n_weights(plan, unit) for unit in plan)
    rows = [("level", "units", "weights", "bits", "where")]
    for name, units in sorted(by_level.items(), key=lambda item: values[item[1][0]]):
        count = sum(_n_weights(plan, unit) for unit in units)
        mean = _mean([(values[unit], _n_weights(plan, unit)) for unit in units])
        rows.append((name, str(len(units)), f"{count / total:.1%}", f"{mean:.2f}", _where(units)))
    return _columns(rows, "<>>><")


def bits_line(plan: Plan) -> str:
    """Return the bits per weight that are stored, and those that the levels name, in a line."""
    named = f"{grid(plan).mean:.3f} named by the levels, without scales and zero points"
    stored = plan.budget.get("bits_per_weight")
    if not isinstance(stored, (int, float)):
        return f"bits per weight: {named}"
    return f"bits per weight: {stored:.3f} stored, all counted; {named} (as in the map below)"


def ends_of(plan: Plan) -> list[str]:
    """Return the units in no block, the embedding and the head, of a plan that has blocks."""
    outside = [unit for unit in plan if not _NUMBER.search(unit)]
    return outside if len(outside) < len(plan) else []


def ends_line(plan: Plan) -> str:
    """Return a sentence on what embedding and head take in the file, "" where that is not known."""
    told = plan.budget.get("ends_bytes") or {}
    parts = [
        f"{unit} {size / 1e6:.1f} MB ({plan.levels.get(unit, 'dense')})"
        for unit, size in told.items()
    ]
    return f"Outside the decoder: {', '.join(parts)}." if parts else ""


def widths_line(plan: Plan) -> str:
    """Return which width the MLPs got and what each that was tried lost, "" where none was."""
    rows, best = widths_tried(plan.search), width_kept(plan.search)
    if best is None:
        return ""
    tried = ", ".join(
        f"{row['channels']} ({'collapsed' if row['loss'] is None else format(row['loss'], '.4f')})"
        for row in rows
    )
    return (
        f"The MLPs keep {best['channels']} of {best['of']} channels in every block, fitted to the "
        f"outputs of all. Tried at this size, with their loss on search text: {tried}."
    )


def cache_lines(plan: Plan) -> str:
    """Return what the key-value cache takes and how each block's is stored, "" without a setting.

    One digit or letter per block: bits, or d for dense.
    """
    if not plan.cache:
        return ""
    names = {"dense": "d"}
    places = sorted((_place(unit)[0], str(level)) for unit, level in plan.cache.items())
    row = " ".join(
        names.get(level) or str(Level.parse(level).terms[0].kwargs.get("bits", "?"))
        for _, level in places
    )
    lines = [f"Cache, bits by block (d: dense, 16): {row}"]
    held, context = plan.budget.get("cache_bytes"), plan.budget.get("context")
    if isinstance(held, int) and isinstance(context, int):
        total = plan.budget.get("memory_bytes_at_most", 0)
        lines.append(
            f"{held / 1e6:.1f} MB at {context} tokens of one sequence; with the weights at most "
            f"{total / 1e6:.1f} MB."
        )
    return "\n".join(lines)


def results_table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return rows with the same keys as aligned columns, numbers to the right.

    >>> print(results_table([{"model": "dense", "KL": 0.0}, {"model": "3.3 bits", "KL": 0.479}]))
    model        KL
    dense     0.000
    3.3 bits  0.479
    """
    if not rows:
        raise ValueError("a table needs at least one row")
    keys = list(rows[0])
    numbers = [all(isinstance(row.get(k), int | float | None) for row in rows) for k in keys]
    cells = [tuple(_number(row.get(k)) for k in keys) for row in rows]
    return _columns([tuple(keys), *cells], "".join("<>"[n] for n in numbers))


def _nominal(level: Level, shape: Shape | None) -> float:
    return sum(_nominal_term(term, shape) for term in level.terms)


def _nominal_term(term: Term, shape: Shape | None) -> float:
    if term.method in ("drop", "zero"):
        return 0.0
    params = term.kwargs
    bits = float(params.get("bits", DENSE_BITS))
    if "rank" in params:
        rows, columns = shape or (1, 1)
        return bits * float(params["rank"]) * (rows + columns) / (rows * columns)
    if ":" in (pattern := str(params.get("pattern", ""))):
        kept, _, of = pattern.partition(":")
        return bits * int(kept) / int(of)
    return bits * (1 - float(params.get("sparsity", 0)))


def _matrices(plan: Plan) -> list[str]:
    """Return the units that are weights, not sub-blocks: nothing else lies inside them."""
    containers = {part for unit in plan for part in _containers(unit)}
    inner = [u for u in plan if u not in containers and not plan[u].is_drop]
    # a droppable sub-block without listed weights: a cell of its own
    return inner + [u for u in plan if plan[u].is_drop and u not in containers]


def _containers(unit: str) -> list[str]:
    """Return the module paths that `unit` lies in."""
    parts = unit.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _place(unit: str, *, is_beside: bool = False) -> tuple[int, str]:
    """Return block and kind: (3, "mlp.up_proj") for "model.layers.3.mlp.up_proj".

    is_beside: whether there are an encoder and a decoder.
    """
    match = _NUMBER.search(unit)
    if match is None:
        raise ValueError(f"unit {unit!r} has no block number in its name")
    kind = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", unit[match.end() :])
    # the decoder of an encoder-decoder has blocks of the same numbers, and is a kind of its own
    before = unit[: match.start()]
    stack = "decoder." if is_beside and "decoder." in before else ""
    stack = "vision." if _VISION.search(before) else stack
    return int(match[1]), stack + (kind or "block")


def _kind_order(kind: str) -> tuple[int, int, str]:
    """Order kinds as data flows: attention first, then the order in which models name them."""
    usual = ("q", "k", "v", "qkv", "o", "out", "dense", "gate", "up", "gate_up", "down", "fc1")
    name = kind.rpartition(".")[2].removesuffix("_proj")
    return ("attn" not in kind and "attention" not in kind, _index(usual, name), kind)


def _index(names: Sequence[str], name: str) -> int:
    return names.index(name) if name in names else len(names)


def _checked(plan: Plan, bits: Mapping[str, float]) -> Mapping[str, float]:
    for unit in plan:
        if unit not in bits:
            raise ValueError(f"bits per weight are missing for {unit}; give them for every unit")
        if not (math.isfinite(bits[unit]) and bits[unit] >= 0):
            raise ValueError(f"{unit} has {bits[unit]} bits per weight; a number >= 0 is needed")
    return bits


def _n_weights(plan: Plan, unit: str) -> int:
    return math.prod(plan.shapes.get(unit, (1, 1)))


def _mean(weighted: Sequence[tuple[float, int]]) -> float:
    return math.fsum(v * w for v, w in weighted) / sum(w for _, w in weighted)


def shade(share: float) -> tuple[tuple[int, int, int], bool]:
    """Return red, green, blue at `share` (0..1) of the scale, and whether dark text reads on it."""
    place = min(max(share, 0.0), 1.0) * (len(_CIVIDIS) - 1)
    i = min(int(place), len(_CIVIDIS) - 2)
    mixed = zip(_CIVIDIS[i], _CIVIDIS[i + 1], strict=True)
    red, green, blue = (round(a + (b - a) * (place - i)) for a, b in mixed)
    # ITU-R BT.601 luma decides between black and white text
    return (red, green, blue), 0.299 * red + 0.587 * green + 0.114 * blue > 120


def _painted(text: str, share: float) -> str:
    """Return `text` on the colour at `share` (0..1) of the scale."""
    (red, green, blue), is_light = shade(share)
    return f"\x1b[{30 if is_light else 97};48;2;{red};{green};{blue}m{text}\x1b[0m"


def _where(units: Sequence[str]) -> str:
    """Return how often each kind occurs: "up 12, down 3"."""
    count: dict[str, int] = defaultdict(int)
    for unit in units:
        kind = _place(unit)[1] if _NUMBER.search(unit) else unit
        count[kind.rpartition(".")[2].removesuffix("_proj")] += 1
    return ", ".join(f"{k} {n}" for k, n in sorted(count.items(), key=lambda item: -item[1]))


def _number(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _columns(rows: Sequence[tuple[str, ...]], align: str) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(align))]
    lines = (
        "  ".join(
            f"{text:{side}{width}}" for text, side, width in zip(row, align, widths, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
