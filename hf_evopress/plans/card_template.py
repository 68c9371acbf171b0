"""Render cards from the jinja templates in `model_cards/`, with YAML front matter.

A template prints only what it is given: a missing number leaves out its line or its row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from ..base.resources import bundled, format_size
from .repo import is_repo_id

RELATIONS = ("adapter", "finetune", "merge", "quantized")


def render(template: str, metadata: Mapping[str, Any], **facts: Any) -> str:
    """Return the card of `template` ("plan.md") with `metadata` as front matter.

    Values of `metadata` that are None or empty are left out.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(  # Markdown, not HTML: `cell` and `code` escape
        loader=FileSystemLoader(bundled("model_cards")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= {"cell": cell, "code": code, "size": format_size}
    body = jinja.get_template(template).render(**facts)
    return front_matter(metadata) + re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"


def front_matter(metadata: Mapping[str, Any]) -> str:
    """Return YAML between two lines of dashes, as the Hub reads it."""
    import yaml

    relation = metadata.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise ValueError(f"base_model_relation is one of {', '.join(RELATIONS)}; got {relation!r}")
    told = {key: value for key, value in metadata.items() if value not in (None, [], "")}
    return f"---\n{yaml.safe_dump(told, sort_keys=False, allow_unicode=True)}---\n\n"


def hub_base(name: str | None) -> str | None:
    """Return `name` if it is a model on the Hub, None for a folder: its path is nobody's business.

    A relative path of two parts looks like a repository, so what exists on disk is none.
    """
    if name is None or not is_repo_id(name) or Path(name).exists():
        return None
    return name


def cell(value: Any) -> str:
    """Return `value` as text that neither ends a table cell nor starts markup."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", text)


def code(value: Any) -> str:
    """Return `value` as text for a code span or block: one line, without backquotes."""
    return " ".join(str(value).split()).replace("`", "'")


def results_rows(rows: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return headers and cells of a Markdown table of measured rows; unmeasured columns go."""
    columns = {
        "bits_per_weight": ("bits per weight", "{:.3f}"),
        "size_bytes": ("checkpoint", None),
        "perplexity": ("perplexity", "{:.2f}"),
        "kl_nats": ("KL to dense (nats)", "{:.4f}"),
        "top1_agreement": ("same top-1", "{:.1%}"),
        "cosine_distance": ("1 - cosine to dense", "{:.5f}"),
    }
    used = [key for key in columns if any(_is_number(row.get(key)) for row in rows.values())]
    headers = ["", *(columns[key][0] for key in used)]
    cells = []
    for name, row in rows.items():
        line = [cell(name)]
        for key in used:
            value, form = row.get(key), columns[key][1]
            if not _is_number(value):
                line.append("")
            else:
                line.append(form.format(value) if form else format_size(int(value)))
        cells.append(line)
    return headers, cells


def protocol(rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return how the rows were measured, None where they do not say."""
    said = {(row.get("window"), row.get("n_tokens")) for row in rows.values()}
    if len(said) != 1:
        return None
    window, n_tokens = said.pop()
    if not (_is_number(window) and _is_number(n_tokens)):
        return None
    return f"{int(n_tokens):,} tokens in non-overlapping windows of {int(window):,}"


def measured_on(plan: Mapping[str, Any]) -> str | None:
    """Return the name of the text that a plan (`Plan.to_dict()`) was measured on, if it says so."""
    text = (plan.get("results") or {}).get("text")
    return text if isinstance(text, str) else None


def level_counts(
    levels: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> list[tuple[str, int, float | None]]:
    """Return (level, number of units, share of the weights or None), the largest share first."""
    weights = {unit: shape[0] * shape[1] for unit, shape in shapes.items()}
    total = sum(weights.values())
    by_level: dict[str, list[str]] = {}
    for unit, level in levels.items():
        by_level.setdefault(str(level), []).append(unit)
    counts: list[tuple[str, int, float | None]] = []
    for level, units in by_level.items():
        known = sum(weights.get(unit, 0) for unit in units)  # sub-blocks have no shape
        counts.append((level, len(units), known / total if known else None))
    return sorted(counts, key=lambda item: (-(item[2] or 0), -item[1], item[0]))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
