"""show, diff, list: commands that only look."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .. import _PUBLIC
from ..base import plugins
from ..jobs.search_log import ENDING, read_log
from ..plans.plan import Plan
from ..plans.repo import FILE_NAME, INDEX_NAME, list_plans
from ..search.ask_tell import STRATEGIES, describe
from .console import console, table

# What is neither a plug-in nor a name to import, and the module that describes it.
_BESIDE = {
    "GearCache": "loading.kv_cache",
    "kick": "scoring.kick",
    "share": "jobs.shared_levels",
    "stack": "jobs.stack",
    "resize": "loading.blocks",
    "tune": "training.tune",
    "widths": "jobs.widths",
}


def show(
    plan: Annotated[
        str,
        typer.Argument(
            help="A plan file, a folder of plans, a Hub repository[@rev], or the log of a search."
        ),
    ],
    png: Annotated[
        Path | None,
        typer.Option("--plot", help="Draw heat map, front or curve to this file (.png, .svg)."),
    ] = None,
    units: Annotated[bool, typer.Option("--units", help="One line per unit.")] = False,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="What each level computes with on this machine.")
    ] = False,
    file: Annotated[
        str | None, typer.Option(help="Which plan, where a repository holds several.")
    ] = None,
) -> None:
    """Show a plan: a summary, a table of its levels and a heat map of bits per layer.

    \b
    hf-evopress show smol-3.3bit --plot plan.png
    hf-evopress show front --plot front.png              several plans, from --bits LOW:HIGH
    hf-evopress show smol.work/search/1a2b.jsonl --plot curve.png       a search under way
    """
    if plan.endswith(ENDING) and Path(plan).is_file():
        return _show_log(plan, png)
    if file is None and _is_front(plan):
        return show_front(plan, png)
    from ..sharing.impossible import impossible_levels
    from ..sharing.report import bits_line, cache_lines, heat_map, level_table

    loaded = Plan.from_pretrained(plan, filename=file)
    console.print(loaded.summary(), markup=False)
    console.print("\n" + level_table(loaded), markup=False, soft_wrap=True)
    console.print("\n" + bits_line(loaded), markup=False, soft_wrap=True)
    if impossible := impossible_levels(loaded):
        console.print(impossible, markup=False, soft_wrap=True)
    console.print("\n" + heat_map(loaded, color=console.is_terminal), markup=False, soft_wrap=True)
    if caches := cache_lines(loaded):
        console.print("\n" + caches, markup=False, soft_wrap=True)
    if units:
        for unit, level in [*loaded.items(), *loaded.cache.items()]:
            console.print(f"{unit}  {level}", markup=False, soft_wrap=True)
    if runtime:
        _show_runtime(loaded)
    if png is not None:
        from ..sharing.plots import heat_map_plot

        drawn = heat_map_plot(loaded, png, _stored_bits(loaded))
        console.print(f"heat map drawn to {drawn}", markup=False)


def _stored_bits(plan: Plan) -> dict[str, float] | None:
    """Return the stored bits per weight of each unit, None where they cannot be known here."""
    from ..sharing.cards import exact_bits  # not above: it imports torch, which takes seconds

    try:
        return exact_bits(plan)
    except ValueError:  # a level of a method that is not installed
        return None


def _show_runtime(plan: Plan) -> None:
    """Print what runtime `auto` computes each level with on this machine."""
    from ..base.devices import find_device
    from ..loading.runtimes import choices

    device = find_device()
    rows = [
        (level, str(len(units)), choice) for level, (choice, units) in choices(plan, device).items()
    ]
    console.print(f"\nruntime auto on {device}, in bfloat16 or float32", markup=False)
    console.print(table(("level", "layers", "computes"), rows, is_text=True))


def _is_front(plan: str) -> bool:
    folder = Path(plan)
    return (folder / INDEX_NAME).is_file() and not (folder / FILE_NAME).is_file()


def show_front(folder: str, png: Path | None = None) -> None:
    """Print the plans of a folder, smallest first, and draw their sizes and losses."""
    entries = list_plans(folder).values()
    rows = [
        (e.file, _number(e.bits_per_weight, "{:.3f}"), _number(e.kl_nats, "{:.4f}"))
        for e in sorted(entries, key=lambda e: e.bits_per_weight or 0)
    ]
    console.print(table(("plan", "bits/weight", "KL (nats)"), rows))
    console.print(f"hf-evopress apply {Path(folder) / rows[0][0]} --out FOLDER", markup=False)
    if png is not None:
        from ..sharing.plots import pareto_plot

        known = [(e.bits_per_weight, e.kl_nats) for e in entries]
        points = [(bits, loss) for bits, loss in known if bits is not None and loss is not None]
        console.print(f"front drawn to {pareto_plot({'plans': points}, png)}", markup=False)


def _show_log(path: str, png: Path | None) -> None:
    """Print the generations of a search, finished or not, and draw its loss."""
    rows = [row for row in read_log(path) if row["loss"] is not None]
    lines = [
        (
            str(row["generation"]),
            f"{row['loss']:.4f}",
            _number(row.get("bits_per_weight"), "{:.3f}"),
            _number(row.get("evaluated_tokens"), "{:,}"),
        )
        for row in rows
    ]
    console.print(table(("generation", "loss", "bits/weight", "tokens"), lines))
    if png is not None:
        from ..sharing.plots import convergence_plot

        console.print(f"curve drawn to {convergence_plot(rows, png)}", markup=False)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def diff(
    a: Annotated[str, typer.Argument(help="A plan: a file, a folder or a Hub repository[@rev].")],
    b: Annotated[str, typer.Argument(help="Another plan.")],
) -> None:
    """Show the units whose level differs between two plans; exit code 1 if any does."""
    changed = Plan.from_pretrained(a).diff(Plan.from_pretrained(b))
    rows = [(unit, str(x or "-"), str(y or "-")) for unit, (x, y) in changed.items()]
    if rows:
        console.print(table(("unit", a, b), rows, is_text=True))
    console.print(f"{len(rows)} units differ")
    raise typer.Exit(1 if rows else 0)


def list_plugins(
    name: Annotated[
        str | None, typer.Argument(help="What to describe at length: any name of the list.")
    ] = None,
) -> None:
    """List the methods, fitnesses, export formats and what else there is, or describe one."""
    groups = {"methods": "methods (levels)", "fitness": "fitnesses", "export": "export formats"}
    listed = {
        title: {n: plugins.describe(group, n) for n in plugins.names(group)}
        for group, title in groups.items()
    }
    others = {"beside levels": _BESIDE, "training, from Python": _training()}
    for title, modules in others.items():
        first = {module: n for n, module in reversed(modules.items())}  # what it is about
        listed[title] = {
            n: plugins.describe_module(module, None if first[module] == n else n)
            for n, module in modules.items()
        }
    listed["search strategies"] = {n: describe(n) for n in STRATEGIES}
    if name is not None:
        known = {n: text for texts in reversed(listed.values()) for n, text in texts.items()}
        if name not in known:
            near = plugins.did_you_mean(name, sorted(known))
            raise ValueError(f"nothing is called {name!r}{near}")
        console.print(known[name], markup=False, soft_wrap=True)
        if name in plugins.names("methods"):
            console.print()
            console.print(_parameters(name))
        return
    for title, texts in listed.items():
        rows = [(n, text.partition("\n")[0]) for n, text in texts.items()]
        console.print(table((title, ""), rows, is_text=True))
        console.print()


def _parameters(method: str) -> Table:
    """Return what a level of a method may say: names, defaults, and what they may be."""
    from ..methods import compose  # not above: it imports torch, which takes seconds

    rows = []
    for name, param in compose.method(method).params.items():
        bounds = [("at least", param.at_least), ("at most", param.at_most)]
        allowed = [f"{words} {_word(bound)}" for words, bound in bounds if bound is not None]
        if param.choices is not None:
            allowed = [", ".join(map(_word, param.choices))]
        default = "needed" if param.is_required else _word(param.default)
        rows.append((name, default, " to ".join(allowed), param.doc))
    return table(("parameter", "default", "may be", ""), rows, is_text=True)


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _training() -> dict[str, str]:
    """Return what of the package's public names belongs to training, and its module."""
    return {name: module for name, module in _PUBLIC.items() if module.startswith("training.")}


COMMANDS = {"show": show, "diff": diff, "list": list_plugins}
