"""Token windows as a class of model knows them: begun, ended and masked as it was trained.

A model that continues text reads pieces of one long text. A model like BERT reads whole texts,
which its tokenizer begins and ends ([CLS], [SEP]), and one that fills masks in is asked with some
tokens masked; an encoder-decoder reads two texts, source and target.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..models.classes import MASKED, ModelClass
from .data import load_tokens, tokenize_file, wrapped
from .text import Source

MASKED_SHARE = 0.15  # of the tokens, as BERT was trained


def class_tokens(
    sources: Sequence[Source] | str | os.PathLike[str],
    tokenizer: Any,
    kind: ModelClass,
    *,
    n_sequences: int,
    seq_len: int,
    seed: int = 0,
    column: str = "text",
) -> Tensor:
    """Return (n_sequences, seq_len) token windows of texts for a model of class `kind`.

    Those of `data.load_tokens`, which says what it raises.
    """
    tokens = load_tokens(
        sources,
        tokenizer,
        n_sequences=n_sequences,
        seq_len=seq_len,
        seed=seed,
        column=column,
        n_wrapped=kind.n_texts,
    )
    return masked(tokens, tokenizer, kind, seed=seed)


def file_tokens(
    path: str | os.PathLike[str],
    tokenizer: Any,
    kind: ModelClass | None,
    *,
    window: int,
    column: str = "text",
    seed: int = 0,
) -> Tensor:
    """Return all tokens of a file (n,), to be cut into windows, for a model of class `kind`.

    For one that continues text (None as well) they are those of `data.tokenize_file`; for others
    every `window` of them is begun and ended as the tokenizer does. Raises ValueError where there
    is no whole window.
    """
    n_wrapped = 0 if kind is None else kind.n_texts
    tokens = tokenize_file(path, tokenizer, column=column, plain=n_wrapped > 0)
    n_found = len(tokens)
    if n_wrapped:
        tokens = wrapped(tokens, tokenizer, seq_len=window, n_wrapped=n_wrapped).flatten()
    if len(tokens) < window:
        raise ValueError(f"{path} has {n_found} tokens, one window needs {window}")
    return tokens if kind is None else masked(tokens, tokenizer, kind, seed=seed)


def masked(tokens: Tensor, tokenizer: Any, kind: ModelClass, *, seed: int) -> Tensor:
    """Return `tokens` with some of them masked, for models that fill masks in.

    ValueError where such a model's tokenizer has no mask token.
    """
    if kind is not MASKED:
        return tokens
    mask = getattr(tokenizer, "mask_token_id", None)
    if mask is None:
        raise ValueError(f"{type(tokenizer).__name__} has no mask token, which this model fills in")
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)))
    drawn = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(seed)) < MASKED_SHARE
    return torch.where(drawn & ~torch.isin(tokens, special), mask, tokens)
