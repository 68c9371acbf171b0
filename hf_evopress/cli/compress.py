"""compress, levels, search, apply, run: commands that make something."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..recipe import Recipe
from .console import bars, console, table
from .inspect import show_front

if TYPE_CHECKING:
    from ..pipeline import Result
    from ..store import LevelStore

Model = Annotated[str, typer.Argument(help="A dense model: a Hub name or a folder.")]
Bits = Annotated[
    str | None,
    typer.Option(
        help="Budget: stored bits per compressed weight, scales and zero points counted; "
        "in search also LOW:HIGH, for plans of all sizes between."
    ),
]
Size = Annotated[str | None, typer.Option(help="Budget: the whole checkpoint, such as 90MB.")]
Ratio = Annotated[float | None, typer.Option(help="Budget: share of the dense checkpoint's size.")]
Out = Annotated[str, typer.Option("--out", "-o", help="Folder to write.")]
Texts = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        "-d",
        help="Text to calibrate and search on: a file (.txt, .json, "
        ".jsonl, .parquet) or a Hub dataset name[:config]. Repeat for more. "
        "Default: HuggingFaceFW/fineweb-edu.",
    ),
]
Work = Annotated[
    str | None,
    typer.Option(
        help="Folder for statistics, levels and search state, reused by later runs of "
        "the same model, data and levels at any budget. Default: OUT.work."
    ),
]
Levels = Annotated[
    list[str] | None,
    typer.Option(
        "--level",
        "-l",
        help="Offer this level, such as gptq:bits=3,group_size=64; "
        "repeat for a menu. Default: gptq at 2 to 8 bits, groups of 32, 64 and 128.",
    ),
]
Skip = Annotated[
    list[str] | None, typer.Option(help="Leave units like this dense: '*.layers.0.*'. Repeat.")
]
Tie = Annotated[
    list[str] | None,
    typer.Option(help="Units of a block that share a level: q_proj,k_proj,v_proj. Repeat."),
]
Pin = Annotated[
    list[str] | None, typer.Option(help="PATTERN=LEVEL: fix a unit's level: '*.v_proj=...'.")
]
Strategy = Annotated[
    str,
    typer.Option(help="evolve (ours), evopress (as published), knapsack, uniform or random."),
]
Seed = Annotated[int, typer.Option(help="Seed of data order and search.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per calibration and search sequence.")]
Calibration = Annotated[int, typer.Option(help="Calibration sequences.")]
SearchPool = Annotated[int, typer.Option(help="Search sequences to draw from.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the model.")]


def compress(
    model: Model,
    out: Out,
    bits: Bits = None,
    size: Size = None,
    ratio: Ratio = None,
    data: Texts = None,
    test: Annotated[
        str | None,
        typer.Option(help="Text file for the final figures; default: unseen parts of the data."),
    ] = None,
    work: Work = None,
    level: Levels = None,
    skip: Skip = None,
    tie: Tie = None,
    pin: Pin = None,
    strategy: Strategy = "evolve",
    generations: Annotated[int | None, typer.Option(help="Generations of the search.")] = None,
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    search_pool: SearchPool = 32,
    revision: Revision = None,
) -> None:
    """Compress a model to a size: calibrate, make levels, search, pack, reload, measure.

    \b
    hf-evopress compress HuggingFaceTB/SmolLM2-135M-Instruct --bits 3.3 --out smol-3.3bit

    Stop it with Ctrl-C at any time; the same command goes on where it was. Another --bits with
    the same --work costs only the search.
    """
    recipe = _recipe(**locals())
    _run(recipe, test)


def run(
    recipe: Annotated[Path, typer.Argument(help="A recipe, YAML.")],
    override: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as budget.bits=3 or out=smol.")
    ] = None,
    test: Annotated[str | None, typer.Option(help="Text file for the final figures.")] = None,
) -> None:
    """Do what a recipe says; `compress` writes the recipe of each run into its folder.

    \b
    hf-evopress run recipes/smollm2-135m.yaml budget.bits=2.8 out=smol-2.8bit
    """
    _run(Recipe.load(recipe, override or ()), test)


def levels(
    model: Model,
    work: Annotated[str, typer.Option(help="Folder to keep statistics and levels in.")],
    data: Texts = None,
    level: Levels = None,
    skip: Skip = None,
    pin: Pin = None,
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    search_pool: SearchPool = 32,
    revision: Revision = None,
) -> None:
    """Make every level of every layer, and print the error that each leaves on held-out text.

    The store in WORK serves any number of searches: hf-evopress search MODEL --work WORK ...
    """
    recipe = _recipe(**locals(), ratio=1.0)
    from ..job import Job

    with bars() as progress:
        store = Job(recipe, progress=progress).build()
    console.print(_level_errors(store))


def search(
    model: Model,
    work: Annotated[str, typer.Option(help="The folder that `levels` or `compress` filled.")],
    out: Annotated[
        str, typer.Option("--out", "-o", help="Plan file to write; a folder for several plans.")
    ] = "plan.json",
    bits: Bits = None,
    size: Size = None,
    ratio: Ratio = None,
    data: Texts = None,
    level: Levels = None,
    skip: Skip = None,
    tie: Tie = None,
    pin: Pin = None,
    strategy: Strategy = "evolve",
    generations: Annotated[int | None, typer.Option(help="Generations of the search.")] = None,
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    search_pool: SearchPool = 32,
    revision: Revision = None,
) -> None:
    """Find a plan for a budget and write it, a few kilobytes; levels are made if not there.

    \b
    hf-evopress search MODEL --work smol.work --data text.txt --bits 2.8 --out plan-2.8.json
    hf-evopress search MODEL --work smol.work --data text.txt --bits 2.5:4.5 --out front
    """
    words = {**locals(), "out": None}
    if bits is not None and ":" in bits:
        return _front(words, out)
    recipe = _recipe(**words)
    from ..job import Job
    from ..pipeline import find_plan

    with bars() as progress:
        job = Job(recipe, progress=progress)
        plan = find_plan(job, job.build())
    path = plan.save(out) if job.ranks.is_first else out
    console.print(plan.summary(), markup=False)
    console.print(f"plan written to {path}", markup=False)


def apply(
    plan: Annotated[str, typer.Argument(help="A plan: a file, a folder or a Hub name.")],
    out: Out,
    model: Annotated[
        str | None, typer.Option(help="The dense model; default: the one the plan was made for.")
    ] = None,
    data: Texts = None,
    seed: Seed = 0,
    seq_len: SeqLen = 1024,
    calibration: Calibration = 56,
    revision: Revision = None,
) -> None:
    """Compress a model by a plan that is already there, without a search.

    \b
    hf-evopress apply plan.json --model me/my-finetune --data text.txt --out my-finetune-3.3bit
    """
    from ..pipeline import apply_plan

    folder = apply_plan(
        plan,
        out,
        model=model,
        data=data,
        n_sequences=calibration,
        seq_len=seq_len,
        seed=seed,
        revision=revision,
    )
    console.print(f"model written to {folder}", markup=False)


def _front(words: dict[str, Any], out: str) -> None:
    """Find plans of all sizes in a range and write them to the folder `out`."""
    low, _, high = words["bits"].partition(":")
    if words["strategy"] not in ("evolve", "pareto"):
        raise ValueError(f"a range of bits needs strategy pareto, not {words['strategy']}")
    recipe = _recipe(**{**words, "bits": high, "strategy": "pareto", "low": _bits(low)})
    from ..front import check_front_target, find_front, save_front
    from ..job import Job

    check_front_target(out)
    with bars() as progress:
        job = Job(recipe, progress=progress)
        plans = find_front(job, job.build())
    if job.ranks.is_first:
        save_front(plans, out)
        show_front(out)


def _bits(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--bits is a number, or LOW:HIGH in search; got {text!r}") from None


def _recipe(**words: Any) -> Recipe:
    """Return the recipe that options of a command say."""
    given = {k: v for k, v in words.items() if v is not None}
    if "bits" in given:
        given["bits"] = _bits(given["bits"])
    pins = {}
    for item in given.get("pin", ()):
        pattern, equals, level = item.partition("=")
        if not equals:
            raise ValueError(f"--pin is PATTERN=LEVEL, got {item!r}")
        pins[pattern] = level
    search: dict[str, Any] = {k: given[k] for k in ("strategy", "seed") if k in given}
    if "generations" in given:
        search["settings"] = {"generations": given["generations"]}
    if "low" in given:
        search["settings"] = {"low": given["low"]}
    data = {
        "sources": given.get("data", []),
        "seq_len": given["seq_len"],
        "calibration": given["calibration"],
        "search": given.get("search_pool", 32),
        "seed": given["seed"],
    }
    recipe: dict[str, Any] = {
        **{k: given[k] for k in ("model", "out", "work", "revision", "skip") if k in given},
        "budget": {k: given[k] for k in ("bits", "size", "ratio") if k in given},
        "data": data,
        "search": search,
        "tie": [group.split(",") for group in given.get("tie", ())],
        "pin": pins,
    }
    if "level" in given:
        recipe["levels"] = given["level"]
    return Recipe.from_dict(recipe)


def _run(recipe: Recipe, test: str | None) -> None:
    from ..pipeline import compress as run_line

    with bars() as progress:
        result = run_line(recipe, test=test, progress=progress)
    _show(result)


def _show(result: Result) -> None:
    from ..cards import exact_bits
    from ..report import heat_map, results_table

    drawn = heat_map(result.plan, exact_bits(result.plan), color=console.is_terminal)
    console.print(drawn, markup=False, soft_wrap=True)
    rows = [
        {
            "": row.name,
            "bits/weight": row.bits_per_weight,
            "MB": row.size_bytes / 1e6,
            "perplexity": row.report.perplexity,
            "KL (nats)": row.report.kl_nats,
            "same top-1": row.report.top1_agreement,
        }
        for row in result.rows
    ]
    console.print("\n" + results_table(rows), markup=False, soft_wrap=True)
    console.print(f"\nIt says: {result.sample}", markup=False)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    console.print(
        f"\nModel, plan, recipe and heat map are in {result.folder} ({spent})", markup=False
    )


def _level_errors(store: LevelStore) -> Any:
    """Return a table of held-out layer errors: the mean over the units that offer each level."""
    found: dict[str, list[tuple[float, float]]] = {}
    for unit in store.units:
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


COMMANDS = {"compress": compress, "run": run, "levels": levels, "search": search, "apply": apply}
