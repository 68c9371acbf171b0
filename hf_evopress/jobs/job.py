"""One compression job: what it has. A recipe, its checks, the model, its text, its folders.

    work/tokens/       the text as token windows                   (here)
    work/written-.../  text that the dense model wrote itself      (here)
    work/stats/        second moments of every block's inputs      (levels)
    work/moments/      second moments of the output gradients      (levels)
    work/store/        every level of every unit, packed           (levels)
    work/scores/       what dropping each sub-block costs, ...     (tables)
    work/search/       the state of each search after each round   (plan_search)
    work/refined-.../  levels of a plan made better                (refinement)
    work/width-.../    a narrower model, and all of the above      (widths)

What is done with a job is in the files named on the right. A step whose files are there is not
done again, so a job that was stopped goes on, and another budget for the same model, data and
levels costs only its search.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.devices import find_device, has_bfloat16, name_of
from ..base.fingerprint import model_fingerprint, tensor_fingerprint, text_fingerprint
from ..base.placement import Place, computing_in, decide, put
from ..base.progress import Progress
from ..base.ranks import start
from ..base.target import work_beside
from ..calibration.class_tokens import masked
from ..calibration.data import Writer
from ..calibration.own_text import prompts, write_self, write_sequences
from ..calibration.text import bos_of, is_own, prompts_file
from ..calibration.token_cache import cached_splits
from ..models.classes import set_pooling
from ..models.commits import commit_of
from ..models.experts import warn_of_experts
from ..models.images import give_images
from ..models.plain import make_plain
from ..models.pooling import pooling_said
from ..models.source import (
    check_context,
    check_head,
    is_decoder,
    kind_of,
    load_checked,
    read_config,
    read_tokenizer,
)
from ..models.stream import check_streamable
from ..models.text_inputs import check_reads_text
from ..models.units import unmatched
from ..plans.level import Level
from ..plans.plan import Plan
from ..recipes.recipe import Recipe
from ..refine.levels import chosen
from ..scoring.evaluator import Evaluator
from ..scoring.fitness.base import Fitness
from ..scoring.objective import fitness_of
from ..search.space import Genome
from ..store.level_store import LevelStore
from .class_rules import fitted
from .for_target import for_this_machine
from .problem import pose
from .reporting import Reports
from .widths_tried import channels_to_try, has_own_width
from .with_images import image_text
from .with_sound import sound_text

logger = logging.getLogger(__name__)

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Job:
    """A recipe being carried out.

    Making one checks all that can be checked without weights, in seconds: the model's
    architecture, the menu of levels against its shapes, the budget, the text's length.

    whole, dense: a job of the same recipe, and the folder of a model made from its own, which this
    one compresses in the place of the recipe's. What it comes close to stays the whole one's model.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        fitness: Fitness | None = None,
        report_to: Sequence[str] = (),
        progress: Progress | None = None,
        whole: Job | None = None,
        dense: Path | None = None,
    ) -> None:
        self.device = find_device(recipe.device)
        self._whole, self.dense = whole, dense  # not itself, which would keep it alive
        self.source = recipe.model if dense is None else str(dense)
        self.revision = recipe.revision if dense is None else None
        self.config = _dense_config(recipe, self.source, self.revision)
        # all else is of the commit that the config is of: a branch may move on meanwhile
        self.revision = commit_of(self.source, self.revision) or self.revision
        self.kind = kind_of(self.config, recipe.model)
        recipe = fitted(for_this_machine(recipe, self.device), self.kind)
        self.recipe, self.ranks = recipe, start()
        self.fitness = fitness if fitness is not None else fitness_of(recipe.search.fitness)
        self.fitness_words = recipe.search.fitness if fitness is None else repr(fitness)
        self.progress = progress if self.ranks.is_first else None
        self.report_to = report_to
        self.reports = Reports(report_to if self.ranks.is_first else (), self.work)
        if recipe.search.dtype == "bfloat16" and self.dtype != torch.bfloat16:
            raise ValueError(
                f"search.dtype is bfloat16, and the model ships in {self.dtype}, of which "
                "bfloat16 keeps a part only: leave search.dtype out"
            )
        if self.device.type != "cpu" and self.dtype == torch.bfloat16 != self.compute_dtype:
            name = name_of(self.device)
            logger.warning("%s does not multiply in bfloat16: computing in float32", name)
        with torch.device("meta"):
            skeleton = self.kind.loader.from_config(
                self.config, dtype=self.dtype, trust_remote_code=recipe.trust_remote_code
            )
        check_head(self.source, skeleton)
        for file in filter(None, map(prompts_file, recipe.data.sources)):
            prompts(file)  # so that it is missed now
        of_recipe = (recipe, self.kind, self.config, self.work)
        self.media = image_text(*of_recipe) or sound_text(*of_recipe)
        if self.media is None:
            check_reads_text(skeleton)
        elif self.media.seq_len != recipe.data.seq_len:
            self.recipe = recipe = replace(
                recipe, data=replace(recipe.data, seq_len=self.media.seq_len)
            )
        make_plain(skeleton)
        check_streamable(skeleton)
        warn_of_experts(skeleton)
        self.channels = channels_to_try(skeleton, recipe) if whole is None else ()
        is_searched = has_own_width(skeleton, self.channels)
        self.problem = pose(skeleton, recipe, is_searched=is_searched)
        self.units, self.menus = self.problem.units, self.problem.menus
        chosen((x for menu in self.menus.values() for x in menu), recipe.refine_levels)
        self.space, self.budget = self.problem.space, self.problem.budget
        self.starts = self.problem.starts(recipe.search.start)
        self._warn(skeleton)

    def _warn(self, skeleton: Any) -> None:
        """Say which patterns skip nothing, and what the budget has to say."""
        if unknown := unmatched(skeleton, self.recipe.skip):
            logger.warning(
                "skip %s matches nothing in %s, whose units are such as %s",
                ", ".join(unknown),
                self.recipe.model,
                next((unit.name for unit in self.units), "those of its blocks"),
            )
        if self.budget.note:
            logger.warning(self.budget.note)

    @property
    def whole(self) -> Job:
        """The job of the model that plans are to come close to: this one, unless one was given."""
        return self._whole or self

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
        if self.dtype == torch.bfloat16 and has_bfloat16(self.device):
            return torch.bfloat16
        return self.compute_dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """What all else is computed in: float32 on a CPU, what is shipped on a GPU."""
        if self.device.type == "cpu" or not has_bfloat16(self.device):
            return torch.float32
        return self.dtype

    @contextmanager
    def computing_in(self, dtype: torch.dtype) -> Iterator[None]:
        """Have the model compute in another dtype for a while, which its weights are exact in.

        So does the model that it is to come close to.
        """
        with ExitStack() as held:
            for job in dict.fromkeys((self, self.whole)):
                held.enter_context(computing_in(job.model, job._as_loaded(dtype)))
            yield

    def _as_loaded(self, dtype: torch.dtype) -> torch.dtype | None:
        """Return None for the dtype of the weights: a few, as rotary tables, are in float32."""
        return None if dtype == self.dtype else dtype

    @property
    def work(self) -> Path:
        """Where statistics, levels and search state are kept."""
        if self.dense is not None:
            return self.dense.parent
        if self.recipe.work is not None:
            return Path(self.recipe.work)
        return work_beside(self.recipe.out or Path(self.recipe.model).name)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        if self.whole is not self:
            return self.whole.tokenizer
        return read_tokenizer(
            self.recipe.model,
            revision=self.revision,
            trust_remote_code=self.recipe.trust_remote_code,
        )

    @cached_property
    def tokens(self) -> Mapping[str, Tensor]:
        """Disjoint calibration, search, held-out and test sequences, (n, seq_len) each."""
        if self.whole is not self:
            return self.whole.tokens
        data = self.recipe.data
        counts = {k: getattr(data, k) for k in ("calibration", "search", "heldout", "test")}
        writers = {kind: self._writer(kind) for kind in data.sources if is_own(kind)}
        if (made := self.media) is not None:
            writers[str(made.source)] = (made.fingerprint, made.write)
        found = cached_splits(
            self.work / "tokens",
            data.sources,
            self.tokenizer,
            counts,
            seq_len=data.seq_len,
            seed=data.seed,
            split=data.split,
            column=data.column,
            writers=writers,
            n_wrapped=self.kind.n_texts,
        )
        if made is not None:
            made.images.check(torch.cat(list(found.values())))
        return {
            name: masked(part, self.tokenizer, self.kind, seed=data.seed)
            for name, part in found.items()
        }

    def _writer(self, kind: str) -> tuple[str, Writer]:
        """Return a fingerprint of text that the dense model writes itself, and what writes it."""
        data, dtype = self.recipe.data, self.search_dtype
        file = prompts_file(kind)
        begun = kind if file is None else "\n".join(prompts(file))
        name = text_fingerprint(begun, model_fingerprint(self.model), str((data.seed, dtype)))

        def write(n: int) -> Tensor:
            with self.computing_in(dtype):
                return write_self(
                    self.model,
                    self.tokenizer,
                    n,
                    self.work / f"written-{name}-{n}x{data.seq_len}",
                    kind=kind,
                    seq_len=data.seq_len,
                    seed=data.seed,
                    progress=self.progress,
                )

        return name, write

    @cached_property
    def written(self) -> Tensor:
        """Sequences (n, seq_len) that the dense model writes itself, begun as the calibration's."""
        if self.whole is not self:
            return self.whole.written
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
        loaded = ("model", "tokens", "written", "tokenizer")
        self.__dict__.update({k: v for k, v in other.__dict__.items() if k in loaded})

    def load_model(self) -> Any:
        """Return the dense model in the dtype to ship."""
        model = load_checked(
            self.source,
            kind=self.kind,
            revision=self.revision,
            dtype=self.dtype,
            trust_remote_code=self.recipe.trust_remote_code,
        )
        self.fit(model)
        make_plain(model)
        return model.eval().requires_grad_(False)

    def fit(self, model: Any) -> None:
        """Say how the states of an embedding model become a vector; give images or sounds."""
        give_images(model, None if self.media is None else self.media.images)
        if self.kind.is_vector:
            set_pooling(model, pooling_said(self.recipe.model, is_decoder(self.config)))

    @cached_property
    def model(self) -> Any:
        """The dense model to compute with: the values to ship, put where `device` says."""
        model = self.load_model()
        place = Place(self.device, self._as_loaded(self.compute_dtype))
        return put(model, decide(model, place, self.recipe.offload, folder=self.work / "hidden"))

    # -- plans ---------------------------------------------------------------------------------

    def evaluator(self, store: LevelStore) -> Evaluator:
        """Return what scores plans on the search tokens."""
        return self._evaluator(store, ranks=self.ranks)

    def evaluator_alone(self, store: LevelStore) -> Evaluator:
        """Return what scores plans on the search tokens in this process, without others."""
        return self._evaluator(store)

    def _evaluator(self, store: LevelStore, **options: Any) -> Evaluator:
        pool, teacher = self.tokens["search"], self.whole.model
        return Evaluator(self.model, store, pool, self.fitness, teacher=teacher, **options)

    def levels(self, genome: Genome) -> dict[str, Level]:
        """Return the levels of a plan."""
        return self.problem.levels(genome)

    def genome(self, levels: Mapping[str, Any]) -> Genome:
        """Return the genome of a plan's levels."""
        return self.problem.genome(levels)

    def plan(self, levels: Mapping[str, Any], **about: Any) -> Plan:
        """Return the plan of `levels` (unit -> level) with where it came from."""
        cache = {unit: level for unit, level in levels.items() if unit in self.problem.caches}
        genome = self.genome(levels)
        levels = {unit: level for unit, level in levels.items() if unit not in cache}
        shapes = {unit.name: unit.shape for unit in self.units if unit.name in levels}
        budget: dict[str, Any] = {
            "asked": self.budget.text,
            "bits_per_weight": round(self.space.bits_per_weight(genome), 6),
            "checkpoint_bytes_at_most": self.space.size_bytes(genome),
        }
        if ends := self.problem.ends.size_bytes(self.levels(genome)):
            budget["ends_bytes"] = ends
        if (context := self.recipe.budget.context) is not None:
            held = self.problem.cache_bytes(genome, context)
            budget |= {"context": context, "cache_bytes": held}
            budget["memory_bytes_at_most"] = held + budget["checkpoint_bytes_at_most"]
        return Plan(
            levels,
            shapes=shapes,
            base_model=self.recipe.model,
            revision=self.whole.revision,
            budget=budget,
            cache=cache,
            **about,
        )


def _dense_config(recipe: Recipe, source: str, revision: str | None) -> Any:
    trust = recipe.trust_remote_code
    config = read_config(source, revision=revision, trust_remote_code=trust)
    quantized = getattr(config, "quantization_config", None)
    if quantized:
        kind = quantized.get("quant_method") if isinstance(quantized, Mapping) else quantized
        raise ValueError(
            f"{recipe.model} is already compressed ({kind}); start from the dense model, "
            "or dequantize() it and save that first"
        )
    check_context(config, recipe.data.seq_len, "data.seq_len (--seq-len)")
    return config
