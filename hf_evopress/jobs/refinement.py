"""Refinement of a job, in the order in which it happens; none of it adds a byte to the plan.

1. `refined_levels`, before the search: chosen levels tuned, so that it compares what will ship.
2. `refine_blocks`, after the search: the levels of the plan made better block by block.
3. `distil`, after the export: scales, factors and norms learn end to end from the dense model.

Each is kept only where text that it did not learn from says that the model is closer.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..base.devices import has_bfloat16
from ..base.fingerprint import claim, tensor_fingerprint, text_fingerprint
from ..base.memory import within_memory
from ..calibration.output_moments import load_moments
from ..calibration.two_streams import BATCH_TOKENS
from ..plans.level import Level
from ..plans.plan import Plan
from ..recipes.after_search import CODES_EVERY
from ..recipes.recipe import END_TO_END
from ..refine.block_tuning import Tuning as BlockTuning
from ..refine.blockwise import Settings, refine
from ..refine.distillation import Targets, precompute_targets
from ..refine.levels import refine_levels
from ..store.level_store import LevelStore
from ..training.pv_tuning import has_p_step
from ..training.settings import CODES, Tuning
from .job import Job

if TYPE_CHECKING:
    from ..training.tune import Tuned

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 16  # of the search's, to see whether refinement helped
KINDS = "scales,factors,norms"  # what learns end to end: no byte more


def refined_levels(job: Job, store: LevelStore) -> LevelStore:
    """Return the store with the levels tuned that the recipe says."""
    if not job.ranks.is_first:  # blocks follow one another: the others wait, and read
        job.ranks.wait()
    tokens, heldout = refining_tokens(job)
    has_moments = bool(job.recipe.search.sensitivity_tokens)
    ending = f"-{tensor_fingerprint(job.written)}" if len(job.written) else ""
    made = refine_levels(
        job.model,
        store,
        job.recipe.refine_levels,
        tokens,
        heldout,
        job.work / f"refined-levels{ending}",
        settings=refine_settings(job, "best"),
        loss=partial(loss, job),
        moments=(lambda block: load_moments(job.work, block)) if has_moments else None,
        progress=job.progress,
    )
    if job.ranks.is_first:
        job.ranks.wait()
    return made


def refine_blocks(
    job: Job, store: LevelStore, plan: Plan, *, settings: Settings | None = None
) -> tuple[LevelStore, Plan]:
    """Return what holds the refined levels of `plan`, and the plan with losses before and after.

    Calibration sequences make the levels, held-out ones judge each block, search sequences
    (which never made a level) the whole: where the loss is not lower, `store` itself is returned.
    Without held-out sequences the first two of calibration judge and make no level. Files are in
    work/refined-<fingerprint of the plan>; a run that was stopped goes on from there.
    """
    settings = settings or refine_settings(job, job.recipe.blockwise)
    tokens, heldout = refining_tokens(job)
    made_from = [repr(settings), *(f"{u} {x}" for u, x in plan.levels.items())]
    if len(job.written):
        made_from.append(tensor_fingerprint(job.written))
    name = text_fingerprint(*made_from)
    has_moments = bool(job.recipe.search.sensitivity_tokens and job.units)
    made = within_memory(
        "refinement",
        lambda batch: refine(
            job.model,
            store,
            plan.levels,
            tokens,
            heldout,
            job.work / f"refined-{name}",
            settings=settings,
            moments=(lambda block: load_moments(job.work, block)) if has_moments else None,
            batch_tokens=batch,
            progress=job.progress,
        ),
        job.device,
        batch_tokens=BATCH_TOKENS,
        least=tokens.shape[1],
    )
    before, after = (loss(job, states, plan.levels) for states in (store, made))
    notes = {
        "mode": settings.mode,
        "fitness": job.recipe.search.fitness,
        "before": before,
        "after": after,
        "is_kept": after < before,
        "written": len(job.written),
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


def distil(job: Job, plan: Plan, folder: Path) -> tuple[bool, Plan]:
    """Return whether the model in `folder` came closer to the dense one, and the plan with notes.

    Scales, factors and norms, and codes where the recipe says so, learn end to end from the dense
    model on the calibration and search sequences and those it wrote itself; the held-out ones
    judge. The folder is replaced where they say that it is closer. Files are in
    work/end-to-end-<fingerprint>; a run that was stopped goes on from there.
    """
    parts = [job.tokens[kind] for kind in ("calibration", "search", "heldout")]
    learn, judge = torch.cat(parts[:2]), parts[2]
    if not len(judge):
        learn, judge = learn[2:], learn[:2]
    learn = torch.cat([learn, job.written])
    settings = end_to_end_settings(
        job.recipe.model,
        steps=job.recipe.distil.steps,
        learning_rate=job.recipe.distil.learning_rate,
        codes=job.recipe.distil.codes and any(map(has_p_step, plan.levels.values())),
        seed=job.recipe.data.seed,
        device=job.device,
    )
    made_from = {
        # the config holds the checksums of all tensors
        "model": text_fingerprint((folder / "config.json").read_text(encoding="utf-8")),
        "tokens": tensor_fingerprint(learn),
        "settings": {k: v for k, v in vars(settings).items() if k != "steps"},
    }
    work = job.work / f"end-to-end-{text_fingerprint(*map(str, made_from.values()))}"
    claim(work, made_from, what="a training run")
    targets = [_targets(job, ids) for ids in (learn, judge)]
    from ..training.tune import trained  # imports Trainer, and with it datasets and peft

    done = trained(str(folder), folder, settings, *targets, work=work)
    notes = distilled_notes(done, settings.steps, written=len(job.written))
    logger.info("distilled: %s", notes)
    return done.is_kept, plan.replace(results={**plan.results, "distilled": notes})


def loss(job: Job, store: LevelStore, levels: Mapping[str, Level]) -> float:
    """Return the mean loss of a plan on some of the search sequences, in this process alone."""
    n = min(MAX_SEQUENCES, len(job.tokens["search"]))
    (losses,) = job.evaluator_alone(store).losses([levels], range(n))
    return math.fsum(losses) / len(losses)


def refining_tokens(job: Job) -> tuple[Tensor, Tensor]:
    """Return the sequences that levels are refined on, and those that judge."""
    tokens, heldout = job.tokens["calibration"], job.tokens["heldout"]
    if not len(heldout):
        tokens, heldout = tokens[2:], tokens[:2]
    if not len(tokens):
        raise ValueError("refine needs 3 calibration sequences or more, or some held out")
    return torch.cat([tokens, job.written]), heldout


def refine_settings(job: Job, mode: str) -> Settings:
    """Return how levels are refined in a mode."""
    tuning = BlockTuning(seed=job.recipe.data.seed, bfloat16=has_bfloat16(job.device))
    return Settings(mode, tuning=tuning)


def _targets(job: Job, tokens: Tensor) -> Targets:
    """Return what the dense model says of tokens, kept in the work folder for any plan."""
    whole = job.whole
    folder = whole.work / f"targets-{tensor_fingerprint(tokens)}"
    return Targets(precompute_targets(whole.model, tokens, folder, progress=job.progress))


def end_to_end_settings(
    teacher: str, *, device: torch.device, codes: bool = False, **settings: Any
) -> Tuning:
    """Return how a compressed model learns end to end from `teacher`; codes: they move as well."""
    if codes:
        settings |= {"train": f"{CODES},{KINDS}", "every": CODES_EVERY}
    settings = {"train": KINDS, "teacher": teacher, "batch": 1, **settings}
    return Tuning(bf16=has_bfloat16(device), **settings)


def distilled_notes(done: Tuned, steps: int, *, written: int) -> dict[str, Any]:
    """Return what a plan's results say of learning end to end; no times, which differ by run.

    written: sequences among those learnt from that the dense model wrote itself.
    """
    assert done.kl is not None  # there is a teacher
    return {
        "mode": END_TO_END,
        "steps": steps,
        "fitness": "kl",
        "before": done.kl[0],
        "after": done.kl[1],
        "is_kept": done.is_kept,
        "written": written,
    }
