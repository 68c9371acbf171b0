"""Read and write the text files in which EvoPress publishes its configurations.

    bits        module: bits                   model.layers.0.mlp.up_proj: 3
    sparsity    module: level                  model.layers.0.mlp.up_proj: -2
    drop        one line per decoder block     none | attn | mlp | attn+mlp

A sparsity level k moves k * step weights: the layer's sparsity is s + k * step / numel, with s
and step the same for all layers (https://github.com/IST-DASLab/EvoPress, pruner.py). The files
hold neither; s is the number at the end of the file's name, step is 1 000 000 in its scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..base.plugins import did_you_mean
from ..base.reading import reading
from .level import DENSE, DROP, Level
from .plan import Plan, Shape

Kind = Literal["bits", "sparsity", "drop"]
KINDS: tuple[Kind, ...] = ("bits", "sparsity", "drop")
DROPS = ("none", "attn", "mlp", "attn+mlp")
STEP = 1_000_000  # of the official scripts, scripts/run_prune.sh
LEVELS = {"bits": "gptq:bits={bits},group_size=128", "sparsity": "sparsegpt:sparsity={sparsity}"}
MAX_BYTES = 16 * 2**20
MAX_LINES = 200_000

SubBlockNames = Callable[[int, str], str]  # (block, "attn" or "mlp") -> module path

_LINE = re.compile(r"([\w-]+(?:\.[\w-]+)*)\s*:\s*(-?\d{1,4})")
_BLOCK = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class Published:
    """One file: its kind, and either a whole number per module or a word per block, in order."""

    kind: Kind
    values: Mapping[str, int]
    blocks: tuple[str, ...] = ()
    name: str = ""


def read_published(path: str | Path, *, kind: Kind | None = None) -> Published:
    """Return what a file says; `kind` settles what could be bits or sparsity levels."""
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {MAX_BYTES} are read")
    with reading(path):
        return parse_published(path.read_text(encoding="utf-8"), kind=kind, name=path.name)


def parse_published(text: str, *, kind: Kind | None = None, name: str = "") -> Published:
    """Return what `text` says; ValueError names the line that is wrong."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}{did_you_mean(kind, list(KINDS))}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or len(lines) > MAX_LINES:
        raise ValueError(f"a configuration has 1 to {MAX_LINES} lines, got {len(lines)}")
    if lines[0] in DROPS and kind in (None, "drop"):
        for number, line in enumerate(lines, start=1):
            if line not in DROPS:
                raise ValueError(f"line {number}: {line[:80]!r} is none of {', '.join(DROPS)}")
        return Published("drop", {}, tuple(lines), name)
    values: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"line {number}: {line[:80]!r} is not 'module: whole number'")
        if match[1] in values:
            raise ValueError(f"line {number}: {match[1]} is given twice")
        values[match[1]] = int(match[2])
    # sparsity levels add up to zero, since the search keeps the number of zeros; bits never do
    found: Kind = kind or ("sparsity" if min(values.values()) < 1 else "bits")
    if found == "bits" and not all(1 <= bits <= 16 for bits in values.values()):
        raise ValueError("bits are 1 to 16; are these sparsity levels (kind sparsity)?")
    return Published(found, values, (), name)


def to_plan(
    config: Published,
    *,
    shapes: Mapping[str, Shape] | None = None,
    level: str | None = None,
    sparsity: float | None = None,
    step: int = STEP,
    sub_block: SubBlockNames | None = None,
    base_model: str | None = None,
    revision: str | None = None,
) -> Plan:
    """Return the plan of a published configuration.

    shapes: unit -> (out, in) of the model, needed for sparsity. level: how a number becomes a
    level, by default "gptq:bits={bits},group_size=128" or "sparsegpt:sparsity={sparsity}".
    """
    template = level or LEVELS.get(config.kind, "")
    about: dict[str, Any] = {"kind": config.kind, "file": config.name}
    if config.kind == "drop":
        name = sub_block or _usual_sub_block
        levels = {
            name(i, part): DROP
            for i, word in enumerate(config.blocks)
            for part in word.split("+")
            if part != "none"
        }
        about["n_blocks"] = len(config.blocks)
    elif config.kind == "bits":
        levels = {u: _filled(template, bits=bits) for u, bits in config.values.items()}
        about["order"] = _order(list(config.values))
    else:
        base = _base_sparsity(config.name) if sparsity is None else sparsity
        levels = _sparse_levels(config.values, shapes, template, base, step)
        about |= {"sparsity": base, "step": step, "order": _order(list(config.values))}
    if not levels:
        raise ValueError("the configuration drops nothing; there is no plan in it")
    known = {unit: shapes[unit] for unit in levels if unit in shapes} if shapes else {}
    plan = Plan(levels, known, base_model, revision, search={"published": about})
    if shapes and config.kind != "drop":
        plan.check(shapes)
    return plan


def published_text(
    plan: Plan,
    *,
    kind: Kind | None = None,
    sparsity: float | None = None,
    step: int | None = None,
    n_blocks: int | None = None,
) -> str:
    """Return `plan` in the official format; ValueError where that format cannot say it.

    An imported plan is written as it was read; for others the kind is taken from its levels.
    """
    about = plan.search.get("published")
    about = about if isinstance(about, Mapping) else {}
    kind = kind or about.get("kind") or _kind_of(plan)
    if kind == "drop":
        return _drop_text(plan, n_blocks or about.get("n_blocks"))
    if kind == "bits":
        values = {unit: _bits(unit, level) for unit, level in plan.items()}
    elif kind == "sparsity":
        base, each = sparsity or about.get("sparsity"), step or about.get("step") or STEP
        if base is None:
            raise ValueError("say the base sparsity that levels count from: sparsity=0.5")
        values = {unit: _steps(plan, unit, base, each) for unit in plan}
    else:
        raise ValueError(f"unknown kind {kind!r}{did_you_mean(str(kind), list(KINDS))}")
    names = _ordered(list(values), about.get("order"))
    return "\n".join(f"{name}: {values[name]}" for name in names)


def config_files(path: str | Path) -> list[Path]:
    """Return the configuration files of a folder and the folders in it, or the file itself."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"no configuration at {path}")
    files = [p for p in sorted(path.rglob("*.txt")) if p.is_file() and not p.is_symlink()]
    if not files:
        raise FileNotFoundError(f"no .txt file in {path}")
    return files


def _usual_sub_block(block: int, part: str) -> str:
    return f"model.layers.{block}.{'self_attn' if part == 'attn' else 'mlp'}"


def _filled(template: str, **values: Any) -> Level:
    for key in values:
        if f"{{{key}}}" not in template:
            raise ValueError(f"the level {template!r} has no {{{key}}} to fill in")
    if values.get("bits") == 16:
        return DENSE
    for key, value in values.items():
        template = template.replace(f"{{{key}}}", str(value))
    return Level.parse(template)


def _base_sparsity(name: str) -> float:
    match = re.search(r"(?:^|[_-])(0?\.\d+|\d{2})(?:\.txt)?$", name)
    if match is None:
        raise ValueError(
            f"the base sparsity is not at the end of the file's name {name!r}, as in _50.txt; "
            "give it: sparsity=0.5"
        )
    return float(match[1]) if "." in match[1] else int(match[1]) / 100


def _sparse_levels(
    values: Mapping[str, int],
    shapes: Mapping[str, Shape] | None,
    template: str,
    base: float,
    step: int,
) -> dict[str, Level]:
    if not 0 <= base < 1 or step < 1:
        raise ValueError(f"sparsity is in [0, 1) and step above 0, got {base} and {step}")
    if shapes is None:
        raise ValueError("sparsity levels count weights: give the model, for its shapes")
    levels = {}
    for unit, k in values.items():
        if unit not in shapes:
            raise ValueError(f"{unit} is not in the model{did_you_mean(unit, list(shapes)[:2000])}")
        rows, columns = shapes[unit]
        sparsity = round(base + k * step / (rows * columns), 8)
        if not 0 <= sparsity < 1:
            raise ValueError(
                f"{unit} at level {k} would have sparsity {sparsity}: the base sparsity {base}, "
                f"the step {step} or the model is another"
            )
        levels[unit] = _filled(template, sparsity=sparsity)
    return levels


def _kind_of(plan: Plan) -> Kind:
    if all(level.is_drop for level in plan.values()):
        return "drop"
    sparse = any("sparsity" in term.kwargs for level in plan.values() for term in level.terms)
    return "sparsity" if sparse else "bits"


def _bits(unit: str, level: Level) -> int:
    bits = 16 if level.is_dense else level.terms[0].kwargs.get("bits")
    if len(level.terms) > 1 or type(bits) is not int:
        raise ValueError(f"{unit} is at {level}; the bit-width format holds whole bits only")
    return bits


def _steps(plan: Plan, unit: str, base: float, step: int) -> int:
    level = plan[unit]
    sparsity = level.terms[0].kwargs.get("sparsity")
    if len(level.terms) > 1 or "bits" in level.terms[0].kwargs or sparsity is None:
        raise ValueError(f"{unit} is at {level}; the sparsity format holds sparsities only")
    if unit not in plan.shapes:
        raise ValueError(f"the plan lacks the shape of {unit}, which its sparsity level counts by")
    rows, columns = plan.shapes[unit]
    steps = (float(sparsity) - base) * rows * columns / step
    if abs(steps - round(steps)) > 0.01:
        raise ValueError(f"{unit} at {level} is {steps:.3f} steps of {step} from {base}, not whole")
    return round(steps)


def _drop_text(plan: Plan, n_blocks: int | None) -> str:
    dropped: dict[int, set[str]] = {}
    for unit, level in plan.items():
        block, part = _block(unit), "attn" if re.search("attn|attention", unit) else "mlp"
        if not level.is_drop:
            raise ValueError(f"{unit} is at {level}; the drop format holds dropped sub-blocks only")
        dropped.setdefault(block, set()).add(part)
    if n_blocks is None or n_blocks <= max(dropped):
        raise ValueError(f"say how many blocks the model has, above {max(dropped)}: n_blocks=32")
    words = ["+".join(sorted(dropped.get(i, ()))) or "none" for i in range(n_blocks)]
    return "\n".join(words) + "\n"


def _block(unit: str) -> int:
    match = _BLOCK.search(unit)
    if match is None:
        raise ValueError(f"{unit} has no block number in its name")
    return int(match[1])


def _order(names: Sequence[str]) -> Any:
    """Return how `names` are ordered, in short: "name", groups of kinds, or the list itself.

    The official files go by name, or through the blocks once per group of layers of one size.
    """
    if list(names) == sorted(names):
        return "name"
    if all(map(_BLOCK.search, names)):
        groups: list[list[str]] = []
        last = None
        for name in names:
            block, kind = _block(name), _kind(name)
            if last is None or block < last:
                groups.append([])
            if kind not in groups[-1]:
                groups[-1].append(kind)
            last = block
        if _ordered(names, groups) == list(names):
            return groups
    return list(names)


def _ordered(names: Sequence[str], order: Any) -> list[str]:
    if order == "name":
        return sorted(names)
    if isinstance(order, list) and set(map(str, order)) == set(names):
        return [str(name) for name in order]
    if not all(map(_BLOCK.search, names)):
        return list(names)
    place: dict[str, tuple[int, int]] = {}
    for i, kinds in enumerate(order if isinstance(order, list) else ()):
        place.update({kind: (i, j) for j, kind in enumerate(_strings(kinds))})
    rest = (len(place), 0)

    def key(name: str) -> tuple[int, int, int, str]:
        group, within = place.get(_kind(name), rest)
        return group, _block(name), within, name

    return sorted(names, key=key)


def _strings(values: Any) -> Iterable[str]:
    return [v for v in values if isinstance(v, str)] if isinstance(values, list) else []


def _kind(name: str) -> str:
    match = _BLOCK.search(name)
    return name[match.end() :] if match else name
