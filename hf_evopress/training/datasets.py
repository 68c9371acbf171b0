"""The text that a model is trained on, and what its teacher says of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters.repair import load, tokenizer_of
from ..base.devices import find_device, has_bfloat16
from ..base.progress import Progress
from ..calibration.data import load_tokens
from ..calibration.own_text import write_sequences
from ..calibration.text import bos_of
from ..refine.distillation import Sequences, Targets, precompute_targets

if TYPE_CHECKING:
    from .tune import Tuning


def datasets_of(
    model: str, data: Sequence[str], settings: Tuning, where: Path, progress: Progress | None
) -> tuple[Any, Targets | None]:
    """Return the training set and, with a teacher, a held-out one.

    The teacher's targets are on disk: it leaves memory again.
    """
    n, tokenizer = settings.sequences, tokenizer_of(model)
    tokens = load_tokens(
        list(data),
        tokenizer,
        n_sequences=n + (settings.heldout if settings.teacher else 0),
        seq_len=settings.seq_len,
        seed=settings.seed,
        column=settings.column,
    )
    if settings.teacher is None:
        return Sequences(tokens), None
    learn = tokens[:n]
    if settings.written:
        learn = torch.cat([learn, _written(learn, tokenizer, settings, where, progress)])
    teacher = load(settings.teacher)
    parts = {"targets": learn, "heldout": tokens[n:]}
    train, heldout = (
        Targets(precompute_targets(teacher, ids, where / name, progress=progress))
        for name, ids in parts.items()
    )
    return train, heldout


def _written(
    learn: Tensor, tokenizer: Any, settings: Tuning, where: Path, progress: Progress | None
) -> Tensor:
    """Return what the teacher writes, in bfloat16 where that is faster: its words are its own."""
    assert settings.teacher is not None  # Tuning says so
    writer = load(settings.teacher, dtype=torch.bfloat16 if has_bfloat16(find_device()) else None)
    bos, seed = bos_of(tokenizer), settings.seed
    return write_sequences(
        writer, learn, settings.written, where / "written", bos=bos, seed=seed, progress=progress
    )
