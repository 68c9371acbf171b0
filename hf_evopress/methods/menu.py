"""Menus: which levels are offered to which unit, by family or as the user lists them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..base.plugins import did_you_mean
from ..plans.level import DENSE, Level
from . import compose

Shape = tuple[int, int]

# Whole-bit levels of one group size make an additive allocator return the uniform plan at
# whole-bit budgets; the steps between them (half groups, double groups) let a budget be used up.
DEFAULT_BITS = (2, 3, 4, 5, 6, 8)
FINE_BITS = (2, 3, 4)
# Rank r costs 8 r (out + in) bits with 8-bit factors: beyond rank 32 more bits are the better buy.
RANKS = (4, 8, 16, 32)
RANK_MULTIPLE = 8
# Kept weights of 3 bits and wide groups fill the gap between 2 and 3 whole bits, which is where
# sparse levels win: 1.01 instead of 1.14 nats at 2.8 bits on SmolLM2-135M, beside gptq alone.
JOINT_SPARSITIES = (0.3, 0.4, 0.5, 0.6)
WIDE_GROUPS = (192, 256, 128)
SPARSITY_STEP = 0.05
SPARSITY_SPAN = 4  # steps to either side of the sparsity asked for
RATIOS = tuple(n / 10 for n in range(3, 10))  # of the weight's values, kept in factors

# A trellis code has no groups: whole and half bits, and the search mixes them. With whole
# bits alone, layers that should have 2.5 lose a quarter more: half bits are worth up to 9 % of the
# loss. From 6 bits on scalar codes lose as little, and decode faster. Values that are
# computed make CPUs faster than dense weights. Scales of rows and columns lose a tenth less, for
# 0.008 bits per weight of 4096 x 4096.
TRELLIS = "codebook=weyl,scales=channels"
TRELLIS_BITS: tuple[float, ...] = (1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 6, 8)
# Around what a budget leaves a weight: few layers of a plan have others, and each level takes as
# long to make as any.
TRELLIS_BELOW, TRELLIS_ABOVE = 1.5, 2.5

# Types of GGUF files that ggml makes fast: of 32 weights per block, and of 256 where rows are
# multiples of that. The iq2 and iq3 types lose a tenth less than q2_k and q3_k, and take ten times
# as long to make.
GGUF_NARROW = ("iq4_nl", "q4_1", "q5_0", "q5_1", "q8_0")
GGUF_WIDE = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k")

# What vLLM's own kernels take of compressed-tensors; without zero points, as stock transformers
# reads those only where all layers have one level.
VLLM_BITS, VLLM_GROUPS = (4, 8), (32, 64, 128)

# What exllamav3's kernels take (export/exl3_format/tensors.py).
EXL3_BITS = (2, 3, 4, 5, 6, 8)

FAMILIES = ("quant", "trellis", "sparse", "lowrank", "residual", "gguf", "vllm", "exl3")
_APART = ("gguf", "vllm", "exl3")  # not under `all`: for files of other programs
_STEPS = {"gguf": 32, "vllm": 32, "exl3": 128}  # what sizes are multiples of that those hold


def default_levels(method: str = "gptq") -> list[str]:
    """Return the default menu: 2-8 bits at group 64, and 2-4 bits at groups 32 and 128 as well."""
    whole = [f"{method}:bits={b},group_size=64" for b in DEFAULT_BITS]
    fine = [f"{method}:bits={b},group_size={g}" for b in FINE_BITS for g in (32, 128)]
    return whole + fine


def menus(
    shapes: Mapping[str, Shape],
    levels: Sequence[str | Level] | None = None,
    *,
    families: Sequence[str] = (),
    sparsity: float | None = None,
    bits: tuple[float, float] | None = None,
) -> dict[str, list[Level]]:
    """Return unit -> the levels it is offered, cheapest first.

    With `levels` given, every unit must take every level, else ValueError names units, shape and
    group sizes that would fit. Else the menu is that of `families`, by default quant, or sparse
    where a budget of `sparsity` counts values instead of bits: a level that does not fit a
    unit's shape is left out for that unit, and a unit that takes no group of 64 is offered the
    largest of 32, 16 and a whole row that it takes instead; one that takes no level stays dense.
    bits: the least and the most that budgets leave a weight, by default anything.
    """
    if levels is None:
        chosen = _families(families, sparsity)
        menu = {unit: family_menu(shape, chosen, sparsity, bits) for unit, shape in shapes.items()}
        if menu and all(levels == [DENSE] for levels in menu.values()):
            unit, shape = next(iter(shapes.items()))
            step = max(_STEPS.get(family, 1) for family in chosen)
            sizes = f", for sizes that are multiples of {step}" if step > 1 else ""
            raise ValueError(
                f"no layer takes a level of family {', '.join(chosen)}{sizes}; {unit} has "
                f"{shape[0]} x {shape[1]} weights"
            )
        return menu
    if families:
        raise ValueError(f"say levels or families, not both; got families={list(families)}")
    wanted = [compose.normalize(level) for level in levels]
    if repeated := {str(x) for x in wanted if wanted.count(x) > 1}:
        raise ValueError(f"levels are given twice: {', '.join(sorted(repeated))}")
    for unit, shape in shapes.items():
        for level in wanted:
            try:
                compose.check_shape(level, shape)
            except ValueError as error:
                raise ValueError(f"{unit}: {error}") from error
    return {unit: _by_cost(wanted, shape) for unit, shape in shapes.items()}


def family_menu(
    shape: Shape,
    families: Sequence[str],
    sparsity: float | None,
    bits: tuple[float, float] | None = None,
) -> list[Level]:
    """Return the levels of some families that a weight of `shape` takes, cheapest first."""
    group = 64 if shape[1] % 64 == 0 else next((g for g in (32, 16) if shape[1] % g == 0), -1)
    words: list[str] = []
    for family in families:
        if family in ("quant", "residual"):
            words += _quant(group)
        if family == "trellis":
            words += _trellis(shape, trellis_bits(bits))
        if family == "gguf":
            words += [f"gguf:type={t}" for t in (*GGUF_NARROW, *GGUF_WIDE)]
        if family == "exl3" and not any(n % 128 for n in shape):
            # scales of channels, as the files have room for them anyway
            tail = "state_bits=16,codebook=mul1,rotation=128,order=mma,scales=channels"
            words += [f"trellis:bits={b},{tail}" for b in EXL3_BITS]
        if family == "vllm":
            words += [
                f"gptq:bits={b},group_size={g},symmetric=true"
                for b in VLLM_BITS
                for g in VLLM_GROUPS
            ]
        if family == "residual":
            words += [
                f"gptq:bits={b},group_size={group} + lowrank:rank={r},factors=int8"
                for b in FINE_BITS
                for r in RANKS
            ]
        if family == "sparse":
            words += _sparse(shape, group, sparsity)
        if family == "lowrank":
            words += _lowrank(shape, sparsity)
    offered = dict.fromkeys(compose.normalize(word) for word in words)
    able = [level for level in offered if fits(level, shape)]
    return _by_cost(able or [DENSE], shape)


def trellis_bits(bits: tuple[float, float] | None) -> list[float]:
    """Return the rates that budgets from so many bits per weight to so many make use of.

    None: any budget, but for 8 bits, where scalar codes lose as little.
    """
    if bits is None:
        return [*TRELLIS_BITS[:-1]]
    low, high = bits
    around = [b for b in TRELLIS_BITS if low - TRELLIS_BELOW <= b <= high + TRELLIS_ABOVE]
    return around or [TRELLIS_BITS[-1]]


def _trellis(shape: Shape, rates: Sequence[float]) -> list[str]:
    """Return trellis levels with the first rotation that sizes with a large odd factor allow."""
    for rotation in ("", *(f",rotation={n}" for n in (256, 128, 64, 32, "none"))):
        words = [f"trellis:bits={b},{TRELLIS}{rotation}" for b in rates]
        if fits(compose.normalize(words[0]), shape):
            break
    return words


def fits(level: Level, shape: Shape) -> bool:
    """Return whether a weight of `shape` can take `level`."""
    try:
        compose.check_shape(level, shape)
    except ValueError:
        return False
    return True


def _families(families: Sequence[str], sparsity: float | None) -> list[str]:
    """Return the families meant; ValueError where one cannot serve the budget."""
    for family in families:
        if family not in (*FAMILIES, "all"):
            hint = did_you_mean(family, [*FAMILIES, "all"])
            raise ValueError(f"unknown family {family!r}{hint}; there are {', '.join(FAMILIES)}")
    if sparsity is None:
        return (
            [f for f in FAMILIES if f not in _APART]
            if "all" in families
            else list(families or ("quant",))
        )
    for family in families:
        if family in ("quant", "trellis", "residual", *_APART):
            raise ValueError(
                f"family {family} removes no weights, so a budget of sparsity {sparsity} means "
                "nothing to it; take sparse or lowrank, or a budget in bits"
            )
    return ["sparse", "lowrank"] if "all" in families else list(families or ("sparse",))


def _quant(group: int) -> list[str]:
    if group == 64:
        return default_levels()
    return [f"gptq:bits={b},group_size={group}" for b in DEFAULT_BITS]


def _sparse(shape: Shape, group: int, sparsity: float | None) -> list[str]:
    if sparsity is None:
        wide = next((g for g in WIDE_GROUPS if shape[1] % g == 0), group)
        joint = [f"sparsegpt:sparsity={s},bits=3,group_size={wide}" for s in JOINT_SPARSITIES]
        return [*joint, f"sparsegpt:pattern=2:4,bits=4,group_size={group}"]
    steps = range(-SPARSITY_SPAN, SPARSITY_SPAN + 1)
    around = (round(sparsity + SPARSITY_STEP * n, 4) for n in steps)
    return [f"sparsegpt:sparsity={s}" for s in around if 0 < s < 1]


def _lowrank(shape: Shape, sparsity: float | None) -> list[str]:
    """Return factors of 8-bit entries for budgets of bits, of 16-bit ones where values count."""
    tail = ",factors=int8" if sparsity is None else ""
    even = shape[0] * shape[1] / sum(shape)  # the rank whose factors are as large as the weight
    ranks = [int(ratio * even) // RANK_MULTIPLE * RANK_MULTIPLE for ratio in RATIOS]
    words = [f"lowrank:rank={r}{tail}" for r in dict.fromkeys(ranks) if r]
    return words if sparsity is None else [*words, "dense"]


def _by_cost(levels: Sequence[Level], shape: Shape) -> list[Level]:
    return sorted(levels, key=lambda level: (compose.cost_bits(level, shape), str(level)))
