"""1 - cosine between the vectors of the dense and the compressed model: for embedding models.

Vectors come normalised from the model (see `models.classes`), so that it is half the squared
distance too.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .base import Fitness, Loss, Targets, total


class Cosine(Fitness):
    """Mean of 1 - cosine over the rows that a model puts out."""

    name = "cosine"

    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return {vectors (n, d)} of the dense model."""
        return {"vectors": logits.float()}

    def share(self, logits: Tensor, tokens: Tensor, targets: Targets, part: slice) -> Loss:
        dense = targets["vectors"][part].to(logits.device)
        return total(1 - F.cosine_similarity(logits.float(), dense, dim=-1)) / len(tokens)
