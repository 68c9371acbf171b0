"""Logits at some columns of the vocabulary, without computing the others.

The head is a quarter of the work on small models with large vocabularies. The model's own code
runs up to its last linear layer, which is then multiplied only where it is looked at.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .stream import BlockStream

_WEIGHTS = 8  # of heads at other levels, whose sampled columns are kept
_POSITIONS = 64  # whose columns are gathered at once: k rows of the head for each


class SomeColumns:
    """The head of a model whose logits are those of one linear layer, unscaled and uncapped."""

    def __init__(self, model: Any, stream: BlockStream) -> None:
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ValueError(f"{type(model).__name__} has no linear head; leave out kl's columns")
        self.head, self.stream = head, stream
        self._sampled: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def inputs(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return what the linear layer gets (n, d), from the last block's output (1, n, d)."""
        return head_inputs(self.head, self.stream, ids, hidden)[0]

    def at(self, x: Tensor, columns: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the logits (n, k) of x (n, d) at each position's own `columns` (n, k).

        weight: another than the head's own, of the same shape.
        """
        weight, bias = self.head.weight if weight is None else weight, self.head.bias
        made = [
            torch.bmm(weight[index], rows[:, :, None])[:, :, 0]
            for rows, index in zip(x.split(_POSITIONS), columns.split(_POSITIONS), strict=True)
        ]
        logits = torch.cat(made)
        return logits if bias is None else logits + bias[columns]

    def sampled(self, x: Tensor, columns: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the logits (n, m) of x (n, d) at the same `columns` (m,) for all positions."""
        weight, bias = self.head.weight if weight is None else weight, self.head.bias
        known = self._sampled.get(id(weight))
        if known is None or known[0] is not weight:
            # the columns stay the same for a whole search, and weights are few
            known = weight, weight[columns], None if bias is None else bias[columns]
            self._sampled = {**dict(list(self._sampled.items())[-_WEIGHTS:]), id(weight): known}
        return nn.functional.linear(x, *known[1:])

    def check(self, ids: Tensor, hidden: Tensor, logits: Tensor) -> None:
        """Raise ValueError unless the columns are those of the whole `logits` (n, V)."""
        columns = logits.topk(4).indices
        found = self.at(self.inputs(ids, hidden), columns).float()
        if not torch.allclose(found, logits.gather(-1, columns).float(), rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"{type(self.stream.model).__name__} changes the logits after its linear head "
                "(a scale or a soft cap); leave out kl's columns"
            )


def head_inputs(head: nn.Module, stream: BlockStream, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return what a linear head gets (batch, seq, d), without the product with its weight."""
    seen: list[Tensor] = []

    def passed_on(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    before = head.__dict__.get("forward")
    head.forward = passed_on  # type: ignore[method-assign]
    try:
        stream.head(ids, hidden)
    finally:
        if before is None:
            del head.forward
        else:
            head.forward = before  # type: ignore[method-assign]
    return seen[0]
