"""What a plan says of the widths that were tried for it, and of the one it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def widths_tried(search: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return channels, of how many, and loss or None of each width that was tried for a plan."""
    rows: Any = search.get("widths")
    types = {"channels": (int,), "of": (int,), "loss": (float, type(None))}
    is_known = isinstance(rows, (list, tuple)) and all(
        isinstance(row, Mapping) and all(isinstance(row.get(k), t) for k, t in types.items())
        for row in rows
    )
    return [*rows] if is_known else []


def width_kept(search: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the row of the width that lost least, which the plan is of; None without widths."""
    known = [row for row in widths_tried(search) if row["loss"] is not None]
    return min(known, key=lambda row: float(row["loss"]), default=None)


def is_narrow(search: Mapping[str, Any]) -> bool:
    """Return whether a plan is of fewer channels than its base model has."""
    kept = width_kept(search)
    return kept is not None and bool(kept["channels"] < kept["of"])
