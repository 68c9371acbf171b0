"""How the states of an embedding model become one vector, as its folder says."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

logger = logging.getLogger(__name__)

_POOLING = "1_Pooling/config.json"  # of sentence-transformers


def _file_of(model: str) -> Path | None:
    """Return the file of a folder, or of a repository on the Hub, None where there is none."""
    if Path(model).is_dir():
        path = Path(model) / _POOLING
        return path if path.is_file() else None
    quiet = ("missing_entries", "connection_errors", "gated_repo")
    found = cached_file(
        model, _POOLING, **{f"_raise_exceptions_for_{what}": False for what in quiet}
    )
    return None if found is None else Path(found)


def pooling_said(model: str, architecture_is_causal: bool) -> str:
    """Return how a folder of sentence-transformers pools, else what its kind of model does."""
    path = _file_of(model)
    said: Mapping[str, Any] = {}
    if path is not None:
        said = json.loads(path.read_text(encoding="utf-8"))
    word = str(said.get("pooling_mode", ""))
    known = {"cls": "first", "lasttoken": "last", "mean": "mean"}
    for key, pooling in known.items():
        if word == key or any(said.get(f"pooling_mode_{k}") for k in (key, f"{key}_token")):
            return pooling
    if said and not said.get("pooling_mode_mean_tokens"):
        logger.warning("%s pools in a way that is not known here; the mean is compared", path)
    return "mean" if said or not architecture_is_causal else "last"
