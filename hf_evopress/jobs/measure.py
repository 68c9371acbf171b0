"""Check the reloaded checkpoint against what was scored, and evaluate it on unseen text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.memory import whole_within_memory
from ..base.placement import dtype_of
from ..calibration.class_tokens import file_tokens
from ..loading.checks import never_saved
from ..loading.kv_cache.cache import GearCache
from ..loading.layers import prepare_layers
from ..loading.quantizer import register_with_transformers
from ..loading.runtimes import PACKED
from ..models.classes import call, source_of, text_length
from ..models.plain import make_plain
from ..models.size import stored_bytes
from ..models.source import window_of
from ..plans.level import Level
from ..plans.plan import Plan
from ..scoring.cached import through_cache
from ..scoring.compare_outputs import compare_outputs
from ..scoring.evaluate import Report, compare_many
from ..scoring.evaluator import Evaluator
from ..search.knapsack import total_loss
from ..search.space import Genome
from ..store.level_store import LevelStore
from .job import Job
from .plan_search import tables

UNREFINED = "before refinement"
FULL_CACHE = "searched, 16-bit cache"
NOISE = 4.0  # of one order of summation against another, where there are many
SMALLER = (
    "take a shorter window (--window), or let blocks come one at a time (--offload cpu); levels "
    "and search are kept, and the same command goes on from there"
)
PROMPT = "The capital of France is"


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    name: str
    bits_per_weight: float
    size_bytes: int
    report: Report


def verify(job: Job, states: LevelStore, plan: Plan, folder: Path) -> None:
    """Raise RuntimeError unless `folder`, reloaded, gives bit for bit the logits that were scored.

    In the dtype that plans were compared in, and in that of the figures.
    """
    register_with_transformers()
    for dtype in dict.fromkeys((job.search_dtype, job.compute_dtype)):
        with job.computing_in(dtype):
            reloaded = _reload(job, folder)
            make_plain(reloaded)  # what was scored: experts one by one, Conv1D as nn.Linear
            check = partial(check_reloaded, job.evaluator(states), plan, reloaded)
            whole_within_memory("checking the checkpoint", check, job.device)


def measure(
    job: Job,
    store: LevelStore,
    plan: Plan,
    folder: Path,
    tokens: Tensor,
    window: int,
    max_windows: int | None,
    *,
    rivals: Mapping[str, Genome] | None = None,
    is_refined: bool = False,
) -> tuple[tuple[Row, ...], str]:
    """Return the rows dense, uniform, rivals, searched on `tokens` (n,), and a sentence.

    rivals: None where there was no search, whose plan one for all could be compared with.
    The searched row is the checkpoint in `folder`, reloaded, and read through its cache where the
    plan sets one; where that is refined there is a row
    of the same plan as it was before, in the levels of `store`. Uniform and rivals are not
    written: their bytes are those of `folder` and the difference of the tensors.
    """
    register_with_transformers()
    reloaded, evaluator = _reload(job, folder), job.evaluator(store)
    dense = partial(_logits, job.whole.evaluator(store), {})
    models: dict[str, Any] = {"dense": dense}
    sizes = {"dense": (16.0, job.whole.space.dense_bits // 8)}
    searched, written = job.genome(plan), stored_bytes(folder)
    # The space takes headers to be as long as they can be, which the written file's are not.
    unused = job.space.size_bytes(searched) - written
    uniform = None if rivals is None else best_uniform(job, store)
    for name, genome in [*([uniform] if uniform else []), *(rivals or {}).items()]:
        models[name] = partial(_logits, evaluator, job.levels(genome))
        sizes[name] = (job.space.bits_per_weight(genome), job.space.size_bytes(genome) - unused)
    models["searched"] = reloaded
    if plan.cache:
        models["searched"] = through_cache(reloaded, partial(GearCache.of, reloaded))
        models[FULL_CACHE] = reloaded
    sizes["searched"] = (job.space.bits_per_weight(searched), written)
    sizes[FULL_CACHE] = sizes["searched"]
    if is_refined:
        models[UNREFINED] = partial(_logits, evaluator, plan.levels)
        sizes[UNREFINED] = sizes["searched"]
    compared = partial(_compared, job, models, dense, tokens, window, max_windows)
    reports = whole_within_memory("the figures", compared, job.device, way_out=SMALLER)
    rows = tuple(Row(name, *sizes[name], reports[name]) for name in models)
    return rows, _sample(job, reloaded) if job.kind.generates else ""


def _compared(
    job: Job,
    models: Mapping[str, Any],
    dense: Any,
    tokens: Tensor,
    window: int,
    max_windows: int | None,
) -> Mapping[str, Report]:
    """Return the report of each model, of the kind that its class has."""
    images = None if job.media is None else job.media.images
    if job.kind.continues_text and images is None:
        return compare_many(
            models, dense, tokens, window=window, max_windows=max_windows, progress=job.progress
        )
    windows = tokens[: len(tokens) // window * window].view(-1, window)[:max_windows]
    return compare_outputs(
        models,
        dense,
        windows,
        is_vector=job.kind.is_vector,
        rows=None if images is None else images.counted,
        window=text_length(job.model, windows),
        progress=job.progress,
    )


def _reload(job: Job, folder: Path) -> Any:
    trust = {"trust_remote_code": True} if job.recipe.trust_remote_code else {}
    model = job.kind.loader.from_pretrained(folder, dtype=dtype_of(job.model), **trust)
    state = model.state_dict()
    for name in never_saved(model) & state.keys():  # made anew, in another dtype than is shipped
        state[name].copy_(state[name].to(job.dtype))
    own = dict(job.model.named_buffers())
    for name, buffer in model.named_buffers():  # such as sines of positions: rounded, as the own
        if name in own and own[name].is_floating_point():
            buffer.copy_(buffer.to(own[name].dtype))
    prepare_layers(model, PACKED)  # the reference that plans were scored with
    job.fit(model)
    return model.eval().to(job.device)


def _sample(job: Job, model: Any) -> str:
    """Return what a model writes: to a prompt, or of the first sound that is unseen."""
    if not job.kind.hears:
        return generate(job.tokenizer, model)
    ids = job.tokens["test"][:1].to(model.device)
    if not len(ids):
        return ""
    n = min(32, model.config.max_target_positions // 2)
    out = model.generate(**source_of(model, ids), max_new_tokens=n, do_sample=False)
    return str(job.tokenizer.decode(out[0], skip_special_tokens=True))


@torch.no_grad()
def check_reloaded(evaluator: Evaluator, plan: Plan, reloaded: Any) -> None:
    """Raise RuntimeError unless the reloaded model gives the logits that were scored.

    To the bit on a CPU. Accelerators choose the order of a sum by shape and alignment, so there a
    difference may be what that order alone makes: as large as between a sequence that runs by
    itself and the same sequence in a batch of two, times NOISE.
    """
    ids = evaluator.tokens[:1].to(evaluator.device)
    scored = evaluator.logits(plan.levels, ids)
    loaded = call(reloaded, ids)
    difference, allowed = _largest(scored, loaded), 0.0
    if difference > 0 and torch.device(evaluator.device).type != "cpu":
        in_two = evaluator.logits(plan.levels, ids.repeat(2, 1))[:1]
        allowed = NOISE * _largest(scored, in_two)
    if not difference <= allowed:  # nor where it is NaN
        beyond = f", {allowed:.3g} would be rounding" if allowed else ""
        raise RuntimeError(
            "the reloaded checkpoint does not give the logits that the search scored "
            f"(largest difference {difference:.3g}{beyond}); "
            "please report this with the recipe"
        )


def _largest(a: Tensor, b: Tensor) -> float:
    """Return the largest difference; 0 where both are NaN or the same infinity."""
    if torch.equal(a, b):
        return 0.0
    return float((a.float() - b.float()).abs().max())


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
    if job.problem.caches:  # which have losses, too
        table = tables(job).of("knapsack", store) or ()
        expected = {level: total_loss(job.space, table, g) for level, g in fitting.items()}
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
            if store.units[unit].is_end:  # at the same level in all plans
                continue
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


def unseen_tokens(job: Job, test: str | None, window: int | None) -> tuple[Tensor, int]:
    """Return what to measure on, tokens (n,) of a text or unseen ones of the data, and a window."""
    if job.kind.hears:
        if test is not None:
            raise ValueError(
                f"{job.recipe.model} is measured on sounds of its data that nothing else has seen: "
                f"leave out {test} (--test)"
            )
        return job.tokens["test"].flatten(), job.tokens["test"].shape[1]
    if test is not None:
        window = window_of(job.config, window)
        seed = job.recipe.data.seed
        return file_tokens(test, job.tokenizer, job.kind, window=window, seed=seed), window
    return job.tokens["test"].flatten(), job.recipe.data.seq_len


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
                **(
                    {"cosine_distance": row.report.cosine_distance}
                    if row.report.cosine_windows
                    else {}
                ),
                "window": row.report.window,
                "n_tokens": row.report.n_tokens,
            }
            for row in rows
            for perplexity in [row.report.perplexity]
        }
    }
