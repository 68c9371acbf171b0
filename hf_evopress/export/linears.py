"""What formats that hold packed nn.Linear layers, and nothing else packed, have in common."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..models.experts import SplitExperts
from ..models.plain import stock_class
from ..plans.level import Level
from ..plans.plan import Plan
from .base import States
from .dense import write_weights

logger = logging.getLogger(__name__)


def not_linear(model: Any, plan: Plan) -> dict[str, str]:
    """Return unit -> why it is no layer of such a format, of the units that are not dense."""
    experts = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, SplitExperts))
    found = {}
    for unit, level in plan.items():
        if level.is_dense:
            continue
        if level.is_drop:
            found[unit] = "it is dropped"
        elif unit.startswith(experts):
            found[unit] = "it is an expert, stored with others as one tensor"
        elif (stock := stock_class(model, unit)) is not nn.Linear:
            found[unit] = f"it is a {stock.__name__} there, and the format knows nn.Linear"
    return found


def write_dense(
    model: Any, plan: Plan, states: States, ends: Mapping[str, Level], *, why: str
) -> Plan:
    """Return the plan without `ends`, after writing their weights into the model; say `why`.

    A plan of nothing else comes back as it is.
    """
    rest = {u: x for u, x in plan.levels.items() if u not in ends}
    if not ends or not rest:
        return plan
    named = ", ".join(f"{unit} ({level})" for unit, level in ends.items())
    logger.warning("%s: %s are written dense, as their levels decompress them", why, named)
    write_weights(model, Plan(ends), states)
    return plan.replace(levels=rest, shapes={u: s for u, s in plan.shapes.items() if u in rest})
