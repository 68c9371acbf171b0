"""Let the vocabulary of a model with packed ends be resized, as chat formats ask for.

New rows have values that no code has. So the ends become dense when the size really changes, and
are saved dense; `hf-evopress compress` packs them again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .packed import PackedWeight

logger = logging.getLogger(__name__)
_NAME = "resize_token_embeddings"


def let_resize(model: Any, make_ends_dense: Callable[[Any], None]) -> None:
    """Have `model.resize_token_embeddings` make packed ends dense first."""
    setattr(model, _NAME, partial(_resize, model, make_ends_dense))


def as_before(model: Any) -> None:
    """Have `model` resize as its class does: its ends are dense."""
    model.__dict__.pop(_NAME, None)


def _resize(
    model: Any,
    make_ends_dense: Callable[[Any], None],
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    mean_resizing: bool = True,
) -> nn.Embedding:
    """Stand in for PreTrainedModel.resize_token_embeddings, with its arguments."""
    rows = model.get_input_embeddings().num_embeddings
    new = rows if new_num_tokens is None else new_num_tokens
    if isinstance(pad_to_multiple_of, int) and pad_to_multiple_of > 0:
        new = -(-new // pad_to_multiple_of) * pad_to_multiple_of
    if new != rows:
        before = _bytes(model)
        make_ends_dense(model)
        as_before(model)
        logger.warning(
            "the vocabulary goes from %d to %d tokens, so embedding and head are dense from now "
            "on: %.1f MB more; compress the saved model again to pack them",
            rows,
            new,
            (_bytes(model) - before) / 1e6,
        )
    resize = getattr(type(model), _NAME)
    resized: nn.Embedding = resize(model, new_num_tokens, pad_to_multiple_of, mean_resizing)
    return resized


def _bytes(model: Any) -> int:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {
        id(tensor): tensor
        for end in ends
        if end is not None
        for tensor in (end.state.values() if isinstance(end, PackedWeight) else [end.weight])
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())
