"""One compression job: its checks, its steps, and the files that each step leaves behind.

    work/tokens/       the text as token windows                   (data)
    work/stats/        second moments of every block's inputs      (calibrate)
    work/moments/      second moments of the output gradients      (sensitivity)
    work/store/        every level of every unit, packed           (store)
    work/scores/       what dropping each sub-block costs, ...      (tables)
    work/search/       the state of each search after each round   (search)
    work/written-.../  text that the dense model wrote itself      (refine)

A step whose files are there is not done again, so a job that was stopped goes on, and another
budget for the same model, data and levels costs only its search.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..base.devices import computing_in, dtypes_of, has_bfloat16
from ..base.fingerprint import model_fingerprint, tensor_fingerprint, text_fingerprint
from ..base.progress import Progress
from ..base.ranks import start
from ..base.resources import atomic_write
from ..calibration.data import bos_of
from ..calibration.input_moments import calibrate, load_stats
from ..calibration.output_moments import load_moments, output_moments
from ..calibration.own_text import write_sequences
from ..calibration.token_cache import cached_splits
from ..export.base import check_target
from ..models.experts import warn_of_experts
from ..models.plain import make_plain
from ..models.stream import check_streamable
from ..plans.level import Level
from ..plans.plan import Plan
from ..recipes.recipe import Recipe
from ..refine.block_tuning import Tuning
from ..refine.blockwise import Settings
from ..refine.levels import chosen, refine_levels
from ..scoring.evaluator import Evaluator
from ..scoring.fitness.base import Fitness
from ..scoring.objective import fitness_of
from ..search.ask_tell import Search
from ..search.space import Genome
from ..store.level_store import LevelStore, Source
from .problem import pose
from .reporting import Reports
from .search_log import ENDING, SearchLog, read_state
from .tables import Tables

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 16  # of the search's, to see whether refinement helped
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Job:
    """A recipe being carried out.

    Making one checks all that can be checked without weights, in seconds: the model's
    architecture, the menu of levels against its shapes, the budget, the text's length.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        fitness: Fitness | None = None,
        report_to: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        self.recipe, self.ranks = recipe, start()
        self.fitness = fitness if fitness is not None else fitness_of(recipe.search.fitness)
        self._fitness_words = recipe.search.fitness if fitness is None else repr(fitness)
        self.progress = progress if self.ranks.is_first else None
        self.reports = Reports(report_to if self.ranks.is_first else (), self.work)
        if recipe.out is not None:
            check_target(recipe.out)
        self.config = _dense_config(recipe)
        if recipe.search.dtype == "bfloat16" and self.dtype != torch.bfloat16:
            raise ValueError(
                f"search.dtype is bfloat16, and the model ships in {self.dtype}, of which "
                "bfloat16 keeps a part only: leave search.dtype out"
            )
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        make_plain(skeleton)
        check_streamable(skeleton)
        warn_of_experts(skeleton)
        self.problem = pose(skeleton, recipe)
        self.units, self.menus = self.problem.units, self.problem.menus
        chosen((x for menu in self.menus.values() for x in menu), recipe.refine_levels)
        self.space, self.budget = self.problem.space, self.problem.budget
        self.starts = self.problem.starts(recipe.search.start)
        self.tables = Tables(
            self.problem,
            recipe,
            self.work,
            fitness=(self._fitness_words, self.fitness),
            model=lambda: self.model,
            tokens=lambda: self.tokens["search"],
        )
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
    def search_dtype(self) -> torch.dtype:
        """What plans are compared in, of which the model's weights have to be exact."""
        if self.recipe.search.dtype != "auto":
            return getattr(torch, self.recipe.search.dtype)
        if self.dtype == torch.bfloat16 and has_bfloat16(self.model.device):
            return torch.bfloat16
        return self.model.dtype

    def computing_in(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Have the model in another dtype for a while, one that its weights are exact in."""
        dtypes = self._loaded_dtypes if dtype == self.dtype else None
        return computing_in(self.model, dtype, dtypes=dtypes)

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
        return cached_splits(
            self.work / "tokens",
            data.sources,
            self.tokenizer,
            counts,
            seq_len=data.seq_len,
            seed=data.seed,
            split=data.split,
            column=data.column,
        )

    @cached_property
    def written(self) -> Tensor:
        """Sequences (n, seq_len) that the dense model writes itself, begun as the calibration's."""
        tokens, n = self.tokens["calibration"], self.recipe.data.written
        if not n:
            return tokens[:0]
        seed, dtype = self.recipe.data.seed, self.search_dtype
        name = text_fingerprint(tensor_fingerprint(tokens), str((n, seed, dtype)))
        with self.computing_in(dtype):
            return write_sequences(
                self.model,
                tokens,
                n,
                self.work / f"written-{name}",
                bos=bos_of(self.tokenizer),
                seed=seed,
                progress=self.progress,
            )

    def take_over(self, other: Job) -> None:
        """Use what a job of the same model and data has loaded."""
        loaded = ("model", "tokens", "written", "tokenizer", "_loaded_dtypes")
        self.__dict__.update({k: v for k, v in other.__dict__.items() if k in loaded})

    def load_model(self) -> Any:
        """Return the dense model in the dtype to ship."""
        model = AutoModelForCausalLM.from_pretrained(
            self.recipe.model, revision=self.recipe.revision, dtype=self.dtype
        )
        make_plain(model)
        return model.eval().requires_grad_(False)

    @cached_property
    def model(self) -> Any:
        """The dense model to compute with: the values to ship, in float32 on a CPU."""
        model = self.load_model()
        self._loaded_dtypes = dtypes_of(model)
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
            ranks=self.ranks,
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
                ranks=self.ranks,
                progress=self.progress,
            )
            moments = lambda block: load_moments(self.work, block)  # noqa: E731
        return Source(self._fingerprint(), lambda block: load_stats(self.work, block), moments)

    def build(self) -> LevelStore:
        """Return the level store of the recipe's menu."""
        if self.units:
            source = self.calibrate()
            folder = self._store_folder(source)
        else:  # a budget of drops: what is kept stays dense, and nothing is stored
            source = Source({"model": model_fingerprint(self.model)}, lambda block: {})
            folder = self.work / "store-dense"
        store = LevelStore.build(
            folder,
            self.model,
            self.units,
            self.menus,
            source,
            ranks=self.ranks,
            progress=self.progress,
        )
        return self._refined(store) if self.recipe.refine_levels else store

    def _refined(self, store: LevelStore) -> LevelStore:
        """Return the store with the levels tuned that the recipe says."""
        if not self.ranks.is_first:  # blocks follow one another: the others wait, and read
            self.ranks.wait()
        tokens, heldout = self.refining_tokens()
        has_moments = bool(self.recipe.search.sensitivity_tokens)
        ending = f"-{tensor_fingerprint(self.written)}" if len(self.written) else ""
        made = refine_levels(
            self.model,
            store,
            self.recipe.refine_levels,
            tokens,
            heldout,
            self.work / f"refined-levels{ending}",
            settings=self.refine_settings("best"),
            loss=self.loss,
            moments=(lambda block: load_moments(self.work, block)) if has_moments else None,
            progress=self.progress,
        )
        if self.ranks.is_first:
            self.ranks.wait()
        return made

    def loss(self, store: LevelStore, levels: Mapping[str, Level]) -> float:
        """Return the mean loss of a plan on some of the search sequences, in this process alone."""
        pool = self.tokens["search"]
        evaluator = Evaluator(self.model, store, pool, self.fitness)
        (losses,) = evaluator.losses([levels], range(min(MAX_SEQUENCES, len(pool))))
        return math.fsum(losses) / len(losses)

    def refining_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the sequences that levels are refined on, and those that judge."""
        tokens, heldout = self.tokens["calibration"], self.tokens["heldout"]
        if not len(heldout):
            tokens, heldout = tokens[2:], tokens[:2]
        if not len(tokens):
            raise ValueError("refine needs 3 calibration sequences or more, or some held out")
        return torch.cat([tokens, self.written]), heldout

    def refine_settings(self, mode: str) -> Settings:
        """Return how levels are refined in a mode."""
        tuning = Tuning(seed=self.recipe.data.seed, bfloat16=has_bfloat16(self.model.device))
        return Settings(mode, tuning=tuning)

    def _store_folder(self, source: Source) -> Path:
        """Return the folder of a store that has this menu, or of a new one for it."""
        first, others = self.work / "store", sorted(self.work.glob("store-*"))
        if not LevelStore.lacks(first, self.units, self.menus, source):
            return first
        for folder in others:
            if LevelStore.lacks(folder, self.units, self.menus, source) is False:
                return folder
        menu = json.dumps({unit: list(map(str, levels)) for unit, levels in self.menus.items()})
        return self.work / f"store-{text_fingerprint(menu)}"

    def evaluator(self, store: LevelStore) -> Evaluator:
        """Return what scores plans on the search tokens."""
        pool = self.tokens["search"]
        return Evaluator(self.model, store, pool, self.fitness, ranks=self.ranks)

    def search(
        self, store: LevelStore, strategy: str | None = None, *, starts: Sequence[Genome] = ()
    ) -> Search:
        """Return the recipe's search, at the point where an earlier run of it was stopped.

        strategy: another than the recipe's, at its default settings. starts: plans to begin with.
        """
        settings = self.recipe.search
        pool = self.tokens["search"]
        search = Search(
            self.space,
            self.budget,
            strategy=strategy or settings.strategy,
            table=self.tables.of(strategy or settings.strategy, store),
            starts=starts,
            n_sequences=len(pool),
            seq_len=pool.shape[1],
            seed=settings.seed,
            **({} if strategy else settings.settings),
        )
        kept = read_state(self._search_file(search))
        return search.restore(kept) if kept is not None else search

    def keep(self, search: Search) -> None:
        """Write the search's state, so that it can go on from here, and its log."""
        if self.ranks.is_first:
            file = self._search_file(search)
            atomic_write(file, json.dumps(search.state()))
            SearchLog(file.with_suffix(ENDING)).update(search.history)

    def _search_file(self, search: Search) -> Path:
        # one file per problem: searches for several budgets share a work folder
        problem = {**search.state()["problem"], "fitness": self._fitness_words}
        problem["dtype"] = str(self.search_dtype)
        return self.work / "search" / f"{text_fingerprint(json.dumps(problem))}.json"

    def levels(self, genome: Genome) -> dict[str, Level]:
        """Return the levels of a plan."""
        return self.problem.levels(genome)

    def genome(self, levels: Mapping[str, Any]) -> Genome:
        """Return the genome of a plan's levels."""
        return self.problem.genome(levels)

    def plan(self, levels: Mapping[str, Any], **about: Any) -> Plan:
        """Return the plan of `levels` (unit -> level) with where it came from."""
        shapes = {unit.name: unit.shape for unit in self.units if unit.name in levels}
        genome = self.genome(levels)
        budget = {
            "asked": self.budget.text,
            "bits_per_weight": round(self.space.bits_per_weight(genome), 6),
            "checkpoint_bytes_at_most": self.space.size_bytes(genome),
        }
        return Plan(
            levels,
            shapes=shapes,
            base_model=self.recipe.model,
            # the commit that was loaded, where the Hub says it: a branch moves on
            revision=getattr(self.config, "_commit_hash", None) or self.recipe.revision,
            budget=budget,
            **about,
        )

    def _fingerprint(self) -> dict[str, Any]:
        from .. import __version__

        data = self.tokens
        return {
            "model": model_fingerprint(self.model),
            "data": {
                k: tensor_fingerprint(v) for k, v in data.items() if k in ("calibration", "heldout")
            },
            "sensitivity": [self.recipe.search.sensitivity_tokens, self.recipe.data.seed],
            "hf_evopress": __version__,
        }


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
