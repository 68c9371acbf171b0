"""The packed checkpoint: smaller on disk and in memory, loaded by `from_pretrained`.

Needs `import hf_evopress` where it is loaded; without it, loading fails rather than giving noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..loading.quantizer import attach
from ..loading.replace import replace_linears
from ..models.dropped import replace_dropped
from ..models.plain import match_plan
from ..plans.plan import Plan
from .base import Export, States


class EvoPressExport(Export):
    """Packed tensors as they are in the level store, the plan in config.json."""

    name = "evopress"
    keeps_cache = True

    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        match_plan(model, plan)
        replace_dropped(model, plan)
        replace_linears(model, plan, states)
        attach(model, plan)
        model.save_pretrained(folder)

    def check(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        """Nothing: a job compares the reloaded folder with what its search scored."""
