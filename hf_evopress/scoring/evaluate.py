"""Evaluate models: perplexity, KL divergence from the dense model, top-1 agreement.

The protocol of the GPTQ papers: the whole text is tokenised once and cut into non-overlapping
windows; what is left over at the end is not used; in each window, every token but the first is
predicted from those before it in the window. Perplexity is exp of the mean negative
log-likelihood of all these predictions. KL(dense || model) and top-1 agreement are means over
the same predictions, over the whole vocabulary. Softmax in float32, sums in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.progress import Progress

Logits = Callable[[Tensor], Tensor]  # ids (1, window) -> logits (1, window, vocabulary)

WINDOW = 2048
SLICE = 256  # positions at a time in float32: 50 MB for a vocabulary of 50 000


@dataclass(frozen=True)
class Report:
    """What one model scored on one text; `*_windows` hold one value per window.

    nll_windows: mean negative log-likelihood in nats, dense_nll_windows that of the dense model.
    kl_windows: mean KL(dense || model) in nats per token. agreement_windows: share of
    predictions in which both models rank the same token first.
    cosine_windows: 1 - cosine between the vectors of an embedding model and of the dense one.
    Of a model that writes no text nll_windows is empty, and there is no perplexity (NaN); without
    a dense model to compare with the others are.
    """

    window: int
    nll_windows: tuple[float, ...]
    dense_nll_windows: tuple[float, ...] = ()
    kl_windows: tuple[float, ...] = ()
    agreement_windows: tuple[float, ...] = ()
    cosine_windows: tuple[float, ...] = ()

    @property
    def n_tokens(self) -> int:
        """How many predictions were scored."""
        if not self.nll_windows:
            return (len(self.kl_windows) + len(self.cosine_windows)) * self.window
        return len(self.nll_windows) * (self.window - 1)

    @property
    def perplexity(self) -> float:
        return _exp(_mean(self.nll_windows)) if self.nll_windows else math.nan

    @property
    def dense_perplexity(self) -> float | None:
        return _exp(_mean(self.dense_nll_windows)) if self.dense_nll_windows else None

    @property
    def kl_nats(self) -> float | None:
        return _mean(self.kl_windows) if self.kl_windows else None

    @property
    def cosine_distance(self) -> float | None:
        return _mean(self.cosine_windows) if self.cosine_windows else None

    @property
    def kl_standard_error(self) -> float | None:
        """Standard error of kl_nats over windows; None with fewer than two."""
        return _standard_error(self.kl_windows)

    @property
    def top1_agreement(self) -> float | None:
        return _mean(self.agreement_windows) if self.agreement_windows else None

    def kl_difference(self, other: Report) -> tuple[float, float | None]:
        """Return mean and standard error of self - other in KL, paired window by window.

        >>> a, b = Report(9, (), (), (0.5, 0.7)), Report(9, (), (), (0.4, 0.6))
        >>> round(a.kl_difference(b)[0], 6)
        0.1
        """
        if (self.window, len(self.kl_windows)) != (other.window, len(other.kl_windows)):
            raise ValueError(
                f"reports on {len(self.kl_windows)} windows of {self.window} and "
                f"{len(other.kl_windows)} of {other.window} tokens cannot be paired"
            )
        if not self.kl_windows:
            raise ValueError("reports without a dense model hold no KL; evaluate against one")
        paired = [a - b for a, b in zip(self.kl_windows, other.kl_windows, strict=True)]
        return _mean(paired), _standard_error(paired)

    def to_dict(self) -> dict[str, Any]:
        """Return means and per-window values as JSON values; what was not measured is left out."""
        means = {
            "perplexity": self.perplexity if self.nll_windows else None,
            "dense_perplexity": self.dense_perplexity,
            "kl_nats": self.kl_nats,
            "kl_standard_error": self.kl_standard_error,
            "top1_agreement": self.top1_agreement,
            "n_tokens": self.n_tokens,
        }
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {k: v for k, v in (means | values).items() if v is not None and v != []}


def perplexity(
    model: nn.Module | Logits,
    tokens: Tensor,
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> float:
    """Return the perplexity of `tokens` (n,), a whole text, in windows of `window` tokens."""
    reports = compare_many(
        {"model": model}, None, tokens, window=window, max_windows=max_windows, progress=progress
    )
    return reports["model"].perplexity


def compare(
    model: nn.Module | Logits,
    dense: nn.Module | Logits | None,
    tokens: Tensor,
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Return what `model` scores on `tokens` (n,), and how far from `dense` it is."""
    reports = compare_many(
        {"model": model}, dense, tokens, window=window, max_windows=max_windows, progress=progress
    )
    return reports["model"]


@torch.no_grad()
def compare_many(
    models: Mapping[str, nn.Module | Logits],
    dense: nn.Module | Logits | None,
    tokens: Tensor,
    *,
    window: int = WINDOW,
    max_windows: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Report]:
    """Return one report per model, all against one pass of `dense` over each window.

    A model is a transformers model or a function from ids (1, window) to logits (1, window,
    vocabulary), so that several plans can share one set of weights. Two models' logits of one
    window are in memory at a time.
    """
    everyone = [*models.values(), *([dense] if dense is not None else [])]
    windows = _windows(tokens, window, max_windows, everyone)
    scores: dict[str, list[_Score]] = {name: [] for name in models}
    dense_nll: list[float] = []
    with _evaluating(everyone):
        for number, ids in enumerate(windows):
            target = None if dense is None else _logits(dense, ids)
            if target is not None:
                dense_nll.append(_score("the dense model", ids, target, None).nll)
            for name, model in models.items():
                logits = target if target is not None and model is dense else _logits(model, ids)
                scores[name].append(_score(name, ids, logits, target))
            if progress:
                progress("evaluate", number + 1, len(windows))
    return {
        name: Report(
            window=window,
            nll_windows=tuple(s.nll for s in found),
            dense_nll_windows=tuple(dense_nll),
            kl_windows=tuple(s.kl for s in found if s.kl is not None),
            agreement_windows=tuple(s.agreement for s in found if s.agreement is not None),
        )
        for name, found in scores.items()
    }


@dataclass(frozen=True)
class _Score:
    """Means over the predictions of one window."""

    nll: float
    kl: float | None
    agreement: float | None


def _score(name: str, ids: Tensor, logits: Tensor, target: Tensor | None) -> _Score:
    """Return the score of logits (window, vocabulary); the last position predicts nothing."""
    if target is not None and target.shape != logits.shape:
        raise ValueError(
            f"{name} has a vocabulary of {logits.shape[-1]}, the dense model of "
            f"{target.shape[-1]}; compare a model with the one it was made from"
        )
    nll = kl = agreement = 0.0
    n = len(ids) - 1
    for start in range(0, n, SLICE):
        part = slice(start, min(start + SLICE, n))
        log_q = logits[part].float().log_softmax(-1)
        labels = ids[part.start + 1 : part.stop + 1].to(log_q.device)
        nll -= float(log_q.gather(-1, labels[:, None]).sum(dtype=torch.float64))
        if target is not None:
            log_p = target[part].to(log_q.device).float().log_softmax(-1)
            # a logit of -inf in both models: 0 * (-inf + inf) is nothing, not NaN
            terms = torch.where(log_p > -math.inf, log_p.exp() * (log_p - log_q), 0.0)
            kl += float(terms.sum(-1).sum(dtype=torch.float64))
            agreement += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
    if math.isnan(nll) or math.isnan(kl):
        raise ValueError(f"{name} gives NaN; check its weights and its dtype (float16 overflows)")
    return _Score(nll / n, *((None, None) if target is None else (kl / n, agreement / n)))


def _windows(
    tokens: Tensor,
    window: int,
    max_windows: int | None,
    models: list[nn.Module | Logits],
) -> Tensor:
    """Return the windows (n, window) of a text, or raise ValueError that says what to change."""
    if tokens.ndim != 1:
        raise ValueError(f"tokens of one text have one dimension, got shape {tuple(tokens.shape)}")
    if window < 2:
        raise ValueError(f"a window needs 2 tokens or more to predict one, got window={window}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows needs to be 1 or more, got {max_windows}")
    for model in models:
        config = getattr(model, "config", None)
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and window > longest:
            raise ValueError(f"window={window} is longer than the model's context of {longest}")
    n = len(tokens) // window
    if n == 0:
        raise ValueError(
            f"the text has {len(tokens)} tokens, one window needs {window}; "
            f"give more text or window={max(len(tokens), 2)}"
        )
    return tokens[: min(n, max_windows or n) * window].view(-1, window)


def _logits(model: nn.Module | Logits, ids: Tensor) -> Tensor:
    """Return the logits (window, vocabulary) of ids (window,)."""
    if not isinstance(model, nn.Module):
        return model(ids[None])[0]
    device = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
    if device.type != "meta":  # parts that accelerate keeps on disk; it moves inputs itself
        ids = ids.to(device)
    return model(input_ids=ids[None], use_cache=False).logits[0]


@contextmanager
def _evaluating(models: list[nn.Module | Logits]) -> Iterator[None]:
    """Switch off dropout for a while."""
    training = [m for m in models if isinstance(m, nn.Module) and m.training]
    for model in training:
        model.eval()
    try:
        yield
    finally:
        for model in training:
            model.train()


def _mean(values: tuple[float, ...] | list[float]) -> float:
    return math.fsum(values) / len(values)


def _standard_error(values: tuple[float, ...] | list[float]) -> float | None:
    if len(values) < 2:
        return None
    mean = _mean(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
