"""The interface of a fitness: loss of compressed logits against the dense model's targets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

Targets = Mapping[str, Tensor]
Loss = float | Tensor  # a tensor without dimensions stays on its device until a round ends

SLICE = 256  # positions per slice: a float32 copy of 256 x 150k logits is 150 MB
_ROWS = 32  # of logits at a time: a few MB, which stay in the cache of a CPU core


class Fitness(ABC):
    """A loss per token that the search minimises.

    Targets are made from the dense model once per sequence and kept for the whole search, so
    they are small. The head is run on slices of positions, and a sequence's loss is the sum of
    what its slices add, so that logits of a whole sequence are never in memory.
    """

    name: ClassVar[str]
    needs_whole = False  # whether logits and targets are needed for a whole sequence at once
    judges_models = False  # it has `of_model`, and looks at no search tokens
    columns = 0  # of the vocabulary that it samples; above 0 it has `share_at` and `sample`
    keeps_targets = True  # False: too large to keep, made anew for each round

    @abstractmethod
    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return what to keep of the dense model's logits (n, V) on n positions of a sequence.

        tokens (n,): the tokens at these positions. All tensors have n rows.
        """

    @abstractmethod
    def share(self, logits: Tensor, tokens: Tensor, targets: Targets, part: slice) -> Loss:
        """Return what the positions `part` add to the mean loss of a sequence; lower is better.

        logits (n, V) of these positions, tokens (T,) and targets of the whole sequence. A tensor
        (see `total`) rather than a float lets a GPU go on while the CPU prepares what follows.
        """

    def of_model(self, model: Any) -> float:
        """Return the loss of a whole model that computes at a plan's levels."""
        raise TypeError(f"fitness {self.name} judges logits, not models")

    def sample(self, n_vocab: int) -> Tensor:
        """Return the columns (m,) of the vocabulary that `share_at` wants besides its own."""
        raise TypeError(f"fitness {self.name} samples no columns")

    def share_at(
        self, kept: Tensor, sampled: Tensor, tokens: Tensor, targets: Targets, part: slice
    ) -> Loss:
        """Return `share` from logits at some columns: (n, k) at targets["ids"], (n, m) sampled."""
        raise TypeError(f"fitness {self.name} needs all columns")

    def loss(self, logits: Tensor, tokens: Tensor, targets: Targets) -> float:
        """Return the mean loss per predicted token of compressed logits (T, V)."""
        parts = self.parts(len(tokens))
        return float(sum(self.share(logits[part], tokens, targets, part) for part in parts))

    def __repr__(self) -> str:
        """Return what decides the numbers: searches with the same words continue each other."""
        return f"{self.name} {vars(self)}"

    def parts(self, n_tokens: int) -> list[slice]:
        """Return the slices of positions to take one after the other."""
        step = n_tokens if self.needs_whole else SLICE
        return [slice(i, min(i + step, n_tokens)) for i in range(0, n_tokens, step)]


def total(terms: Tensor) -> Tensor:
    """Return the sum of terms in float64, on their device."""
    return terms.sum(dtype=torch.float64)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Return log sum_j exp(logits_ij), (n, 1) float32, of logits (n, V) of any dtype.

    In slices that stay in the cache: on one core twice as fast as torch.logsumexp.
    """
    made = []
    for rows in logits.split(_ROWS):
        rows = rows.float()
        top = rows.amax(-1, keepdim=True)
        made.append((rows - top).exp_().sum(-1, keepdim=True).log_().add_(top))
    return torch.cat(made)
