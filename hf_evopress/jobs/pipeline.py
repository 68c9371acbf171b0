"""The whole line: a model and a size in, a compressed model, its plan and figures out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..base.devices import using
from ..base.own_code import trusting
from ..base.plugins import load
from ..base.progress import Progress
from ..base.ranks import start
from ..base.target import claimed, work_beside
from ..calibration.text import file_of
from ..plans.plan import Plan
from ..recipes.recipe import Recipe
from ..scoring.fitness.base import Fitness
from ..search.space import Genome
from ..sharing.cards import write_card
from ..store.level_store import LevelStore
from .convert import convert
from .for_gguf import folder_of, is_for_gguf
from .job import Job
from .levels import build_levels
from .measure import Row, figures, measure, unseen_tokens, verify
from .plan_search import find_plan, rivals
from .refinement import distil, refine_blocks
from .widths import best_width

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result:
    """What a compression leaves: the folder, its plan, figures on unseen text, a sentence.

    gguf: the folder of the GGUF file, where the recipe is for one.
    """

    folder: Path
    plan: Plan
    rows: tuple[Row, ...] = ()
    sample: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    gguf: Path | None = None


def compress(
    recipe: Recipe,
    *,
    test: str | None = None,
    window: int | None = None,
    max_windows: int | None = 10,
    fitness: Fitness | None = None,
    report_to: Sequence[str] = (),
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Return the model of `recipe`, compressed, written to its folder, reloaded and measured.

    test: a text file for the figures, in windows of `window` tokens (2048, or
    the model's context); by default sequences of the
    recipe's own data that neither calibration nor search has seen. fitness: what to minimise,
    where the recipe's words cannot say it. report_to: as of transformers' Trainer, such as
    tensorboard. overwrite: replace all that is in the folder, also what is not ours.
    trust_remote_code: run the code that the model brings, as the recipe may say as well. Of several
    processes all search, the first writes.
    """
    if trust_remote_code:
        recipe = replace(recipe, trust_remote_code=True)
    if recipe.out is None:
        raise ValueError("say where to write the model: out in the recipe, or --out FOLDER")
    work = recipe.work or work_beside(recipe.out)
    reads = [recipe.model, work, test, *map(file_of, recipe.data.sources), *recipe.search.start]
    is_first = start().is_first
    outs: list[str | Path] = [recipe.out]
    if is_for_gguf(recipe):
        outs.append(folder_of(recipe.out))
    with ExitStack() as held:
        for out in outs if is_first else []:
            held.enter_context(claimed(out, reads=reads, overwrite=overwrite))
        job = Job(recipe, fitness=fitness, report_to=report_to, progress=progress)
        with using(job.device, offload=recipe.offload), trusting(recipe.trust_remote_code):
            return _compressed(job, test, window, max_windows)


def _compressed(job: Job, test: str | None, window: int | None, max_windows: int | None) -> Result:
    seconds, recipe = Clock(), job.recipe
    unseen, length = unseen_tokens(job, test, window)
    if recipe.widths:
        job, store, plan = seconds("widths", partial(best_width, job))
    else:
        store = seconds("levels", partial(build_levels, job))
        plan = seconds("search", lambda: find_plan(job, store))
    if not job.ranks.is_first:
        return Result(Path(str(recipe.out)), plan, seconds=seconds.spent)
    on = (unseen, length, max_windows)
    text = text_name(recipe, test)
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
    rivals: of a search, to be measured as well, beside the best uniform plan.
    """
    seconds, states = seconds or Clock(), store
    if job.recipe.blockwise != "none":
        states, plan = seconds("refine", partial(refine_blocks, job, store, plan))
    folder = seconds("export", partial(export, job, states, plan))
    seconds("verify", partial(verify, job, states, plan, folder))
    is_refined = states is not store
    if job.recipe.is_distilled:
        try:
            is_closer, plan = seconds("distil", partial(distil, job, plan, folder))
        except KeyboardInterrupt:
            logger.warning(
                "%s holds the whole model as it was before end-to-end training, without figures "
                "and card; the same command goes on from the last checkpoint",
                folder,
            )
            raise
        is_refined |= is_closer
    measured = partial(measure, job, store, plan, folder, *on)
    rows, sample = seconds("evaluate", partial(measured, rivals=rivals, is_refined=is_refined))
    named = {} if text is None else {"text": text}
    plan = plan.replace(results={**plan.results, **figures(rows), **named})
    plan.save(folder)
    recipe = replace(job.recipe, revision=plan.revision)  # the commit, where a branch was said
    recipe.save(folder / "evopress_recipe.yaml")
    write_card(folder, plan, recipe)
    gguf = None
    if is_for_gguf(job.recipe):
        # from the finished folder: what was trained comes along
        out = folder_of(folder)
        gguf = seconds("gguf", partial(convert, str(folder), out, format=job.recipe.export))
    return Result(folder, plan, rows, sample, seconds.spent, gguf)


def export(job: Job, store: LevelStore, plan: Plan, *, format: str = "evopress") -> Path:
    """Return the folder that `plan` was written to in `format`."""
    exporter = load("export", format)()
    return exporter.save(
        job.load_model(),
        plan,
        store.state,
        job.recipe.out,
        tokenizer=job.tokenizer,
        source=job.recipe.model,
        revision=job.whole.revision,
        with_code=job.recipe.trust_remote_code,
    )


def text_name(recipe: Recipe, test: str | None) -> str:
    """Return what the text that figures are measured on is called."""
    if test is not None:
        return Path(test).name
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
