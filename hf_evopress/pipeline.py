"""The straight line: a model and a size in, a compressed model, its plan and figures out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from .cards import write_card
from .config import EvoPressConfig
from .data import tokenize_file
from .evaluate import Report, compare, compare_many
from .evaluator import Evaluator
from .export.base import check_target, whole_folder
from .finish import finish
from .fitness.base import Fitness
from .job import Job, versions
from .level import Level
from .plan import Plan
from .plugins import load
from .quantizer import register_with_transformers
from .recipe import Recipe
from .refined import RefinedStates
from .search import Search
from .size import model_size, stored_bytes
from .space import Genome
from .store import LevelStore, Progress

logger = logging.getLogger(__name__)

UNREFINED = "before refinement"
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    name: str
    bits_per_weight: float
    size_bytes: int
    report: Report


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
    seconds = _Clock()
    job = Job(recipe, fitness=fitness, report_to=report_to, progress=progress)
    if recipe.out is None:
        raise ValueError("say where to write the model: out in the recipe, or --out FOLDER")
    unseen, window = unseen_tokens(job, test, window)
    store = seconds("levels", job.build)
    plan = seconds("search", lambda: find_plan(job, store))
    if not job.ranks.is_first:
        return Result(Path(recipe.out), plan, seconds=seconds.spent)
    states = store
    if recipe.refine != "none":
        states, plan = seconds("refine", partial(finish, job, store, plan))
    folder = seconds("export", partial(export, job, states, plan))
    measured = partial(measure, job, states, plan, folder, unseen, window, max_windows)
    rows, sample = seconds("evaluate", measured)
    text = Path(test).name if test is not None else _unseen_name(recipe)
    plan = plan.replace(results={**plan.results, **figures(rows), "text": text})
    plan.save(folder)
    recipe.save(folder / "evopress_recipe.yaml")
    write_card(folder, plan, recipe)
    return Result(folder, plan, rows, sample, seconds.spent)


def find_plan(job: Job, store: LevelStore) -> Plan:
    """Return the plan that the recipe's search settles on.

    The search's state is kept after each round: a run that was stopped gives the same plan.
    """
    search = run_search(job, store, starts=[*rivals(job, store).values()])
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


def measure(
    job: Job,
    store: LevelStore,
    plan: Plan,
    folder: Path,
    tokens: Tensor,
    window: int,
    max_windows: int | None,
) -> tuple[tuple[Row, ...], str]:
    """Return the rows dense, uniform, compared, searched on `tokens` (n,), and a sentence.

    store: what was exported; where it holds refined levels, a row is measured without them too.
    The searched row is the reloaded checkpoint. Raises RuntimeError if its logits are not, bit
    for bit, those that the search scored.
    """
    register_with_transformers()
    with job.computing_in(job.search_dtype):
        reloaded = _reload(job, folder)
        check_reloaded(job.evaluator(store), plan, reloaded)
    evaluator = job.evaluator(store)
    if reloaded.dtype != job.model.dtype:
        reloaded = _reload(job, folder)
        check_reloaded(evaluator, plan, reloaded)
    models: dict[str, Any] = {"dense": job.model}
    sizes = {"dense": (16.0, job.space.dense_bits // 8)}
    uniform = best_uniform(job, store)
    for name, genome in [*([uniform] if uniform else []), *rivals(job, store).items()]:
        models[name] = partial(_logits, evaluator, job.levels(genome))
        sizes[name] = (job.space.bits_per_weight(genome), job.space.size_bytes(genome))
    models["searched"] = reloaded
    genome = job.genome(plan)
    sizes["searched"] = (job.space.bits_per_weight(genome), stored_bytes(folder))
    if isinstance(store, RefinedStates):
        models[UNREFINED] = partial(_logits, job.evaluator(store.store), plan.levels)
        sizes[UNREFINED] = sizes["searched"]
    reports = compare_many(
        models, job.model, tokens, window=window, max_windows=max_windows, progress=job.progress
    )
    rows = tuple(Row(name, *sizes[name], reports[name]) for name in models)
    return rows, generate(job.tokenizer, reloaded)


def _reload(job: Job, folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=job.model.dtype)
    return model.eval().to(job.model.device)


@torch.no_grad()
def check_reloaded(evaluator: Evaluator, plan: Plan, reloaded: Any) -> None:
    """Raise RuntimeError unless the reloaded model gives the logits that were scored."""
    ids = evaluator.tokens[:1].to(evaluator.device)
    scored = evaluator.logits(plan.levels, ids)
    loaded = reloaded(input_ids=ids, use_cache=False).logits
    if not torch.equal(scored, loaded):
        raise RuntimeError(
            "the reloaded checkpoint does not give the logits that the search scored "
            f"(largest difference {float((scored - loaded).abs().max()):.3g}); "
            "please report this with the recipe"
        )


def best_uniform(job: Job, store: LevelStore) -> tuple[str, tuple[int, ...]] | None:
    """Return name and genome of the uniform plan within the budget that is expected to lose least.

    Without sensitivities it is the dearest; None if none fits.
    """
    fitting = {
        level: genome
        for level, genome in job.space.uniform().items()
        if job.budget.allows(job.space, genome)
    }
    if not fitting:
        return None
    expected = {level: _expected(store, job.levels(g)) for level, g in fitting.items()}
    known = {level: loss for level, loss in expected.items() if loss is not None}
    if len(known) == len(fitting):
        best = min(known, key=known.__getitem__)
    else:
        best = max(fitting, key=lambda level: (job.space.cost(fitting[level]), level))
    return f"uniform {best}", fitting[best]


def _expected(store: LevelStore, levels: Mapping[str, Level]) -> float | None:
    """Return the sum of what the levels of a plan are expected to lose, None if it is not known."""
    total = 0.0
    for unit, level in levels.items():
        if unit not in store.units or level.is_dense:
            continue
        if (loss := store.scores(unit, level).get("sensitivity_nats")) is None:
            return None
        total += loss
    return total


def generate(tokenizer: Any, model: Any, prompt: str = PROMPT, *, n_tokens: int = 32) -> str:
    """Return `prompt` with the model's greedy continuation."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=n_tokens, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)


def _logits(evaluator: Evaluator, levels: Mapping[str, Level], ids: Tensor) -> Tensor:
    return evaluator.logits(levels, ids.to(evaluator.device))


def unseen_tokens(job: Job, test: str | None, window: int) -> tuple[Tensor, int]:
    """Return what to measure on, tokens (n,) of a text or unseen ones of the data, and a window."""
    if test is not None:
        tokens = tokenize_file(test, job.tokenizer)
        if len(tokens) < window:
            raise ValueError(f"{test} has {len(tokens)} tokens, one window needs {window}")
        return tokens, window
    return job.tokens["test"].flatten(), job.recipe.data.seq_len


def _unseen_name(recipe: Recipe) -> str:
    """Return a name for what figures are measured on where no text is given."""
    return f"unseen parts of {', '.join(Path(s).name for s in recipe.data.sources) or 'the data'}"


def figures(rows: tuple[Row, ...]) -> dict[str, Any]:
    """Return the rows as a plan's results hold them."""
    return {
        "evaluation": {
            row.name: {
                "bits_per_weight": round(row.bits_per_weight, 4),
                "size_bytes": row.size_bytes,
                # a collapsed model's is infinite, which JSON does not know
                "perplexity": perplexity if math.isfinite(perplexity) else None,
                "kl_nats": row.report.kl_nats,
                "top1_agreement": row.report.top1_agreement,
                "window": row.report.window,
                "n_tokens": row.report.n_tokens,
            }
            for row in rows
            for perplexity in [row.report.perplexity]
        }
    }


class _Clock:
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
