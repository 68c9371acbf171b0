"""compress, levels, search, run: commands that make something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..base.target import check_file
from ..plans.plan import MARK
from ..plans.repo import FILE_NAME
from ..recipes.recipe import Recipe
from .console import bars, console, table
from .device import computes
from .inspect import show_front
from .options import (
    Bits,
    CacheLevels,
    Calibration,
    Column,
    Compare,
    Context,
    DropKinds,
    DropRatio,
    EndsWords,
    Families,
    FitnessWords,
    For,
    Forbid,
    Generations,
    KeepFirst,
    KeepLast,
    Levels,
    MaxDrop,
    Model,
    Out,
    Overwrite,
    Pin,
    Ratio,
    RefineLevels,
    RefineMode,
    ReportTo,
    Revision,
    SearchDtype,
    SearchPool,
    Seed,
    SeqLen,
    Share,
    Size,
    Skip,
    Sparsity,
    StartPlans,
    Strategy,
    Test,
    Texts,
    Tie,
    TrustRemoteCode,
    Vision,
    Widths,
    Window,
    Work,
    Written,
    bits_of,
    recipe_of,
)
from .results import show_result
from .tune import show_follow_up

if TYPE_CHECKING:
    from ..jobs.job import Job
    from ..plans.plan import Plan
    from ..store.level_store import LevelStore


@computes
def compress(
    model: Model,
    out: Out,
    bits: Bits = None,
    size: Size = None,
    ratio: Ratio = None,
    context: Context = None,
    sparsity: Sparsity = None,
    drop_ratio: DropRatio = None,
    data: Texts = None,
    column: Column = "text",
    test: Test = None,
    work: Work = None,
    family: Families = None,
    level: Levels = None,
    drop: DropKinds = None,
    max_drop: MaxDrop = None,
    keep_first: KeepFirst = 0,
    keep_last: KeepLast = 0,
    export: For = "evopress",
    ends: EndsWords = "auto",
    share: Share = False,
    width: Widths = None,
    cache: CacheLevels = None,
    vision: Vision = False,
    skip: Skip = None,
    tie: Tie = None,
    pin: Pin = None,
    forbid: Forbid = None,
    strategy: Strategy = "evolve",
    compare: Compare = None,
    start: StartPlans = None,
    fitness: FitnessWords = "kl",
    search_dtype: SearchDtype = "auto",
    generations: Generations = None,
    refine: RefineMode = "none",
    refine_levels: RefineLevels = None,
    written: Written = 0,
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    search_pool: SearchPool = 32,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    window: Window = None,
) -> None:
    """Compress a model to a size: calibrate, make levels, search, pack, reload, measure.

    \b
    hf-evopress compress HuggingFaceTB/SmolLM2-135M-Instruct --bits 3.3 --out smol-3.3bit
    hf-evopress compress MODEL --bits 3.3 --family all --drop both --out smol-3.3bit
    hf-evopress compress MODEL --sparsity 0.5 --compare owl --out smol-sparse
    hf-evopress compress MODEL --size 90MB --for gguf --out smol      and smol-gguf/model.gguf
    hf-evopress compress MODEL --size 120MB --context 8192 --out smol   weights and cache together
    hf-evopress compress MODEL --drop-ratio 0.25 --compare block_influence --out smol-shallow

    Ctrl-C keeps the work: the same command goes on. Another --bits of that --work only searches.
    """
    _run(recipe_of(**locals()), test=test, window=window, overwrite=overwrite)


@computes
def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML.")],
    override: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as budget.bits=3 or out=smol.")
    ] = None,
    test: Test = None,
    overwrite: Overwrite = False,
    window: Window = None,
) -> None:
    """Do what a recipe says; `compress` writes the recipe of each run into its folder.

    \b
    hf-evopress run smollm2-135m-3.3bit budget.bits=2.8 out=smol-2.8bit
    """
    loaded = Recipe.load(recipe, override or ())
    _run(loaded, test=test, window=window, overwrite=overwrite)


@computes
def levels(
    model: Model,
    work: Annotated[str, typer.Option(help="Folder to keep statistics and levels in.")],
    data: Texts = None,
    column: Column = "text",
    sparsity: Sparsity = None,
    family: Families = None,
    level: Levels = None,
    export: For = "evopress",
    ends: EndsWords = "auto",
    vision: Vision = False,
    skip: Skip = None,
    pin: Pin = None,
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    search_pool: SearchPool = 32,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    diagnose: Annotated[
        str | None,
        typer.Option(help="A level to look at token by token: does it break attention sinks?"),
    ] = None,
) -> None:
    """Make every level of every layer, and print the error that each leaves on held-out text.

    The store in WORK serves any number of searches: hf-evopress search MODEL --work WORK ...
    """
    words = {k: v for k, v in locals().items() if k != "diagnose"}
    recipe = recipe_of(**words, ratio=None if sparsity else 1.0)
    from ..jobs.job import Job
    from ..jobs.levels import build_levels

    with bars() as progress:
        job = Job(recipe, progress=progress)
        store = build_levels(job)
    console.print(_level_errors(store))
    if diagnose is not None:
        _diagnose(job, store, diagnose)


PlanFile = Annotated[
    str, typer.Option("--out", "-o", help="Plan file to write; a folder for several plans.")
]


@computes
def search(
    model: Model,
    work: Annotated[str, typer.Option(help="The folder that `levels` or `compress` filled.")],
    out: PlanFile = "plan.json",
    bits: Bits = None,
    size: Size = None,
    ratio: Ratio = None,
    context: Context = None,
    sparsity: Sparsity = None,
    drop_ratio: DropRatio = None,
    data: Texts = None,
    column: Column = "text",
    family: Families = None,
    level: Levels = None,
    drop: DropKinds = None,
    max_drop: MaxDrop = None,
    keep_first: KeepFirst = 0,
    keep_last: KeepLast = 0,
    export: For = "evopress",
    ends: EndsWords = "auto",
    cache: CacheLevels = None,
    vision: Vision = False,
    skip: Skip = None,
    tie: Tie = None,
    pin: Pin = None,
    forbid: Forbid = None,
    strategy: Strategy = "evolve",
    compare: Compare = None,
    start: StartPlans = None,
    fitness: FitnessWords = "kl",
    search_dtype: SearchDtype = "auto",
    generations: Generations = None,
    report_to: ReportTo = None,
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    search_pool: SearchPool = 32,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
) -> None:
    """Find a plan for a budget and write it, a few kilobytes; levels are made if not there.

    \b
    hf-evopress search MODEL --work smol.work --data text.txt --bits 2.8 --out plan-2.8.json
    hf-evopress search MODEL --work smol.work --data text.txt --bits 2.5:4.5 --out front
    torchrun --nproc-per-node 2 -m hf_evopress search MODEL ...      the same plan, sooner
    """
    words = {**locals(), "out": None}
    if bits is not None and ":" in bits:
        return _front(words, out)
    _search(recipe_of(**words), out, report_to or (), overwrite=overwrite)


def _search(recipe: Recipe, out: str, report_to: Sequence[str], *, overwrite: bool) -> None:
    """Find the plan of a recipe and write it to the file `out`."""
    check_file(Path(out) / FILE_NAME if Path(out).is_dir() else out, MARK, overwrite=overwrite)
    from ..jobs.job import Job
    from ..jobs.levels import build_levels
    from ..jobs.plan_search import find_plan

    with bars() as progress:
        job = Job(recipe, report_to=report_to, progress=progress)
        plan = find_plan(job, build_levels(job))
    _show_plan(plan, plan.save(out) if job.ranks.is_first else out)


def _show_plan(plan: Plan, path: str | Path) -> None:
    console.print(plan.summary(), markup=False)
    for name, found in plan.search.get("against", {}).items():
        console.print(
            f"against {name}: {found['difference']:+.4f} +- {found['stderr']:.4f} nats per token "
            f"on {found['sequences']} held-out sequences",
            markup=False,
        )
    console.print(f"plan written to {path}", markup=False)


def _front(words: dict[str, Any], out: str) -> None:
    """Find plans of all sizes in a range and write them to the folder `out`."""
    low, _, high = words["bits"].partition(":")
    if words["strategy"] not in ("evolve", "pareto"):
        raise ValueError(f"a range of bits needs strategy pareto, not {words['strategy']}")
    recipe = recipe_of(**{**words, "bits": high, "strategy": "pareto", "low": bits_of(low)})
    from ..jobs.front import check_front_target, find_front, save_front
    from ..jobs.job import Job
    from ..jobs.levels import build_levels

    check_front_target(out)
    with bars() as progress:
        job = Job(recipe, report_to=words["report_to"] or (), progress=progress)
        plans = find_front(job, build_levels(job))
    if job.ranks.is_first:
        save_front(plans, out)
        show_front(out)


def _run(recipe: Recipe, *, overwrite: bool, **words: Any) -> None:
    from ..jobs.pipeline import compress as run_line

    if recipe.adapter is not None or recipe.tune is not None:
        from ..jobs.follow_up import check_follow_up, follow_up

        check_follow_up(recipe, overwrite=overwrite)
    with bars() as progress:
        result = run_line(recipe, overwrite=overwrite, progress=progress, **words)
    show_result(result)
    if recipe.adapter is not None or recipe.tune is not None:
        with bars() as progress:
            made = follow_up(recipe, result.folder, overwrite=overwrite, progress=progress)
        show_follow_up(made)


def _level_errors(store: LevelStore) -> Any:
    """Return a table of held-out layer errors: the mean over the units that offer each level."""
    found: dict[str, list[tuple[float, float]]] = {}
    for unit in (u.name for u in store.units.values() if not u.is_end):
        for level in store.levels(unit):
            scores = store.scores(unit, level)
            error = scores.get("heldout_error", scores.get("error", 0.0))
            bits = store.cost_bits(unit, level) / store.units[unit].n_weights
            found.setdefault(str(level), []).append((bits, error))
    rows = [
        (
            level,
            str(len(pairs)),
            f"{sum(b for b, _ in pairs) / len(pairs):.3f}",
            f"{sum(e for _, e in pairs) / len(pairs):.5f}",
            f"{max(e for _, e in pairs):.5f}",
        )
        for level, pairs in sorted(found.items(), key=lambda item: item[1])
    ]
    return table(("level", "units", "bits/weight", "mean error", "worst error"), rows)


def _diagnose(job: Job, store: LevelStore, level: str) -> None:
    """Print the units that a level costs most, and an alarm for those it breaks."""
    from ..scoring.diagnose import diagnose

    n = max(1, job.recipe.search.sensitivity_tokens // job.recipe.data.seq_len)
    found = diagnose(job.model, store, level, job.tokens["calibration"][:n])
    alarms = [f for f in found if f.is_alarm]
    rows = [
        (
            f.unit,
            f"{f.tokens.total:.5f}",
            "" if f.predicted is None else f"{f.predicted:.5f}",
            f"{f.first_share:.0%}",
            "ALARM" if f.is_alarm else "",
        )
        for f in dict.fromkeys([*alarms, *found[:10]])
    ]
    console.print(f"\n{level}, token by token", markup=False)
    console.print(table(("unit", "loss (nats)", "predicted", "at position 0", ""), rows))
    if alarms:
        console.print(
            f"{len(alarms)} of {len(found)} units lose far more at single tokens than on average: "
            "this level breaks their attention sinks; offer others, or a larger sink="
        )


COMMANDS = {"compress": compress, "run": run, "levels": levels, "search": search}
