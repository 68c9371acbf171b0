"""The finish of a plan: levels refined block by block, kept only where the whole is better."""

from __future__ import annotations

import logging
import time

from .fingerprint import text_fingerprint
from .job import Job
from .plan import Plan
from .refine import Settings, refine
from .sensitivity import load_moments
from .store import LevelStore

logger = logging.getLogger(__name__)


def finish(
    job: Job, store: LevelStore, plan: Plan, *, settings: Settings | None = None
) -> tuple[LevelStore, Plan]:
    """Return what holds the refined levels of `plan`, and the plan with losses before and after.

    Calibration sequences make the levels, held-out ones judge each block, search sequences
    (which never made a level) the whole: where the loss is not lower, `store` itself is returned.
    Without held-out sequences the first two of calibration judge and make no level. Files are in
    work/refined-<fingerprint of the plan>; a run that was stopped goes on from there.
    """
    settings = settings or job.refine_settings(job.recipe.refine)
    tokens, heldout = job.refining_tokens()
    name = text_fingerprint(repr(settings), *(f"{u} {x}" for u, x in plan.levels.items()))
    start = time.perf_counter()
    has_moments = bool(job.recipe.search.sensitivity_tokens and job.units)
    made = refine(
        job.model,
        store,
        plan.levels,
        tokens,
        heldout,
        job.work / f"refined-{name}",
        settings=settings,
        moments=(lambda block: load_moments(job.work, block)) if has_moments else None,
        progress=job.progress,
    )
    before, after = (job.loss(states, plan.levels) for states in (store, made))
    notes = {
        "mode": settings.mode,
        "fitness": job.recipe.search.fitness,
        "before": before,
        "after": after,
        "is_kept": after < before,
        "seconds": round(time.perf_counter() - start, 1),
    }
    logger.info("refined: %s", notes)
    if not after < before:
        logger.warning(
            "refinement did not lower the loss on held-out tokens (%.4f before, %.4f after) and "
            "is not kept; more calibration sequences may help",
            before,
            after,
        )
    chosen = made if after < before else store
    return chosen, plan.replace(results={**plan.results, "refined": notes})
