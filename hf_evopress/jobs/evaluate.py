"""Evaluate a model: perplexity on a text, stored size, distance from the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.repair import load
from ..base.devices import on_device
from ..base.progress import Progress
from ..calibration.data import tokenize_file
from ..loading.layers import prepare_layers
from ..loading.quantizer import register_with_transformers
from ..loading.runtimes import PACKED
from ..models.size import model_size, stored_bytes
from ..models.source import load_checked, read_config, read_tokenizer, window_of
from ..scoring.evaluate import compare


@on_device
def evaluate_model(
    model: str,
    data: str,
    *,
    column: str = "text",
    against: str | None = None,
    window: int | None = None,
    max_windows: int | None = None,
    dtype: str = "float32",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Return what `model` scores on the text file `data`, what it stores, and how far from
    the dense model `against` it is."""
    register_with_transformers()
    window = window_of(read_config(model), window)
    tokens = tokenize_file(data, read_tokenizer(model), column=column)
    if len(tokens) < window:
        raise ValueError(f"{data} has {len(tokens)} tokens, one window needs {window}")
    size = model_size(load_checked(model, dtype="auto"))  # as stored, whatever it is computed in
    made = load(model, dtype=dtype)
    prepare_layers(made, PACKED)  # figures are the reference's, on every machine
    dense = load(against, dtype=dtype) if against else None
    report = compare(made, dense, tokens, window=window, max_windows=max_windows, progress=progress)
    stored = {"size_bytes": stored_bytes(model)} if Path(model).is_dir() else {}
    return {
        **report.to_dict(),
        "bits_per_weight": size.bits_per_weight,
        "bits_per_weight_with_embeddings": size.bits_per_weight_with_embeddings,
        **stored,
    }
