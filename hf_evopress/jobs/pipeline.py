"""The straight line: a model and a size in, a compressed model, its plan and figures out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..base.fingerprint import versions
from ..base.plugins import load
from ..base.progress import Progress
from ..calibration.data import tokenize_file
from ..export.base import check_target, whole_folder
from ..loading.config import EvoPressConfig
from ..loading.quantizer import register_with_transformers
from ..models.size import model_size, stored_bytes
from ..plans.plan import Plan
from ..recipes.recipe import Recipe
from ..scoring.evaluate import compare
from ..scoring.fitness.base import Fitness
from ..search.ask_tell import Search
from ..search.space import Genome
from ..sharing.cards import write_card
from ..store.level_store import LevelStore
from .finish import distil, finish
from .job import Job
from .measure import Row, figures, measure, unseen_tokens, verify

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a compression leaves: the folder, its plan, figures on unseen text, a sentence."""

    folder: Path
    plan: Plan
    rows: tuple[Row, ...] = ()
    sample: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def compress(
    recipe: Recipe,
    *,
    test: str | None = None,
    window: int = 2048,
    max_windows: int | None = 10,
    fitness: Fitness | None = None,
    report_to: Sequence[str] = (),
    progress: Progress | None = None,
) -> Result:
    """Return the model of `recipe`, compressed, written to its folder, reloaded and measured.

    test: a text file for the figures, in windows of `window` tokens; by default sequences of the
    recipe's own data that neither calibration nor search has seen. fitness: what to minimise,
    where the recipe's words cannot say it. report_to: as of transformers' Trainer, such as
    tensorboard. Of several processes all search, the first writes.
    """
    seconds = Clock()
    job = Job(recipe, fitness=fitness, report_to=report_to, progress=progress)
    if recipe.out is None:
        raise ValueError("say where to write the model: out in the recipe, or --out FOLDER")
    unseen, window = unseen_tokens(job, test, window)
    store = seconds("levels", job.build)
    plan = seconds("search", lambda: find_plan(job, store))
    if not job.ranks.is_first:
        return Result(Path(recipe.out), plan, seconds=seconds.spent)
    on = (unseen, window, max_windows)
    text = Path(test).name if test is not None else _unseen_name(recipe)
    return ship(job, store, plan, on, text, rivals=rivals(job, store), seconds=seconds)


def ship(
    job: Job,
    store: LevelStore,
    plan: Plan,
    on: tuple[Tensor, int, int | None],
    text: str | None = None,
    *,
    rivals: Mapping[str, Genome] | None = None,
    seconds: Clock | None = None,
) -> Result:
    """Return the model of `plan`, finished as the recipe says, written, reloaded and measured.

    on: tokens (n,) for the figures, a window, and how many at most; text: what they are called.
    """
    seconds, states = seconds or Clock(), store
    if job.recipe.blockwise != "none":
        states, plan = seconds("refine", partial(finish, job, store, plan))
    folder = seconds("export", partial(export, job, states, plan))
    seconds("verify", partial(verify, job, states, plan, folder))
    is_refined = states is not store
    if job.recipe.is_distilled:
        is_closer, plan = seconds("distil", partial(distil, job, plan, folder))
        is_refined |= is_closer
    measured = partial(measure, job, store, plan, folder, *on)
    rows, sample = seconds("evaluate", partial(measured, rivals=rivals, is_refined=is_refined))
    named = {} if text is None else {"text": text}
    plan = plan.replace(results={**plan.results, **figures(rows), **named})
    plan.save(folder)
    job.recipe.save(folder / "evopress_recipe.yaml")
    write_card(folder, plan, job.recipe)
    return Result(folder, plan, rows, sample, seconds.spent)


def find_plan(job: Job, store: LevelStore) -> Plan:
    """Return the plan that the recipe's search settles on.

    The search's state is kept after each round: a run that was stopped gives the same plan.
    """
    search = run_search(job, store, starts=[*job.starts, *rivals(job, store).values()])
    return job.plan(
        job.levels(search.best),
        search={
            **search.report,
            "fitness": job.recipe.search.fitness,
            "history": search.history,
            "versions": versions(),
        },
    )


def run_search(
    job: Job, store: LevelStore, strategy: str | None = None, *, starts: Sequence[Genome] = ()
) -> Search:
    """Return the finished search of the recipe, or that of another strategy."""
    with job.computing_in(job.search_dtype):
        return _searched(job, store, strategy, starts)


def _searched(
    job: Job, store: LevelStore, strategy: str | None, starts: Sequence[Genome]
) -> Search:
    search = job.search(store, strategy, starts=starts)
    evaluator = job.evaluator(store)
    while (asked := search.ask()) is not None:
        plans = [job.levels(genome) for genome in asked.genomes]
        _tell(job, search, asked.stage)
        search.tell(evaluator.losses(plans, asked.sequences))
        job.keep(search)
        if strategy is None:
            job.reports.update(search.history)
    if strategy is None:
        job.reports.close()
    return search


def rivals(job: Job, store: LevelStore) -> dict[str, Genome]:
    """Return the plans of the strategies that the recipe compares with, which the search's own
    starts from: strategy -> genome. A finished search is not run again."""
    others = dict.fromkeys(job.recipe.search.compare)
    return {name: run_search(job, store, name).best for name in others}


def _tell(job: Job, search: Search, stage: str) -> None:
    """Report how far the search is, in generations; it may end before the last."""
    if job.progress:
        last = getattr(search.settings, "generations", 0) + 1
        job.progress(f"search: {stage}", min(len(search.history), last), last)


def export(job: Job, store: LevelStore, plan: Plan, *, format: str = "evopress") -> Path:
    """Return the folder that `plan` was written to in `format`."""
    exporter = load("export", format)()
    return exporter.save(
        job.load_model(), plan, store.state, job.recipe.out, tokenizer=job.tokenizer
    )


def _unseen_name(recipe: Recipe) -> str:
    """Return a name for what figures are measured on where no text is given."""
    return f"unseen parts of {', '.join(Path(s).name for s in recipe.data.sources) or 'the data'}"


class Clock:
    """Seconds spent in named steps."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = step()
        self.spent[name] = round(time.perf_counter() - start, 1)
        return result


def apply_plan(
    plan: str,
    out: str | Path,
    *,
    model: str | None = None,
    data: Sequence[str] | None = None,
    n_sequences: int = 56,
    seq_len: int = 1024,
    seed: int = 0,
    revision: str | None = None,
) -> Path:
    """Return the folder `out` with `model` compressed by `plan`, without a search.

    model: the dense model, by default the plan's own. Levels that need no data are made while
    the model loads; others are calibrated on `data`.
    """
    check_target(out)
    register_with_transformers()
    config = EvoPressConfig(
        plan, data=list(data or ()) or None, n_sequences=n_sequences, seq_len=seq_len, seed=seed
    )
    source = model or (config.plan.base_model if config.plan else None)
    if source is None:
        raise ValueError(f"the plan {plan} does not name its model; give one with --model")
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    compressed = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, quantization_config=config
    )
    with whole_folder(Path(out)) as folder:
        compressed.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if config.plan is not None:
            config.plan.save(folder)
    return Path(out)


def evaluate_model(
    model: str,
    data: str,
    *,
    against: str | None = None,
    window: int = 2048,
    max_windows: int | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return what `model` scores on the text file `data`, what it stores, and how far from
    the dense model `against` it is."""
    register_with_transformers()
    tokens = tokenize_file(data, AutoTokenizer.from_pretrained(model))
    if len(tokens) < window:
        raise ValueError(f"{data} has {len(tokens)} tokens, one window needs {window}")
    made = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    dense = AutoModelForCausalLM.from_pretrained(against, dtype=dtype) if against else None
    report = compare(made, dense, tokens, window=window, max_windows=max_windows, progress=progress)
    size = model_size(made)
    stored = {"size_bytes": stored_bytes(model)} if Path(model).is_dir() else {}
    return {
        **report.to_dict(),
        "bits_per_weight": size.bits_per_weight,
        "bits_per_weight_with_embeddings": size.bits_per_weight_with_embeddings,
        **stored,
    }
