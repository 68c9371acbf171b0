"""Let the vocabulary of a model with packed ends be resized, as chat formats ask for.

New rows have values that no code has. So the ends become dense when the size really changes, and
are saved dense; `hf-evopress compress` packs them again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .packed import PackedWeight

logger = logging.getLogger(__name__)


def let_resize(make_ends_dense: Callable[[Any], None]) -> None:
    """Have models of transformers make packed ends dense before they resize them.

    At their class, once: a method of one model's own would keep its memory alive in a circle.
    """
    stock = PreTrainedModel.resize_token_embeddings
    if getattr(stock, "_knows_evopress", False):
        return

    @wraps(stock)
    def resize_token_embeddings(
        self: Any,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        if any(isinstance(end, PackedWeight) for end in _ends(self)):
            _make_room(self, make_ends_dense, new_num_tokens, pad_to_multiple_of)
        return stock(self, new_num_tokens, pad_to_multiple_of, mean_resizing)

    resize_token_embeddings._knows_evopress = True  # type: ignore[attr-defined]
    PreTrainedModel.resize_token_embeddings = resize_token_embeddings  # type: ignore[method-assign]


def _make_room(
    model: Any, make_ends_dense: Callable[[Any], None], new: int | None, multiple: int | None
) -> None:
    rows = model.get_input_embeddings().num_embeddings
    new = rows if new is None else new
    if isinstance(multiple, int) and multiple > 0:
        new = -(-new // multiple) * multiple
    if new == rows:
        return
    before = _bytes(model)
    make_ends_dense(model)
    logger.warning(
        "the vocabulary goes from %d to %d tokens, so embedding and head are dense from now "
        "on: %.1f MB more; compress the saved model again to pack them",
        rows,
        new,
        (_bytes(model) - before) / 1e6,
    )


def _ends(model: Any) -> list[Any]:
    found = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end for end in found if end is not None]


def _bytes(model: Any) -> int:
    found = {
        id(tensor): tensor
        for end in _ends(model)
        for tensor in (end.state.values() if isinstance(end, PackedWeight) else [end.weight])
    }
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())
