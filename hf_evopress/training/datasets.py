"""The text that a model is trained on, and what its teacher says of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..adapters.by_name import is_gguf, load, pinned, plan_of, tokenizer_of
from ..base.devices import find_device, has_bfloat16
from ..base.progress import Progress
from ..calibration.data import load_tokens
from ..calibration.own_text import write_sequences
from ..calibration.text import bos_of
from ..models.source import read_config
from ..refine.distillation import Sequences, Targets, precompute_targets


def datasets_of(
    model: str,
    data: Sequence[str],
    where: Path,
    *,
    teacher: str | None,
    sequences: int,
    heldout: int,
    written: int,
    seq_len: int,
    seed: int,
    column: str,
    progress: Progress | None,
) -> tuple[Any, Targets | None]:
    """Return the training set and, with a teacher, a held-out one.

    The teacher's targets are on disk: it leaves memory again. written: sequences that it writes
    itself, to be learnt from as well.
    """
    tokenizer = tokenizer_of(model)
    tokens = load_tokens(
        list(data),
        tokenizer,
        n_sequences=sequences + (heldout if teacher else 0),
        seq_len=seq_len,
        seed=seed,
        column=column,
    )
    if teacher is None:
        return Sequences(tokens), None
    if not is_gguf(model):
        teacher = pinned(teacher, plan_of(read_config(model)))
    learn = tokens[:sequences]
    if written:
        # in bfloat16 where that is faster: the teacher's words are its own
        writer = load(teacher, dtype=torch.bfloat16 if has_bfloat16(find_device()) else None)
        own: dict[str, Any] = {"bos": bos_of(tokenizer), "seed": seed, "progress": progress}
        learn = torch.cat(
            [learn, write_sequences(writer, learn, written, where / "written", **own)]
        )
        del writer
    dense = load(teacher)
    parts = {"targets": learn, "heldout": tokens[sequences:]}
    train, unseen = (
        Targets(precompute_targets(dense, ids, where / name, progress=progress))
        for name, ids in parts.items()
    )
    return train, unseen
