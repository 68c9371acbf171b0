"""Models of fewer channels in their MLPs, compressed to one size: which is closest is measured.

Of each width in the recipe a dense model is made (work/width-CHANNELS/dense, a stock checkpoint):
each block keeps the channels of its MLP that the layer behind them can spare least, and that layer
is fitted to them. Levels and search are then its own, the model to come close to is the whole one.
"""

from __future__ import annotations

import logging
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..base.fingerprint import claim
from ..base.progress import Progress
from ..base.target import whole_folder
from ..calibration.input_moments import load_stats
from ..methods.maths.channels import fewer_columns
from ..models.narrow import CHANNELS, DOWN, narrowed, widths
from ..models.units import find_blocks
from ..plans.plan import Plan
from ..store.level_store import LevelStore
from .job import Job
from .levels import build_levels, fingerprint, input_statistics
from .plan_search import find_plan
from .refinement import loss

logger = logging.getLogger(__name__)


def best_width(job: Job) -> tuple[Job, LevelStore, Plan]:
    """Return the job of the recipe's best width, its levels, and its plan with what each lost.

    All are searched for the recipe's size; the loss is that of the search's sequences against the
    whole model, before refinement.
    """
    n = widths(job.model)[CHANNELS]
    rows: list[dict[str, Any]] = []
    last: tuple[Job, LevelStore, Plan] | None = None
    for channels in job.channels:
        last = None  # one narrower model at a time
        last = _searched(job, channels, n)
        lost = loss(last[0], last[1], last[2].levels)
        logger.info("%d of %d channels: %s %.4f", channels, n, job.recipe.search.fitness, lost)
        is_number = math.isfinite(lost)  # a collapsed model's may be none
        rows.append({"channels": channels, "of": n, "loss": lost if is_number else None})
    best = min(rows, key=lambda row: math.inf if row["loss"] is None else row["loss"])
    if last is None or best is not rows[-1]:
        last = None
        last = _searched(job, best["channels"], n)  # from its files
    one, store, plan = last
    return one, store, plan.replace(search={**plan.search, "widths": rows})


def _searched(job: Job, channels: int, n: int) -> tuple[Job, LevelStore, Plan]:
    """Return the job of a width, which may be its own, with levels and plan."""
    one = job if channels == n else narrow(job, channels)
    store = build_levels(one)
    return one, store, find_plan(one, store)


def narrow(job: Job, channels: int) -> Job:
    """Return a job of the same recipe for its model with `channels` in each MLP."""
    folder = job.work / f"width-{channels}" / "dense"
    input_statistics(job)
    if job.ranks.is_first:
        write_narrow(job, channels, folder)
    job.ranks.wait()
    progress = partial(_named, job.progress, channels) if job.progress else None
    return Job(
        job.recipe,
        fitness=job.fitness,
        report_to=job.report_to,
        progress=progress,
        whole=job,
        dense=folder,
    )


@torch.no_grad()
def write_narrow(job: Job, channels: int, folder: Path) -> Path:
    """Write the job's model with `channels` in each MLP to `folder`, if it is not there.

    The statistics of its inputs are in the work folder.
    """
    made_from = {**fingerprint(job), "channels": channels}
    claim(folder.parent, made_from, what="a narrower model")
    if (folder / "config.json").is_file():
        return folder
    model = job.load_model()
    path, blocks = find_blocks(model)
    kept = []
    for number in range(len(blocks)):
        down: Any = model.get_submodule(name := f"{path}.{number}.{DOWN}")
        W, H = down.weight.float(), load_stats(job.work, number)[name].hessian()
        columns, values = fewer_columns(W.to(job.device), H.to(job.device), channels)
        kept.append(columns.to(W.device))
        down.weight[:, kept[-1]] = values.to(down.weight)
        if job.progress:
            job.progress(f"{channels} channels", number + 1, len(blocks))
    with whole_folder(folder) as new:
        narrowed(model, channels=kept).save_pretrained(new)
        job.tokenizer.save_pretrained(new)  # so that it is a model to evaluate, and to adapt from
    return folder


def _named(progress: Progress, channels: int, what: str, done: int, total: int) -> None:
    """Report progress on the model of some width."""
    progress(f"{what}, {channels} channels", done, total)
