"""Refuse models that read something else than one text."""

from __future__ import annotations

from torch import nn

from .classes import class_of
from .ends import has_embedding


def check_reads_text(model: nn.Module) -> None:
    """Raise ValueError for a headless model that is none of one text: of images, pairs, actions."""
    if not class_of(model).is_vector:
        return
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids" or not has_embedding(model):
        why = f"reads {reads}" if reads != "input_ids" else "has no embedding of tokens for itself"
        raise ValueError(
            f"{type(model).__name__} {why}: it is no embedding model of texts, which is what "
            "calibration and search can run; levels that need no data can be given to its layers "
            "by EvoPressConfig(plan=...)"
        )
