"""KL divergence from the dense model, per token, in nats: the default fitness.

The teacher's top-k probabilities are kept, and all the rest of the vocabulary is one bucket:

    sum_{i in top-k} p_i log(p_i / q_i) + p_rest log(p_rest / q_rest)

By the data-processing inequality this is a lower bound of the full KL, and unlike the published
sparse KL (renormalised inside the top-k) it sees probability that leaks out of the top-k.

With `columns`, the head is computed only at the top-k and at so many random columns, the same
for all; the rest of the normaliser is estimated by ratio to the dense model's, which is known:

    Z_rest(q) ~ Z_rest(p) * sum_{sampled} exp(q_j) / sum_{sampled} exp(p_j)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Fitness, Loss, Targets, log_sum_exp, total

_TINY = 1e-12


class KL(Fitness):
    """KL(dense || compressed) over `top_k` tokens and one bucket; top_k=0 keeps all of them."""

    name = "kl"

    def __init__(self, *, top_k: int = 256, columns: int = 0) -> None:
        if top_k < 0:
            raise ValueError(f"kl needs top_k >= 0 (0: the whole vocabulary), got {top_k}")
        if columns < 0 or (columns and not top_k):
            raise ValueError(f"kl samples columns >= 0 beside its top_k > 0, got {columns}")
        self.top_k, self.columns = top_k, columns
        # where each column is in the sample; made when the vocabulary is first seen
        self._where: tuple[Tensor, Tensor] | None = None

    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return {ids (n, k) int32, log_p (n, k) float32} of the dense model.

        With columns also {rest (n, 1)}: log of what the sum over sampled columns stands for.
        """
        k = min(self.top_k or logits.shape[-1], logits.shape[-1])
        values, index = logits.float().topk(k)
        log_z = log_sum_exp(logits)
        made = {"ids": index.int(), "log_p": values - log_z}
        if self.columns:
            sample = self.sample(logits.shape[-1]).to(logits.device)
            sampled = self._others(logits[:, sample].float(), index)
            p_rest = (1 - made["log_p"].exp().sum(-1, keepdim=True)).clamp_min(_TINY)
            made["rest"] = log_z + p_rest.log() - sampled.logsumexp(-1, keepdim=True)
        return made

    def share(self, logits: Tensor, tokens: Tensor, targets: Targets, part: slice) -> Loss:
        ids, log_p = targets["ids"][part].long(), targets["log_p"][part]
        log_q = logits.gather(-1, ids).float() - log_sum_exp(logits)
        return total(_bucketed(log_p, log_q)) / len(tokens)

    def sample(self, n_vocab: int) -> Tensor:
        """Return the sampled columns (m,), the same each time."""
        if self._where is None:
            generator = torch.Generator().manual_seed(0)
            sample = torch.randperm(n_vocab, generator=generator)[: self.columns].sort().values
            where = torch.full((n_vocab,), len(sample))  # of each column in the sample; not: m
            where[sample] = torch.arange(len(sample))
            self._where = sample, where
        return self._where[0]

    def __repr__(self) -> str:
        return f"{self.name}:top_k={self.top_k},columns={self.columns}"

    def share_at(
        self, kept: Tensor, sampled: Tensor, tokens: Tensor, targets: Targets, part: slice
    ) -> Loss:
        ids, log_p = targets["ids"][part].long(), targets["log_p"][part]
        others = self._others(sampled.float(), ids).logsumexp(-1, keepdim=True)
        rest = targets["rest"][part] + others
        log_z = torch.logaddexp(kept.float().logsumexp(-1, keepdim=True), rest)
        log_q = kept.float() - log_z
        return total(_bucketed(log_p, log_q)) / len(tokens)

    def _others(self, sampled: Tensor, ids: Tensor) -> Tensor:
        """Return the logits at sampled columns (n, m) with -inf at those among `ids` (n, k)."""
        if self._where is None:
            raise ValueError("targets come first: they say how large the vocabulary is")
        where = self._where[1].to(ids.device)[ids.long()]
        padded = torch.nn.functional.pad(sampled, (0, 1))
        return padded.scatter(-1, where, -torch.inf)[:, :-1]


def _bucketed(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the KL per position (T,) of k log-probabilities and the bucket that is left."""
    p, q = log_p.exp(), log_q.exp()
    kept = (p * (log_p - log_q)).sum(-1)
    # sums of k floats may pass 1 by rounding: the bucket is then empty
    p_rest = (1 - p.sum(-1)).clamp_min(_TINY)
    q_rest = (1 - q.sum(-1)).clamp_min(_TINY)
    return kept + p_rest * (p_rest.log() - q_rest.log())
