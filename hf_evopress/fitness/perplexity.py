"""Cross-entropy on the text itself, per token, in nats (its exponential is the perplexity).

It needs no dense model, but rewards fitting the search text rather than keeping the model's
behaviour; the EvoPress paper finds KL better or equal throughout.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from .base import SLICE, Fitness, Targets


class Perplexity(Fitness):
    """Mean negative log-likelihood of the next token."""

    name = "perplexity"

    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return nothing: the text is the target."""
        return {}

    def loss(self, logits: Tensor, tokens: Tensor, targets: Targets) -> float:
        total = 0.0
        for part, nexts in zip(logits[:-1].split(SLICE), tokens[1:].split(SLICE), strict=True):
            total += float(F.cross_entropy(part.float(), nexts, reduction="sum"))
        return total / (tokens.shape[0] - 1)
