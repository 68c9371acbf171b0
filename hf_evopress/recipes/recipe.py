"""A recipe: everything that decides a compressed model, in one strict YAML file.

    model: HuggingFaceTB/SmolLM2-135M-Instruct
    budget: {bits: 3.3}
    data: {sources: [calibration.txt]}

The command line builds the same object, every run writes it beside its result, and cards embed
it: a pushed model is reproducible by copy and paste.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..base.plugins import did_you_mean
from ..base.reading import reading
from ..base.resources import atomic_write, bundled
from ..search.ask_tell import STARTING, STRATEGIES, check_settings
from .after_search import Adapter, Distil, Tune
from .checks import at_least, one_of
from .limit import Limit, check_context
from .mixture import parse as parse_fitness
from .targets import APART, DEFAULT, EXPORTS, families_for, without_for
from .widths import check_widths

KINDS = ("attention", "mlp")
BLOCKWISE = ("none", "fast", "best")  # see hf_evopress/refine
END_TO_END = "end-to-end"  # refine the whole model; see jobs/refinement.py
REFINE = (*BLOCKWISE, END_TO_END, *(f"{mode}+{END_TO_END}" for mode in BLOCKWISE[1:]))
ENDS = ("auto", "budget", "dense")
OFFLOAD = ("auto", "none", "cpu", "disk")  # see base/placement.py
DTYPES = ("auto", "bfloat16", "float16")
SEARCH_DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class Data:
    """Text and how it is cut; calibration, search and held-out sequences never overlap."""

    sources: tuple[str, ...] = ()  # files, Hub datasets name:config, self; none: fineweb-edu
    split: str = "train"
    column: str = "text"
    seq_len: int = 1024
    calibration: int = 56  # sequences
    search: int = 32
    heldout: int = 4  # to score levels
    test: int = 8  # for the final table, unless another text is given
    written: int = 0  # that the dense model writes itself, for refine to learn from as well
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "calibration", "search")
        at_least(self, 8, "seq_len")
        at_least(self, 0, "heldout", "test", "written")


@dataclass(frozen=True)
class Drop:
    """Which sub-blocks may be dropped."""

    kinds: tuple[str, ...] = ()  # attention, mlp; none: nothing is dropped
    keep_first: int = 0  # blocks that stay whole
    keep_last: int = 0
    max: float | None = None  # at most this share of each kind
    tokens: int = 2048  # to measure what each drop alone costs

    def __post_init__(self) -> None:
        for kind in self.kinds:
            one_of("kind of sub-block", kind, KINDS)
        at_least(self, 0, "keep_first", "keep_last")
        at_least(self, 1, "tokens")
        if self.max is not None and not 0 < self.max <= 1:
            raise ValueError(f"drop.max is a share of each kind, in (0, 1]; got {self.max}")


@dataclass(frozen=True)
class Search:
    """How levels are chosen. settings are the strategy's own, such as {generations: 20}."""

    strategy: str = "evolve"
    fitness: str = "kl"
    dtype: str = "auto"  # plans are compared in; auto: bfloat16 where the device multiplies in it
    seed: int = 0
    sensitivity_tokens: int = 6144  # 0: none, then evolve guesses from bits alone
    settings: Mapping[str, Any] = field(default_factory=dict)
    compare: tuple[str, ...] = ()  # strategies measured beside it, and where it starts from
    start: tuple[str, ...] = ()  # plans to begin with as well: files, folders, Hub names

    def __post_init__(self) -> None:
        one_of("search strategy", self.strategy, list(STRATEGIES))
        one_of("search.dtype", self.dtype, SEARCH_DTYPES)
        for name in self.compare:
            one_of("search strategy", name, list(STRATEGIES))
        if self.start and self.strategy not in STARTING:
            raise ValueError(
                f"strategy {self.strategy} begins with no plan of others, got start "
                f"{', '.join(self.start)}; those that do: {', '.join(STARTING)}"
            )
        parse_fitness(self.fitness)
        at_least(self, 0, "sensitivity_tokens")
        check_settings(self.strategy, self.settings)
        if self.strategy == "knapsack" and not self.sensitivity_tokens:
            raise ValueError("strategy knapsack needs sensitivity_tokens > 0, got 0")


@dataclass(frozen=True)
class Recipe:
    """What to compress, with what, to which size, and where to.

    >>> Recipe.from_dict({"model": "me/model", "budget": {"bits": 3.3}}).budget.bits
    3.3
    """

    model: str
    budget: Limit
    out: str | None = None
    work: str | None = None  # statistics, levels and search state; default: OUT.work
    revision: str | None = None
    trust_remote_code: bool = False  # run the model's own code, if it brings some
    dtype: str = "auto"  # of what is shipped uncompressed; auto: the model's own, 16 bit
    device: str = "auto"  # to compute on: cpu, cuda, cuda:1, ...; auto: a GPU where there is one
    offload: str = "auto"  # none; cpu, disk: blocks visit the device, hidden states wait there
    data: Data = field(default_factory=Data)
    levels: tuple[str, ...] | None = None  # none: the menu of `families`
    families: tuple[str, ...] = ()  # quant, sparse, lowrank, residual, all; none: what fits
    export: str = DEFAULT  # what it is for (or `for`): cpu, gpu, vllm, exl3, gguf, transformers
    ends: str = "auto"  # of embedding and head: auto, budget, dense or a level; see jobs.ends
    widths: tuple[
        float, ...
    ] = ()  # shares of the MLPs' channels that are tried, such as [1, 0.875]
    vision: bool = False  # compress the vision tower of a vision-language model, too
    drop: Drop = field(default_factory=Drop)
    skip: tuple[str, ...] = ()  # glob patterns of units that stay dense
    tie: tuple[tuple[str, ...], ...] = ()  # last name parts that share a level in each block
    pin: Mapping[str, str] = field(default_factory=dict)  # glob -> level
    forbid: Mapping[str, str] = field(default_factory=dict)  # glob -> glob of levels
    search: Search = field(default_factory=Search)
    refine: str = "none"  # none, fast, best, end-to-end, fast+end-to-end or best+end-to-end
    distil: Distil = field(default_factory=Distil)
    cache: tuple[str, ...] = ()  # settings offered to caches under budget.context; none: a menu
    share: bool = False  # offer levels whose codes two neighbouring layers have in common
    refine_levels: tuple[str, ...] = ()  # patterns of levels to tune before the search
    adapter: Adapter | None = None
    tune: Tune | None = None

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("refine", self.refine, REFINE)
        if self.ends not in ENDS and ":" not in self.ends:
            hint = did_you_mean(self.ends, list(ENDS))
            raise ValueError(f"ends is {', '.join(ENDS)} or a level, got {self.ends!r}{hint}")
        one_of("offload", self.offload, OFFLOAD)
        one_of("export (--for)", self.export, EXPORTS)
        self._check_export()
        self._check_share()
        check_widths(
            self.widths,
            self.budget,
            not_with={
                "search.start": bool(self.search.start),
                "an adapter": self.adapter is not None,
                "share": self.share,
                "vision": self.vision,
            },
        )
        check_context(
            self.budget,
            cache=self.cache,
            strategies=(self.search.strategy, *self.search.compare),
            has_sensitivities=self.search.sensitivity_tokens > 0,
            seq_len=self.data.seq_len,
            export=self.export,
        )
        if self.data.written and self.refine == "none" and not self.refine_levels:
            raise ValueError(
                f"data.written is {self.data.written}: text that the model writes is what refine "
                "learns from; say refine, such as best, or leave it out"
            )
        if self.distil != Distil() and not self.is_distilled:
            raise ValueError(
                f"distil is of learning end to end, and refine is {self.refine}: say refine: "
                f"{END_TO_END}, or leave distil out"
            )
        if self.budget == Limit():
            raise ValueError("a recipe needs a budget: bits, size or ratio (for example bits: 3.3)")
        if self.budget.drop is not None:
            if self.levels or self.families:
                raise ValueError(
                    "a budget of drops keeps all that is not dropped dense; to choose levels as "
                    "well, give a budget of bits and say drop.kinds"
                )
            if self.drop.max is not None:
                raise ValueError("a budget of drops says how many go; leave out drop.max")

    def _check_share(self) -> None:
        not_with = {
            "drop": bool(self.drop.kinds) or self.budget.drop is not None,
            "a budget of sparsity": self.budget.sparsity is not None,
            "tie": bool(self.tie),
            "refine": self.refine != "none" or bool(self.refine_levels),
            f"export (--for) {self.export}": self.export in APART,
        }
        if self.share and (wrong := [name for name, is_so in not_with.items() if is_so]):
            raise ValueError(
                f"share makes one level of two neighbouring layers, which does not go with "
                f"{wrong[0]}: leave one of them out"
            )

    def _check_export(self) -> None:
        if self.export not in APART:
            return
        others = [family for family in self.families if family != self.export]
        if others:
            raise ValueError(
                f"export (--for) {self.export} has its own levels; leave families {others} out"
            )
        if self.drop.kinds or self.budget.drop is not None or self.budget.sparsity is not None:
            raise ValueError(
                f"what is for {self.export} holds every weight and every sub-block: give a budget "
                "of bits, size or ratio, and no drop"
            )

    @property
    def offered_families(self) -> tuple[str, ...]:
        """The families whose levels are offered where no levels are given."""
        removes = self.budget.sparsity is not None or self.budget.drop is not None
        return self.families or families_for(self.export, removes_weights=removes)

    @property
    def blockwise(self) -> str:
        """How levels are refined block by block: none, fast or best."""
        return self.refine.removesuffix(END_TO_END).rstrip("+") or "none"

    @property
    def is_distilled(self) -> bool:
        """Whether the finished model learns from the dense one as a whole."""
        return self.refine.endswith(END_TO_END)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Return the recipe that `data` holds; unknown keys name the nearest valid key."""
        return _build(cls, without_for(data), "")

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Return the recipe in a YAML file with `key=value` or `group.key=value` overrides.

        A name without an ending, such as smollm2-135m-3.3bit, is a recipe of the package.
        """
        from .yaml_keys import load_once

        path = _find(path)
        with reading(path):
            data = load_once(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"{path}: a recipe is a mapping with keys such as model and budget")
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals:
                raise ValueError(f"an override is key=value, got {override!r}")
            _set(data, key.strip().split("."), _value(override, value))
        with reading(path):
            return cls.from_dict(data)

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values, defaults and the machine's devices left out."""
        return _plain(dataclasses.replace(self, device="auto", offload="auto"))

    def to_yaml(self) -> str:
        """Return the recipe as YAML, defaults left out."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, path: str | Path) -> None:
        """Write the recipe to `path`."""
        atomic_write(path, self.to_yaml())


def _find(path: str | Path) -> Path:
    """Return the file `path`, or the bundled recipe of that name."""
    if Path(path).is_file():
        return Path(path)
    known = {file.stem: file for file in sorted(bundled("recipes").glob("*.yaml"))}
    if str(path) in known:
        return known[str(path)]
    raise FileNotFoundError(f"no recipe at {path}{did_you_mean(str(path), list(known))}")


def _build(cls: type, data: Mapping[str, Any], where: str) -> Any:
    if not isinstance(data, Mapping):
        raise TypeError(f"{where.rstrip('.') or 'a recipe'} is a mapping, got {data!r}")
    hints = typing.get_type_hints(cls)
    for key in data:
        if key not in hints:
            raise ValueError(f"unknown key {where}{key!r}{did_you_mean(str(key), list(hints))}")
    for f in dataclasses.fields(cls):
        if f.name not in data and _is_required(f):
            raise ValueError(f"the recipe has no {where}{f.name!r}")
    values = {k: _convert(hints[k], v, f"{where}{k}") for k, v in data.items()}
    return cls(**values)


def _is_required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _convert(kind: Any, value: Any, where: str) -> Any:
    """Return `value` as the annotated type `kind`, or raise TypeError that names the key."""
    if dataclasses.is_dataclass(kind):
        return _build(typing.cast(type, kind), value, f"{where}.")
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(args[0], item, where) for item in items)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError(f"{where} is a mapping, got {value!r}")
        if args[1] is Any:
            return dict(value)
        return {str(k): _convert(args[1], v, where) for k, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) in (int, float):
        return str(value)
    if type(value) is not kind:
        a = "an" if kind is int else "a"
        raise TypeError(f"{where} is {a} {kind.__name__}, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for f in dataclasses.fields(value):
            this = getattr(value, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if this != default:
                plain[f.name] = _plain(this)
        return plain
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return dict(value) if isinstance(value, Mapping) else value


def _value(override: str, text: str) -> Any:
    """Return the YAML value of an override."""
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(
            f"override {override}: {text} is no YAML value; put text that begins with a sign in "
            "two kinds of quotes, such as skip='\"*.v_proj\"'"
        ) from error


def _set(data: dict[str, Any], path: list[str], value: Any) -> None:
    for part in path[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise ValueError(f"override {'.'.join(path)}: {part!r} is a value, not a group")
    data[path[-1]] = value
