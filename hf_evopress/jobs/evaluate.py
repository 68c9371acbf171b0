"""Evaluate a model: perplexity on a text, stored size, distance from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from ..base.progress import Progress
from ..calibration.data import tokenize_file
from ..loading.quantizer import register_with_transformers
from ..models.size import model_size, stored_bytes
from ..scoring.evaluate import compare


def evaluate_model(
    model: str,
    data: str,
    *,
    against: str | None = None,
    window: int = 2048,
    max_windows: int | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return what `model` scores on the text file `data`, what it stores, and how far from
    the dense model `against` it is."""
    register_with_transformers()
    tokens = tokenize_file(data, AutoTokenizer.from_pretrained(model))
    if len(tokens) < window:
        raise ValueError(f"{data} has {len(tokens)} tokens, one window needs {window}")
    made = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    dense = AutoModelForCausalLM.from_pretrained(against, dtype=dtype) if against else None
    report = compare(made, dense, tokens, window=window, max_windows=max_windows, progress=progress)
    size = model_size(made)
    stored = {"size_bytes": stored_bytes(model)} if Path(model).is_dir() else {}
    return {
        **report.to_dict(),
        "bits_per_weight": size.bits_per_weight,
        "bits_per_weight_with_embeddings": size.bits_per_weight_with_embeddings,
        **stored,
    }
