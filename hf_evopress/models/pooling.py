"""How the states of an embedding model become one vector, as its folder says."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_POOLING = "1_Pooling/config.json"  # of sentence-transformers


def pooling_said(model: str, architecture_is_causal: bool) -> str:
    """Return how a folder of sentence-transformers pools, else what its kind of model does."""
    path = Path(model) / _POOLING
    said: Mapping[str, Any] = {}
    if path.is_file():
        said = json.loads(path.read_text(encoding="utf-8"))
    word = str(said.get("pooling_mode", ""))
    known = {"cls": "first", "lasttoken": "last", "mean": "mean"}
    for key, pooling in known.items():
        if word == key or any(said.get(f"pooling_mode_{k}") for k in (key, f"{key}_token")):
            return pooling
    if said and not said.get("pooling_mode_mean_tokens"):
        logger.warning("%s pools in a way that is not known here; the mean is compared", path)
    return "mean" if said or not architecture_is_causal else "last"
