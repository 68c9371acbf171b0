"""KL divergence from the dense model, per token, in nats: the default fitness.

The teacher's top-k probabilities are kept, and all the rest of the vocabulary is one bucket:

    sum_{i in top-k} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest)

By the data-processing inequality this is a lower bound of the full KL, and unlike the published
sparse KL (renormalised inside the top-k) it sees probability that leaks out of the top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Fitness, Targets, log_sum_exp

_TINY = 1e-12


class KL(Fitness):
    """KL(dense || compressed) over `top_k` tokens and one bucket; top_k=0 keeps all of them."""

    name = "kl"

    def __init__(self, *, top_k: int = 256) -> None:
        if top_k < 0:
            raise ValueError(f"kl needs top_k >= 0 (0: the whole vocabulary), got {top_k}")
        self.top_k = top_k

    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return {ids (n, k) int32, log_p (n, k) float32} of the dense model."""
        k = min(self.top_k or logits.shape[-1], logits.shape[-1])
        values, index = logits.float().topk(k)
        return {"ids": index.int(), "log_p": values - log_sum_exp(logits)}

    def share(self, logits: Tensor, tokens: Tensor, targets: Targets, part: slice) -> float:
        ids, log_p = targets["ids"][part].long(), targets["log_p"][part]
        log_q = logits.gather(-1, ids).float() - log_sum_exp(logits)
        return float(_bucketed(log_p, log_q).sum(dtype=torch.float64)) / len(tokens)


def _bucketed(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the KL per position (T,) of k log-probabilities and the bucket that is left."""
    p, q = log_p.exp(), log_q.exp()
    kept = (p * (log_p - log_q)).sum(-1)
    # sums of k floats may pass 1 by rounding: the bucket is then empty
    p_rest = (1 - p.sum(-1)).clamp_min(_TINY)
    q_rest = (1 - q.sum(-1)).clamp_min(_TINY)
    return kept + p_rest * (p_rest.log() - q_rest.log())
