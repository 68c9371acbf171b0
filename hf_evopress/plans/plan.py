"""A plan: which unit gets which level, and where that came from. The product to share."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..base.plugins import did_you_mean
from ..base.reading import reading
from ..base.resources import atomic_write
from .level import Level
from .push import push_plans
from .repo import FILE_NAME, read_plan, read_text
from .widths import is_narrow

FORMAT_VERSION = 1
MAX_UNITS = 500_000  # the largest mixtures of experts have 70 000
MARK = b'"levels": {'  # in every plan file

_OBJECTS = ("budget", "levels", "shapes", "results", "search", "cache")

Shape = tuple[int, int]

_UNIT = re.compile(r"[\w-]+(\.[\w-]+)*")
_REVISION = re.compile(r"[\w.][\w./-]*")


@dataclass(frozen=True)
class Plan(Mapping[str, Level]):
    """An immutable mapping from unit (module path) to Level.

    levels: one level per unit; units that are not named stay dense.
    shapes: unit -> (out_features, in_features), so that a plan knows its model when it sees it.
    budget, results, search: how it was found and what was measured, as JSON values.
    cache: a setting for the key-value cache of attention layers, by their module path and
        `.kv_cache`; caches that are not named stay in 16 bits.

    >>> plan = Plan({"model.layers.0.mlp.up_proj": "rtn:bits=4,group_size=64"})
    >>> Plan.from_json(plan.to_json()) == plan
    True
    """

    levels: Mapping[str, Level]
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    base_model: str | None = None
    revision: str | None = None
    budget: Mapping[str, Any] = field(default_factory=dict)
    results: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Level] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.levels) > MAX_UNITS:
            raise ValueError(f"a plan of {len(self.levels)} units; at most {MAX_UNITS} are read")
        for unit in (*self.levels, *self.cache):
            if not isinstance(unit, str) or len(unit) > 500 or not _UNIT.fullmatch(unit):
                raise ValueError(
                    f"a unit is a module path such as model.layers.0.mlp.up_proj, got {unit!r:.200}"
                )
        _check_origin(self.base_model, self.revision)
        levels = {unit: Level.parse(self.levels[unit]) for unit in sorted(self.levels)}
        shapes = {unit: _shape(unit, self.shapes[unit]) for unit in sorted(self.shapes)}
        if not levels:
            raise ValueError("a plan needs at least one unit, got none")
        if stray := sorted(set(shapes) - set(levels)):
            raise ValueError(f"plan has a shape but no level for {_some(stray)}")
        cache = {unit: Level.parse(self.cache[unit]) for unit in sorted(self.cache)}
        object.__setattr__(self, "levels", MappingProxyType(levels))
        object.__setattr__(self, "cache", MappingProxyType(cache))
        object.__setattr__(self, "shapes", MappingProxyType(shapes))
        for name in ("budget", "results", "search"):
            # as JSON has it: a plan equals itself after saving and loading
            value = json.loads(json.dumps(dict(getattr(self, name)), allow_nan=False))
            object.__setattr__(self, name, MappingProxyType(value))

    def __getitem__(self, unit: str) -> Level:
        return self.levels[unit]

    def __iter__(self) -> Iterator[str]:
        return iter(self.levels)

    def __len__(self) -> int:
        return len(self.levels)

    def __hash__(self) -> int:
        return hash(self.to_json())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_dict() == other.to_dict()

    def __reduce__(self) -> tuple[Any, ...]:  # mapping proxies cannot be copied or pickled
        return (Plan.from_dict, (self.to_dict(),))

    def __deepcopy__(self, memo: Any) -> Plan:  # encoder-decoders copy their config at each call
        return self

    def __str__(self) -> str:
        return self.summary()

    # -- files ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, levels sorted by unit."""
        return {
            "format_version": FORMAT_VERSION,
            "base_model": self.base_model,
            "revision": self.revision,
            "budget": dict(self.budget),
            "levels": {unit: str(level) for unit, level in self.levels.items()},
            "shapes": {unit: list(shape) for unit, shape in self.shapes.items()},
            "results": dict(self.results),
            "search": dict(self.search),
            # left out where there is none: readers of before know no such key
            **({"cache": {u: str(level) for u, level in self.cache.items()}} if self.cache else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that `data` holds; unknown keys and newer versions are refused."""
        if not isinstance(data, Mapping):
            raise TypeError(f"a plan is a JSON object, got {type(data).__name__}")
        version = data.get("format_version", FORMAT_VERSION)
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise ValueError(
                f"plan has format_version {version!r}, this hf-evopress reads up to "
                f"{FORMAT_VERSION}: pip install --upgrade hf-evopress"
            )
        known = ["base_model", "revision", *_OBJECTS]
        values = {k: v for k, v in data.items() if k != "format_version"}
        for key, value in values.items():
            if key not in known:
                raise ValueError(f"unknown key {key!r} in plan{did_you_mean(key, known)}")
            if key in _OBJECTS and not isinstance(value, Mapping):
                raise TypeError(f"plan key {key!r} is an object, got {type(value).__name__}")
        if "levels" not in values:
            raise ValueError("plan has no 'levels'; is this file a plan?")
        return cls(**values)

    def to_json(self) -> str:
        """Return the plan as text: one unit per line, made to be read and diffed."""
        return json.dumps(self.to_short_dict(), indent=2, allow_nan=False) + "\n"

    def to_short_dict(self) -> dict[str, Any]:
        """Return the JSON values of a plan's file, for the caller to change; cheap when repeated.

        A shape is "576x1536", which keeps a unit on one line where a list would take four.
        """
        kept: dict[str, Any] | None = self.__dict__.get("_short")
        if kept is None:
            kept = self.to_dict()
            kept["shapes"] = {unit: f"{o}x{i}" for unit, (o, i) in self.shapes.items()}
            object.__setattr__(self, "_short", kept)
        return _copied(kept)  # type: ignore[no-any-return]

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Return the plan that `text` spells."""
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:  # too deep, or a number of 5000 digits
            raise ValueError(f"plan is not valid JSON: {error}") from error
        return cls.from_dict(data)

    def save(self, path: str | Path) -> Path:
        """Write the plan to `path`, a file or an existing folder; return the file's path."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        atomic_write(path, self.to_json())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Return the plan in the file `path`, or in the folder `path`."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(
                f"no plan at {path}; a plan is a file like {FILE_NAME} (Plan.from_pretrained also "
                "takes a model's folder without one, and a repository on the Hub)"
            )
        with reading(path):
            return cls.from_json(read_text(path))

    @classmethod
    def from_pretrained(
        cls,
        repo_or_path: str | Path,
        *,
        revision: str | None = None,
        filename: str | None = None,
        token: str | None = None,
    ) -> Plan:
        """Return the plan of a file, a folder, or a repository on the Hub: `me/smol@v1`.

        filename: which one, where a repository holds several. A compressed model's plan is also
        found in its config.json.
        """
        text, where = read_plan(repo_or_path, revision=revision, filename=filename, token=token)
        with reading(where):
            return cls.from_json(text)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str = FILE_NAME,
        private: bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
    ) -> Any:
        """Push the plan with index and card in one commit; return CommitInfo, whose oid pins it.

        Push further plans to the same repository under other file names: a Pareto front.
        """
        return push_plans(
            {filename: self},
            repo_id,
            private=private,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            token=token,
        )

    # -- questions -----------------------------------------------------------------------------

    def check(self, shapes: Mapping[str, Shape]) -> None:
        """Raise ValueError unless every unit is in `shapes` (a model's) with the same shape.

        Dropped sub-blocks have no shape and are not looked at. All mismatches are listed, so
        that one look tells another model from a renamed one.
        """
        wrong = []
        for unit in self:
            if self[unit].is_drop:
                continue
            if unit not in shapes:
                wrong.append(f"{unit}: not in the model{did_you_mean(unit, list(shapes))}")
            elif unit in self.shapes and tuple(self.shapes[unit]) != tuple(shapes[unit]):
                have, want = "x".join(map(str, shapes[unit])), "x".join(map(str, self.shapes[unit]))
                wrong.append(f"{unit}: the model has {have}, the plan was made for {want}")
        if wrong:
            origin = f" (made for {self.base_model})" if self.base_model else ""
            narrowed = ""
            if is_narrow(self.search):
                narrowed = (
                    "\nIt is of that model with fewer channels in its MLPs: run the recipe that "
                    "made it (evopress_recipe.yaml), or load the compressed model"
                )
            raise ValueError(
                f"the plan{origin} does not fit this model, {len(wrong)} of {len(self)} units:\n  "
                + _some(wrong, sep="\n  ")
                + narrowed
            )

    def check_depth(self, units: Iterable[str]) -> None:
        """Raise ValueError where a model's `units` go on after the plan's last block.

        A plan for fewer blocks would leave the others dense without a word. Kinds of units that
        the plan never names are left out: it may have skipped them on purpose.
        """
        places = [place for unit in self if (place := _place(unit))]
        last = max((block for block, _ in places), default=None)
        kinds = {kind for _, kind in places}
        found = {p[0] for unit in units if (p := _place(unit)) and p[1] in kinds}
        if last is not None and (more := sorted(block for block in found if block > last)):
            raise ValueError(
                f"the plan (made for {self.base_model or 'an unnamed model'}) does not fit this "
                f"model: it ends with block {last}, the model also has {_some([*map(str, more)])}"
                "; to leave those dense, give their units the level dense with plan.replace(levels="
                "{**plan.to_dict()['levels'], ...})"
            )

    def diff(self, other: Plan) -> dict[str, tuple[Level | None, Level | None]]:
        """Return unit -> (level here, level in `other`) where the two differ; None is absent."""
        mine, theirs = {**self.levels, **self.cache}, {**other.levels, **other.cache}
        units = sorted({*mine, *theirs})
        return {u: (mine.get(u), theirs.get(u)) for u in units if mine.get(u) != theirs.get(u)}

    def summary(self) -> str:
        """Return a few lines for people: base, budget, how many units and weights at each level."""
        count = Counter(str(level) for level in self.levels.values())
        weights: Counter[str] = Counter()
        for unit, (rows, columns) in self.shapes.items():
            weights[str(self.levels[unit])] += rows * columns
        total = sum(weights.values())
        lines = [f"plan for {self.base_model or 'an unnamed model'}: {len(self)} units"]
        if self.budget:
            lines.append("budget: " + ", ".join(f"{k} {v}" for k, v in self.budget.items())[:500])
        if isinstance(target := self.search.get("for"), str):
            lines.append(f"levels for: {target}"[:500])
        for level in sorted(count):
            share = f", {weights[level] / total:6.1%} of weights" if total else ""
            lines.append(f"  {count[level]:5d} units{share}  {level}")
        for setting, n in sorted(Counter(map(str, self.cache.values())).items()):
            lines.append(f"  {n:5d} caches  {setting}")
        for key, value in self.results.items():
            if isinstance(value, (int, float, str)):
                lines.append(f"{key}: {value}"[:500])
        # what a file says is printed on a terminal: no escape sequences
        return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)

    def rename(self, patterns: Mapping[str, str]) -> Plan:
        """Return the plan for a model whose modules have other names.

        patterns: regular expression -> replacement, each applied once to every unit:
        plan.rename({r"^model\\.": "model.language_model."}).
        """
        names = {unit: unit for unit in (*self, *self.cache)}
        for pattern, new in patterns.items():
            try:
                if not any(re.search(pattern, name) for name in names.values()):
                    raise ValueError(f"{pattern!r} matches none of the {len(self)} units")
                names = {u: re.sub(pattern, new, name, count=1) for u, name in names.items()}
            except re.error as error:
                raise ValueError(f"{pattern!r} -> {new!r} is no pattern: {error}") from error
        if len(set(names.values())) < len(names):
            twice = [name for name, n in Counter(names.values()).items() if n > 1]
            raise ValueError(f"renaming gives several units one name: {_some(twice)}")
        return self.replace(
            levels={names[unit]: str(level) for unit, level in self.levels.items()},
            shapes={names[unit]: shape for unit, shape in self.shapes.items()},
            cache={names[unit]: str(level) for unit, level in self.cache.items()},
        )

    def applied_to(self, config: Any) -> Plan:
        """Return the plan as that of a dense model which was just compressed by it.

        config: that model's, which says where it came from. Figures were those of other weights.
        """
        name, revision = config.name_or_path, getattr(config, "_commit_hash", None)
        if name in ("", self.base_model):
            return self.replace(results={}, revision=revision or self.revision)
        return self.replace(results={}, base_model=name, revision=revision)

    def replace(self, **changes: Any) -> Plan:
        """Return a copy with some fields replaced: `plan.replace(results={...})`."""
        return Plan.from_dict({**self.to_dict(), **changes})


def _check_origin(base_model: Any, revision: Any) -> None:
    # both are printed, and pasted into commands and code from cards
    if base_model is not None and not (isinstance(base_model, str) and base_model.isprintable()):
        raise ValueError(f"base_model is the name of a model, got {base_model!r:.200}")
    if revision is not None and not (isinstance(revision, str) and _REVISION.fullmatch(revision)):
        raise ValueError(f"revision is a branch, a tag or a commit, got {revision!r:.200}")


def _shape(unit: str, value: Any) -> Shape:
    numbers = value.split("x") if isinstance(value, str) else value
    try:
        if not all(type(n) is int or (isinstance(n, str) and len(n) < 20) for n in numbers):
            raise TypeError("not two whole numbers")
        rows, columns = (int(n) for n in numbers)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"shape of {unit} is out x in such as '576x1536', got {value!r:.200}"
        ) from error
    if rows <= 0 or columns <= 0 or rows * columns > 2**40:
        raise ValueError(f"shape of {unit} is not a weight's: {value!r:.200}")
    return rows, columns


def _place(unit: str) -> tuple[int, str] | None:
    """Return block and kind: (3, "layers.*.mlp.up_proj") for "model.layers.3.mlp.up_proj"."""
    match = re.search(r"(?:^|\.)(\d+)\.", unit)
    if match is None:
        return None
    start = unit[: match.start(1)].removeprefix("model.")  # a base model has no such prefix
    return int(match[1]), f"{start}*.{unit[match.end() :]}"


def _some(items: list[str], sep: str = ", ", most: int = 8) -> str:
    more = f"{sep}and {len(items) - most} more" if len(items) > most else ""
    return sep.join(items[:most]) + more


def _copied(value: Any) -> Any:
    """Return a deep copy of JSON values, much faster than copy.deepcopy."""
    if isinstance(value, dict):
        return {key: v if type(v) is str else _copied(v) for key, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value
