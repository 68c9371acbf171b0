"""Calibrate the dense model and build the level store of a job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..base.fingerprint import model_fingerprint, tensor_fingerprint, text_fingerprint
from ..base.memory import whole_within_memory, within_memory
from ..base.version import __version__
from ..calibration.end_moments import load_ends
from ..calibration.input_moments import calibrate, load_stats
from ..calibration.output_moments import BATCH_TOKENS, load_moments, output_moments
from ..methods import compose
from ..models.images import made_from
from ..models.units import Unit
from ..store.level_store import LevelStore, Source
from .job import Job
from .refinement import refined_levels

CALIBRATION_BATCH = 4096  # tokens


def build_levels(job: Job) -> LevelStore:
    """Return the level store of the recipe's menu."""
    if job.units:
        source = calibrated(job)
        folder = _store_folder(job, source)
    else:  # a budget of drops: what is kept stays dense, and nothing is stored
        source = Source({"model": model_fingerprint(job.model)}, lambda block: {})
        folder = job.work / "store-dense"
    store = whole_within_memory(
        "the level store",
        lambda: LevelStore.build(
            folder,
            job.model,
            job.units,
            job.menus,
            source,
            others=[f for f in (job.work / "store", *_more_stores(job)) if f != folder],
            ranks=job.ranks,
            progress=job.progress,
        ),
        job.device,
    )
    return refined_levels(job, store) if job.recipe.refine_levels else store


def calibrated(job: Job) -> Source:
    """Return what levels are made from, after one streaming pass and one backward pass."""
    seq_len = job.recipe.data.seq_len
    units = input_statistics(job)
    searched = [unit for unit in units if unit.is_end]
    moments = ends = None
    n_tokens = job.recipe.search.sensitivity_tokens
    if n_tokens or searched:
        n = max(1, n_tokens // job.recipe.data.seq_len)
        within_memory(
            "sensitivities",
            lambda batch: output_moments(
                job.model,
                job.tokens["calibration"][:n],
                job.work,
                units=units if n_tokens else searched,
                counted=job.tokens["calibration"],
                seed=job.recipe.data.seed,
                batch_tokens=batch,
                ranks=job.ranks,
                progress=job.progress,
            ),
            job.device,
            batch_tokens=BATCH_TOKENS,
            least=seq_len,
        )
        moments = (lambda block: load_moments(job.work, block)) if n_tokens else None
        ends = lambda: load_ends(job.work, searched)  # noqa: E731
    return Source(fingerprint(job), lambda block: load_stats(job.work, block), moments, ends)


def input_statistics(job: Job) -> list[Unit]:
    """Write the second moments of the inputs to the work folder; return the units they are of."""
    units = [unit for unit in job.units if not unit.is_end or _is_open(job, unit)]
    within_memory(
        "calibration",
        lambda batch: calibrate(
            job.model,
            job.tokens["calibration"],
            job.work,
            units=units,
            heldout_tokens=job.tokens.get("heldout"),
            batch_tokens=batch,
            ranks=job.ranks,
            progress=job.progress,
        ),
        job.device,
        batch_tokens=CALIBRATION_BATCH,
        least=job.recipe.data.seq_len,
    )
    return units


def _is_open(job: Job, unit: Unit) -> bool:
    """Return whether an end is searched, or made from statistics."""
    menu = job.menus[unit.name]
    return len(menu) > 1 or any(compose.needs_stats(level) for level in menu)


def _store_folder(job: Job, source: Source) -> Path:
    """Return the folder of a store that has this menu, or of a new one for it."""
    first, others = job.work / "store", _more_stores(job)
    if not LevelStore.lacks(first, job.units, job.menus, source):
        return first
    for folder in others:
        if LevelStore.lacks(folder, job.units, job.menus, source) is False:
            return folder
    menu = json.dumps({unit: list(map(str, levels)) for unit, levels in job.menus.items()})
    return job.work / f"store-{text_fingerprint(menu)}"


def _more_stores(job: Job) -> list[Path]:
    return sorted(job.work.glob("store-*"))


def fingerprint(job: Job) -> dict[str, Any]:
    """Return what levels, and all else that is calibrated, are made from."""
    data = job.tokens
    return {
        "model": model_fingerprint(job.model),
        "data": {
            k: tensor_fingerprint(v) for k, v in data.items() if k in ("calibration", "heldout")
        },
        "sensitivity": [job.recipe.search.sensitivity_tokens, job.recipe.data.seed],
        **made_from(job.model),
        "hf_evopress": __version__,
    }
