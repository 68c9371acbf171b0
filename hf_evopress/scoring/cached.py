"""Logits of a text that is read in pieces through a key-value cache, as in a long conversation.

A window read at once never looks at what a cache stores. Here each piece attends to all pieces
before it as the cache gives them back, so that perplexity and KL show what compressing it costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..models.kv_cache import cache_argument
from .evaluate import Logits

STEP = 64  # tokens read at once


def through_cache(model: Any, make_cache: Callable[[], Any], *, step: int = STEP) -> Logits:
    """Return a function from ids (1, window) to logits (1, window, vocabulary), for `compare`.

    make_cache: returns an empty cache, for each window anew.
    """
    if step < 1:
        raise ValueError(f"step needs to be 1 token or more, got {step}")
    name = cache_argument(model)

    def logits(ids: Tensor) -> Tensor:
        cache, pieces = make_cache(), []
        for piece in ids.to(model.device).split(step, dim=1):
            out = model(input_ids=piece, use_cache=True, **{name: cache})
            pieces.append(out.logits)
        return torch.cat(pieces, 1)

    return logits
