"""KL divergence from the dense model, per token, in nats: the default fitness.

The teacher's top-k probabilities are kept, and all the rest of the vocabulary is one bucket:

    sum_{i in top-k} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest)

By the data-processing inequality this is a lower bound of the full KL, and unlike the published
sparse KL (renormalised inside the top-k) it sees probability that leaks out of the top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import SLICE, Fitness, Targets

_TINY = 1e-12


class KL(Fitness):
    """KL(dense || compressed) over `top_k` tokens and one bucket; top_k=0 keeps all of them."""

    name = "kl"

    def __init__(self, *, top_k: int = 256) -> None:
        if top_k < 0:
            raise ValueError(f"kl needs top_k >= 0 (0: the whole vocabulary), got {top_k}")
        self.top_k = top_k

    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return {ids (T, k) int32, log_p (T, k) float32} of the dense model."""
        k = min(self.top_k or logits.shape[-1], logits.shape[-1])
        ids, log_p = [], []
        for part in logits.split(SLICE):
            part = part.float()
            values, index = part.topk(k)
            log_p.append(values - part.logsumexp(-1, keepdim=True))
            ids.append(index.int())
        return {"ids": torch.cat(ids), "log_p": torch.cat(log_p)}

    def loss(self, logits: Tensor, tokens: Tensor, targets: Targets) -> float:
        total = 0.0
        for part, ids, log_p in zip(
            logits.split(SLICE),
            targets["ids"].split(SLICE),
            targets["log_p"].split(SLICE),
            strict=True,
        ):
            part = part.float()
            log_q = part.gather(-1, ids.long()) - part.logsumexp(-1, keepdim=True)
            total += float(_bucketed(log_p, log_q).sum(dtype=torch.float64))
        return total / logits.shape[0]


def _bucketed(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the KL per position (T,) of k log-probabilities and the bucket that is left."""
    p, q = log_p.exp(), log_q.exp()
    kept = (p * (log_p - log_q)).sum(-1)
    # sums of k floats may pass 1 by rounding: the bucket is then empty
    p_rest = (1 - p.sum(-1)).clamp_min(_TINY)
    q_rest = (1 - q.sum(-1)).clamp_min(_TINY)
    return kept + p_rest * (p_rest.log() - q_rest.log())
