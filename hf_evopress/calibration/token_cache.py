"""A cache of token windows on disk: text is fetched and tokenized once for many runs.

    tokens/<fingerprint>.safetensors     calibration, search, heldout, test

The fingerprint covers the sources (files by their bytes, datasets by their names), tokenizer,
sizes, lengths and seed. A run that goes on tomorrow uses the windows it began with, also where
the Hub has gone or a dataset has grown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..base.fingerprint import text_fingerprint
from ..base.reading import reading
from ..base.resources import atomic_path, sha256
from .data import DEFAULT_SOURCE, Writer, load_splits

logger = logging.getLogger(__name__)


def cached_splits(
    folder: str | Path,
    sources: Sequence[str],
    tokenizer: Any,
    sizes: Mapping[str, int],
    *,
    seq_len: int,
    seed: int = 0,
    split: str = "train",
    column: str = "text",
    writers: Mapping[str, tuple[str, Writer]] | None = None,
    n_wrapped: int = 0,
) -> dict[str, Tensor]:
    """Return what `load_splits` returns, from `folder` where it has been made before.

    writers: source -> a fingerprint of what writes it, and the writer. n_wrapped: each window is
    so many texts, begun and ended as the tokenizer does.
    """
    writers = writers or {}
    called = [writers[name][0] if name in writers else name for name in sources]
    cut: dict[str, Any] = {"seq_len": seq_len, "seed": seed, "split": split, "column": column}
    cut |= {"wrapped": n_wrapped if n_wrapped > 1 else True} if n_wrapped else {}
    file = Path(folder) / f"{tokens_fingerprint(called, tokenizer, sizes, cut)}.safetensors"
    if file.is_file():
        with reading(file, way_out="it is damaged; delete it to read the text anew"):
            kept = load_file(file)
            return {name: kept[name].long() for name in sizes}
    write = {name: writer for name, (_, writer) in writers.items()}
    tokens = load_splits(
        sources,
        tokenizer,
        sizes,
        seq_len=seq_len,
        seed=seed,
        split=split,
        column=column,
        writers=write,
        n_wrapped=n_wrapped,
    )
    with atomic_path(file) as temporary:
        save_file({name: part.to(torch.int32) for name, part in tokens.items()}, temporary)
    logger.info("tokens kept in %s", file)
    return tokens


def tokens_fingerprint(
    sources: Sequence[str], tokenizer: Any, sizes: Mapping[str, int], cut: Mapping[str, Any]
) -> str:
    """Return 16 hex digits over everything that decides the windows."""
    texts = [sha256(name) if Path(name).is_file() else name for name in sources or [DEFAULT_SOURCE]]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # a slow tokenizer has no text of its own: vocabulary and name have to do
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab())
    template = str(getattr(tokenizer, "chat_template", None))
    return text_fingerprint(*texts, words, template, json.dumps([dict(sizes), dict(cut)]))
