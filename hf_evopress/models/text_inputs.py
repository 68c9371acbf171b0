"""Refuse models that read something else than one text."""

from __future__ import annotations

import inspect

from torch import nn

from .classes import class_of
from .ends import has_embedding

_GIVEN = ("self", "input_ids")


def check_reads_text(model: nn.Module) -> None:
    """Raise ValueError for a model that cannot run on a text alone.

    Such as BLIP-2, whose forward asks for an image, and headless models of images, pairs, actions.
    """
    parameters = inspect.signature(type(model).forward).parameters.values()
    named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    asked = [p.name for p in named if p.default is p.empty and p.name not in _GIVEN]
    reads = getattr(model, "main_input_name", "input_ids")
    why = None
    if type(model).forward is nn.Module.forward:
        why = "is several models in one"
    elif class_of(model).is_vector and reads != "input_ids":
        why = f"reads {reads}"
    elif class_of(model).is_vector and not has_embedding(model):
        why = "has no embedding of tokens for itself"
    elif asked:
        why = f"asks for {' and '.join(asked)} in each forward"
    if why is not None:
        raise ValueError(
            f"{type(model).__name__} {why}: it does not run on a text alone, as calibration and "
            "search do; levels that need no data can be given to its layers by "
            "EvoPressConfig(plan=...)"
        )
