"""Cross-entropy on the text itself, per token, in nats (its exponential is the perplexity).

It needs no dense model, but rewards fitting the search text rather than keeping the model's
behaviour; the EvoPress paper finds KL better or equal throughout.
"""

from __future__ import annotations

from torch import Tensor

from .base import Fitness, Loss, Targets, log_sum_exp, total


class Perplexity(Fitness):
    """Mean negative log-likelihood of the next token."""

    name = "perplexity"

    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return nothing: the text is the target."""
        return {}

    def share(self, logits: Tensor, tokens: Tensor, targets: Targets, part: slice) -> Loss:
        nexts = tokens[part.start + 1 : part.stop + 1].to(logits.device)  # the last has none
        logits = logits[: len(nexts)]
        if not len(nexts):
            return 0.0
        log_q = logits.gather(-1, nexts[:, None]).float() - log_sum_exp(logits)
        return -total(log_q) / (len(tokens) - 1)
