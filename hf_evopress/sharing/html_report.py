"""One HTML page about a compressed model: figures, heat map, levels, every unit, recipe.

Self-contained: no scripts, nothing loaded from elsewhere; the page forbids both to itself.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.resources import atomic_write, bundled, format_size
from ..base.target import check_file
from ..base.version import __version__
from ..plans.card_template import level_counts, measured_on, protocol
from ..plans.plan import Plan
from ..plans.repo import plan_rows
from ..recipes.recipe import Recipe
from .cards import RECIPE, against, exact_bits, mean_bits, portable
from .report import Grid, grid, shade


def write_report(
    source: str | Path | Plan, out: str | Path | None = None, *, overwrite: bool = False
) -> Path:
    """Return the page about a model folder, a plan file, a Hub repository or a Plan.

    out: by default NAME.report.html in the working folder.
    """
    plan = source if isinstance(source, Plan) else Plan.from_pretrained(source)
    name = plan.base_model or "plan" if isinstance(source, Plan) else str(source)
    recipe = None
    if not isinstance(source, Plan) and (Path(source) / RECIPE).is_file():
        recipe = Recipe.load(Path(source) / RECIPE)
    short = name.rstrip("/").replace("\\", "/").rpartition("/")[2].partition("@")[0]
    path = Path(out) if out is not None else Path(f"{short.removesuffix('.json')}.report.html")
    check_file(path, b"<footer>hf-evopress", overwrite=overwrite)
    return atomic_write(path, report_html(plan, recipe, name=short))


def report_html(plan: Plan, recipe: Recipe | None = None, *, name: str) -> str:
    """Return the page; what was not measured is left out."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(bundled("model_cards")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["size"] = format_size
    bits, rows = exact_bits(plan), plan_rows(plan.to_dict())
    shown = grid(plan, bits) if _has_blocks(plan) else None
    return jinja.get_template("report.html").render(
        name=name,
        plan=plan,
        version=__version__,
        bits=mean_bits(plan, bits),
        is_exact=bits is not None,
        table=_table(rows),
        protocol=protocol(rows),
        text=measured_on(plan.to_dict()),
        against=against(plan.search),
        heat=_heat(shown) if shown else None,
        counts=level_counts({u: str(v) for u, v in plan.items()}, plan.shapes),
        units=_units(plan, bits),
        curve=_curve(plan),
        budget=_plain(plan.budget),
        search=_plain(plan.search),
        settings=_plain(plan.search.get("settings")),
        versions=_plain(plan.search.get("versions")),
        recipe=portable(recipe),
    )


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the measured rows, each value as text, with the share of the largest for bars."""
    forms = {
        "bits_per_weight": "{:.3f}",
        "perplexity": "{:.2f}",
        "kl_nats": "{:.4f}",
        "top1_agreement": "{:.1%}",
    }
    made = []
    for name, row in rows.items():
        cells = {
            key: form.format(row[key]) if isinstance(row.get(key), (int, float)) else ""
            for key, form in forms.items()
        }
        size = row.get("size_bytes")
        cells["size_bytes"] = format_size(size) if isinstance(size, int) else ""
        made.append({"name": "this model" if name == "searched" else name, **cells})
    return made


def _heat(shown: Grid) -> dict[str, Any]:
    """Return the cells of the heat map with their colours, and a legend of five steps."""
    low, high = shown.span

    def cell(value: float | None) -> dict[str, str] | None:
        if value is None:
            return None
        ground, is_light = shade((value - low) / (high - low))
        red, green, blue = ground
        ink = "#000" if is_light else "#fff"
        return {"text": f"{value:.2f}", "ground": f"#{red:02x}{green:02x}{blue:02x}", "ink": ink}

    return {
        "labels": list(zip(shown.labels, shown.kinds, strict=True)),
        "rows": [
            {
                "block": block,
                "cells": [cell(shown.cells.get((block, kind))) for kind in shown.kinds],
                "mean": f"{mean:.2f}",
            }
            for block, mean in zip(shown.blocks, shown.row_means, strict=True)
        ],
        "means": [f"{mean:.2f}" for mean in shown.column_means],
        "mean": f"{shown.mean:.2f}",
        "legend": [cell(low + (high - low) * i / 4) for i in range(5)],
    }


def _units(plan: Plan, bits: Mapping[str, float] | None) -> list[dict[str, str]]:
    return [
        {
            "name": unit,
            "level": str(level),
            "shape": "x".join(map(str, plan.shapes[unit])) if unit in plan.shapes else "",
            "bits": f"{bits[unit]:.3f}" if bits else "",
        }
        for unit, level in plan.items()
    ]


def _curve(plan: Plan) -> str | None:
    """Return the convergence plot as a data address, None where the plan has no history."""
    history = plan.search.get("history")
    if not isinstance(history, list):
        return None
    rows = [
        row
        for row in history
        if isinstance(row, Mapping)
        and all(isinstance(row.get(key), (int, float)) for key in ("generation", "loss"))
    ]
    if len(rows) < 2:
        return None
    from .plots import convergence_plot

    with tempfile.TemporaryDirectory() as folder:
        picture = convergence_plot(rows, Path(folder) / "curve.svg").read_bytes()
    return f"data:image/svg+xml;base64,{base64.b64encode(picture).decode()}"


def _plain(values: Any) -> dict[str, str]:
    """Return the entries of a mapping that are single values, as text."""
    if not isinstance(values, Mapping):
        return {}
    return {
        str(key).replace("_", " "): f"{value:.6g}" if isinstance(value, float) else str(value)
        for key, value in values.items()
        if isinstance(value, (str, int, float))
    }


def _has_blocks(plan: Plan) -> bool:
    return any(any(part.isdigit() for part in unit.split(".")) for unit in plan)
