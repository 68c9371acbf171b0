"""Targets and loss of distillation: the dense model's top predictions per token.

The teacher's top-k log-probabilities and one bucket for all the rest, as in `fitness.kl`: a lower
bound of the full KL that sees probability leak out of the top-k, at 8 k bytes per token instead
of the whole vocabulary. Targets can be made once and read from disk: the dense model then need
not be in memory beside the one that is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.fingerprint import claim, model_fingerprint, tensor_fingerprint
from ..base.reading import ANEW, read_object, reading
from ..base.resources import atomic_path
from ..calibration.input_moments import check_tokens
from ..models.stream import BlockStream
from ..scoring.fitness.kl import KL

TOP_K = 64
_PER_FILE = 16  # sequences


def teacher_targets(logits: Tensor, top_k: int = TOP_K) -> tuple[Tensor, Tensor]:
    """Return ids (..., T, k) int32 and log-probabilities (..., T, k) float32 of the teacher."""
    made = [KL(top_k=top_k).targets(row, row) for row in logits.flatten(0, -3)]
    ids, log_p = (torch.stack([targets[key] for targets in made]) for key in ("ids", "log_p"))
    return ids.view(*logits.shape[:-1], -1), log_p.view(*logits.shape[:-1], -1)


def distillation_loss(
    logits: Tensor, ids: Tensor, log_p: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Return the mean KL(teacher || student) in nats per token, with its gradient.

    logits (..., T, V) of the student; ids, log_p (..., T, k) of the teacher; mask (..., T) bool
    of the positions that count.
    """
    if ids.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"targets of shape {tuple(ids.shape)} are not for logits of {tuple(logits.shape)}"
        )
    logits, ids = logits.float(), ids.long()
    total = logits.logsumexp(-1, keepdim=True)
    log_q = logits.gather(-1, ids) - total
    p = log_p.exp()
    loss = (p * (log_p - log_q)).sum(-1)
    if ids.shape[-1] < logits.shape[-1]:
        # the rest from its own logits: 1 - sum(q) has no digits left where the student is sure
        rest = logits.scatter(-1, ids, float("-inf")).logsumexp(-1) - total[..., 0]
        p_rest = (1 - p.sum(-1)).clamp_min(1e-12)
        loss = loss + p_rest * (p_rest.log() - rest)
    if mask is None:
        return loss.mean()
    return (loss * mask).sum() / mask.sum().clamp_min(1)


def precompute_targets(
    teacher: Any,
    tokens: Tensor,
    folder: str | Path,
    *,
    top_k: int = TOP_K,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Return `folder` after writing the teacher's targets of tokens (n_sequences, seq_len).

    One file per 16 sequences, whole or absent: a killed run goes on. Raises ValueError where the
    folder holds targets of another teacher or text.
    """
    check_tokens(tokens, teacher.get_input_embeddings().weight.shape[0])
    folder = Path(folder)
    made_from = {
        "teacher": model_fingerprint(teacher),
        "tokens": tensor_fingerprint(tokens),
        "top_k": top_k,
        "shape": list(tokens.shape),
    }
    claim(folder, made_from, what="distillation targets")
    parts = tokens.split(_PER_FILE)
    for number, part in enumerate(parts):
        if not _file(folder, number).is_file():
            with torch.no_grad(), BlockStream(teacher).whole():
                made = [
                    teacher_targets(teacher(input_ids=row[None], use_cache=False).logits, top_k)
                    for row in part.to(teacher.device)
                ]
            tensors = {
                "input_ids": part,
                "target_ids": torch.cat([ids for ids, _ in made]).cpu(),
                "target_log_p": torch.cat([log_p for _, log_p in made]).cpu(),
            }
            with atomic_path(_file(folder, number)) as temporary:
                save_file(tensors, temporary)
        if progress:
            progress("teacher", number + 1, len(parts))
    return folder


class Targets(torch.utils.data.Dataset):
    """Token sequences with their teacher's targets, read from a folder as they are asked for.

    Items are {input_ids, labels (T,), target_ids, target_log_p (T, k)}; default collators stack
    them, and DistillationTrainer knows what they are.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "index.json"
        if not index.is_file():
            raise FileNotFoundError(f"no targets at {folder}: run precompute_targets first")
        with reading(index, way_out=ANEW):
            self.shape = read_object(index)["made_from"]["shape"]
        n_files = -(-self.shape[0] // _PER_FILE)
        missing = [n for n in range(n_files) if not _file(self.folder, n).is_file()]
        if missing:
            raise ValueError(
                f"the targets at {folder} are not finished: {len(missing)} of {n_files} files are "
                "missing; run precompute_targets again to go on"
            )

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(f"sequence {i} of {len(self)}")
        path = _file(self.folder, i // _PER_FILE)
        with reading(path, way_out=ANEW), safe_open(path, framework="pt") as file:
            keys = ("input_ids", "target_ids", "target_log_p")
            item = {key: file.get_slice(key)[i % _PER_FILE] for key in keys}
        return {**item, "labels": item["input_ids"].clone()}


@torch.no_grad()
def divergence(model: Any, targets: Targets) -> float:
    """Return the mean KL from the teacher that `targets` are of, in nats per token."""
    was_training = model.training
    model.eval()
    losses = []
    for i in range(len(targets)):
        item = {key: value[None].to(model.device) for key, value in targets[i].items()}
        logits = model(input_ids=item["input_ids"], use_cache=False).logits
        losses.append(distillation_loss(logits, item["target_ids"], item["target_log_p"]))
    model.train(was_training)
    return float(torch.stack(losses).double().mean())


class Sequences(torch.utils.data.Dataset):
    """Token sequences (n, seq_len) as items {input_ids, labels}."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.tokens[i].clone()}


def _file(folder: Path, number: int) -> Path:
    return folder / f"targets_{number:05d}.safetensors"
