"""What a fitness is: a loss of compressed logits against compact targets of the dense model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

Targets = Mapping[str, Tensor]

SLICE = 256  # positions per slice: a float32 copy of 256 x 150k logits is 150 MB


class Fitness(ABC):
    """A loss per token that the search minimises.

    Targets are made once per sequence from the dense model and kept for the whole search, so
    they are small; the loss sees them with the compressed model's logits.
    """

    name: ClassVar[str]

    @abstractmethod
    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return what to keep of the dense model on one sequence: logits (T, V), tokens (T,)."""

    @abstractmethod
    def loss(self, logits: Tensor, tokens: Tensor, targets: Targets) -> float:
        """Return the mean loss per predicted token of compressed logits (T, V); lower is better."""
