"""Compare models that write no text with the dense one: by what their class puts out.

Labels and masked tokens by KL(dense || model) and the share of equal first choices, per text or per
token; vectors by 1 - cosine. Texts are non-overlapping windows, as in `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.progress import Progress
from ..models.classes import call
from .evaluate import Report

Outputs = Callable[[Tensor], Tensor]  # ids (1, window) -> outputs (1, rows, columns)


@torch.no_grad()
def compare_outputs(
    models: Mapping[str, nn.Module | Outputs],
    dense: nn.Module | Outputs,
    windows: Tensor,
    *,
    is_vector: bool,
    rows: Callable[[Tensor], Tensor] | None = None,
    window: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Report]:
    """Return one report per model on token ids (n, window), against one pass of `dense` each.

    rows: the rows of a window (window,) that count, by default all. window: its tokens, as a report
    says them, where not all of a window are tokens.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number, ids in enumerate(windows):
        kept = slice(None) if rows is None else rows(ids)
        target = _rows(dense, ids)[kept]
        for name, model in models.items():
            found_rows = target if model is dense else _rows(model, ids)[kept]
            found[name].append(_distance(found_rows, target, is_vector))
        if progress:
            progress("evaluate", number + 1, len(windows))
    reports = {}
    for name, pairs in found.items():
        first, second = (tuple(column) for column in zip(*pairs, strict=True))
        scores: dict[str, Any] = (
            {"cosine_windows": first}
            if is_vector
            else {"kl_windows": first, "agreement_windows": second}
        )
        reports[name] = Report(window=window or windows.shape[1], nll_windows=(), **scores)
    return reports


def _rows(model: nn.Module | Outputs, ids: Tensor) -> Tensor:
    if not isinstance(model, nn.Module):
        return model(ids[None])[0]
    device = next(model.get_input_embeddings().parameters()).device  # type: ignore[operator]
    return call(model, ids[None].to(device))[0]


def _distance(rows: Tensor, target: Tensor, is_vector: bool) -> tuple[float, float]:
    """Return 1 - cosine and 0, or KL and the share of equal first choices: means over rows."""
    rows, target = rows.float(), target.to(rows.device).float()
    if is_vector:
        return float((1 - F.cosine_similarity(rows, target, dim=-1)).mean()), 0.0
    log_p, log_q = target.log_softmax(-1), rows.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return float(kl), float((log_p.argmax(-1) == log_q.argmax(-1)).float().mean())
