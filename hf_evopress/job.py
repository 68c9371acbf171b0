"""One compression job: its checks, its steps, and the files that each step leaves behind.

    work/stats/        second moments of every block's inputs      (calibrate)
    work/moments/      second moments of the output gradients      (sensitivity)
    work/store/        every level of every unit, packed           (store)
    work/search/       the state of each search after each round   (search)

A step whose files are there is not done again, so a job that was stopped goes on, and another
budget for the same model, data and levels costs only its search.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from . import compose
from .budget import Budget
from .calibrate import calibrate, load_stats
from .data import load_splits
from .evaluator import Evaluator
from .export.base import check_target
from .fingerprint import model_fingerprint, tensor_fingerprint, text_fingerprint
from .level import Level
from .menu import menus
from .plan import Plan
from .plugins import load
from .recipe import Recipe
from .resources import atomic_write
from .search import Search
from .sensitivity import load_moments, output_moments
from .size import header_bytes
from .space import SearchSpace
from .store import LevelStore, Progress, Source
from .units import find_units

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Job:
    """A recipe being carried out.

    Making one checks all that can be checked without weights, in seconds: the model's
    architecture, the menu of levels against its shapes, the budget, the text's length.
    """

    def __init__(self, recipe: Recipe, *, progress: Progress | None = None) -> None:
        self.recipe, self.progress = recipe, progress
        if recipe.out is not None:
            check_target(recipe.out)
        self.config = _dense_config(recipe)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        self.units = find_units(skeleton, skip=recipe.skip)
        shapes = {unit.name: unit.shape for unit in self.units}
        self.menus = _pinned(menus(shapes, recipe.levels), recipe.pin)
        self.space = _space(skeleton, self.units, self.menus, recipe)
        said = recipe.budget
        self.budget = Budget.parse(self.space, bits=said.bits, size=said.size, ratio=said.ratio)
        if self.budget.note:
            logger.warning(self.budget.note)

    # -- inputs --------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """What is shipped uncompressed: the recipe's dtype, else the model's own if of 16 bits."""
        if self.recipe.dtype != "auto":
            return _DTYPES[self.recipe.dtype]
        own = str(getattr(self.config, "dtype", None)).removeprefix("torch.")
        return _DTYPES.get(own, torch.bfloat16)

    @property
    def work(self) -> Path:
        """Where statistics, levels and search state are kept."""
        if self.recipe.work is not None:
            return Path(self.recipe.work)
        return Path(f"{self.recipe.out or Path(self.recipe.model).name}.work")

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.recipe.model, revision=self.recipe.revision)

    @cached_property
    def tokens(self) -> Mapping[str, Tensor]:
        """Disjoint calibration, search, held-out and test sequences, (n, seq_len) each."""
        data = self.recipe.data
        counts = {k: getattr(data, k) for k in ("calibration", "search", "heldout", "test")}
        return load_splits(
            data.sources,
            self.tokenizer,
            counts,
            seq_len=data.seq_len,
            seed=data.seed,
            split=data.split,
            column=data.column,
        )

    def load_model(self) -> Any:
        """Return the dense model in the dtype to ship."""
        model = AutoModelForCausalLM.from_pretrained(
            self.recipe.model, revision=self.recipe.revision, dtype=self.dtype
        )
        return model.eval().requires_grad_(False)

    @cached_property
    def model(self) -> Any:
        """The dense model to compute with: the values to ship, in float32 on a CPU."""
        model = self.load_model()
        return model.to("cuda") if torch.cuda.is_available() else model.float()

    # -- steps ---------------------------------------------------------------------------------

    def calibrate(self) -> Source:
        """Return what levels are made from, after one streaming pass and one backward pass."""
        calibrate(
            self.model,
            self.tokens["calibration"],
            self.work,
            units=self.units,
            heldout_tokens=self.tokens.get("heldout"),
            progress=self.progress,
        )
        moments = None
        if n_tokens := self.recipe.search.sensitivity_tokens:
            n = max(1, n_tokens // self.recipe.data.seq_len)
            output_moments(
                self.model,
                self.tokens["calibration"][:n],
                self.work,
                units=self.units,
                seed=self.recipe.data.seed,
                progress=self.progress,
            )
            moments = lambda block: load_moments(self.work, block)  # noqa: E731
        return Source(self._fingerprint(), lambda block: load_stats(self.work, block), moments)

    def build(self) -> LevelStore:
        """Return the level store of the recipe's menu."""
        return LevelStore.build(
            self.work / "store",
            self.model,
            self.units,
            self.menus,
            self.calibrate(),
            progress=self.progress,
        )

    def evaluator(self, store: LevelStore) -> Evaluator:
        """Return what scores plans on the search tokens."""
        fitness = load("fitness", self.recipe.search.fitness)()
        return Evaluator(self.model, store, self.tokens["search"], fitness)

    def search(self, store: LevelStore) -> Search:
        """Return the recipe's search, at the point where an earlier run of it was stopped."""
        settings = self.recipe.search
        pool = self.tokens["search"]
        search = Search(
            self.space,
            self.budget,
            strategy=settings.strategy,
            table=self.table(store),
            n_sequences=len(pool),
            seq_len=pool.shape[1],
            seed=settings.seed,
            **settings.settings,
        )
        kept = _read_json(self._search_file(search))
        return search.restore(kept) if kept is not None else search

    def keep(self, search: Search) -> None:
        """Write the search's state, so that it can go on from here."""
        atomic_write(self._search_file(search), json.dumps(search.state()))

    def _search_file(self, search: Search) -> Path:
        # one file per problem: searches for several budgets share a work folder
        problem = {**search.state()["problem"], "fitness": self.recipe.search.fitness}
        return self.work / "search" / f"{text_fingerprint(json.dumps(problem))}.json"

    def table(self, store: LevelStore) -> list[list[float]] | None:
        """Return the predicted loss of each option of each gene, None without sensitivities."""
        if not self.recipe.search.sensitivity_tokens:
            return None
        return [
            [
                sum(store.scores(unit, option.level)["sensitivity_nats"] for unit in gene.units)
                for option in gene.options
            ]
            for gene in self.space.genes
        ]

    def plan(self, levels: Mapping[str, Any], **about: Any) -> Plan:
        """Return the plan of `levels` (unit -> level) with where it came from."""
        shapes = {unit.name: unit.shape for unit in self.units if unit.name in levels}
        genome = self.space.genome({unit: str(level) for unit, level in levels.items()})
        budget = {
            "asked": self.budget.text,
            "bits_per_weight": round(self.space.bits_per_weight(genome), 6),
            "checkpoint_bytes_at_most": self.space.size_bytes(genome),
        }
        return Plan(
            levels,
            shapes=shapes,
            base_model=self.recipe.model,
            revision=self.recipe.revision,
            budget=budget,
            **about,
        )

    def _fingerprint(self) -> dict[str, Any]:
        from . import __version__

        data = self.tokens
        return {
            "model": model_fingerprint(self.model),
            "data": {
                k: tensor_fingerprint(v) for k, v in data.items() if k in ("calibration", "heldout")
            },
            "sensitivity": [self.recipe.search.sensitivity_tokens, self.recipe.data.seed],
            "hf_evopress": __version__,
        }


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    from . import __version__

    found = {"hf_evopress": __version__, "torch": torch.__version__}
    return {**found, "transformers": transformers.__version__}


def _dense_config(recipe: Recipe) -> Any:
    config = AutoConfig.from_pretrained(recipe.model, revision=recipe.revision)
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        kind = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ValueError(
            f"{recipe.model} is already compressed ({kind}); start from the dense model, "
            "or dequantize() it and save that first"
        )
    return config


def _space(
    skeleton: nn.Module, units: list[Any], offered: Mapping[str, list[Level]], recipe: Recipe
) -> SearchSpace:
    options = {
        unit.name: [(str(x), compose.cost_bits(x, unit.shape)) for x in offered[unit.name]]
        for unit in units
    }
    unit_keys = {f"{unit.name}.weight" for unit in units}
    tied = set(getattr(skeleton, "all_tied_weights_keys", ()))
    others = {
        key: tensor
        for key, tensor in skeleton.state_dict().items()
        if key not in unit_keys and key not in tied
    }
    rest = sum(16 * tensor.numel() for tensor in others.values())
    # every packed tensor of a unit, and the empty `weight` that makes loading without us fail
    packed = [
        f"{unit.name}.{key}"
        for unit in units
        for key in {"weight", *(k for x in offered[unit.name] for k in _keys(x, unit.shape))}
    ]
    n_weights = sum(unit.n_weights for unit in units)
    return SearchSpace.build(
        {unit.name: unit.n_weights for unit in units},
        options,
        fixed_bits=rest + 8 * header_bytes([*others, *packed]),
        dense_bits=rest + 16 * n_weights,
        ties=_ties(units, recipe.tie),
        pins={glob: str(compose.normalize(level)) for glob, level in recipe.pin.items()},
        forbid=dict(recipe.forbid),
        blocks={unit.name: unit.block for unit in units},
    )


def _pinned(offered: dict[str, list[Level]], pins: Mapping[str, str]) -> dict[str, list[Level]]:
    """Return the menus with one level only for units that a pattern pins; the last one wins."""
    made = dict(offered)
    for pattern, level in pins.items():
        names = [unit for unit in offered if fnmatchcase(unit, pattern)]
        if not names:
            raise ValueError(f"pin {pattern!r} matches none of the {len(offered)} units")
        made.update({unit: [compose.normalize(level)] for unit in names})
    return made


@lru_cache(maxsize=None)
def _keys(level: Level, shape: tuple[int, int]) -> tuple[str, ...]:
    return tuple(compose.empty(level, shape, torch.bfloat16))


def _ties(units: list[Any], tie: tuple[tuple[str, ...], ...]) -> list[list[str]]:
    """Return the units to tie: those of one block whose last name part is in one tuple of `tie`."""
    known = {unit.name.rpartition(".")[2] for unit in units}
    for part in (p for parts in tie for p in parts):
        if part not in known:
            raise ValueError(f"tie names {part!r}; units of this model are {sorted(known)}")
    groups: dict[tuple[int, int], list[str]] = {}
    for unit in units:
        for number, parts in enumerate(tie):
            if unit.name.rpartition(".")[2] in parts:
                groups.setdefault((unit.block, number), []).append(unit.name)
    return [names for names in groups.values() if len(names) > 1]


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged; delete it to search anew: {error}") from error
