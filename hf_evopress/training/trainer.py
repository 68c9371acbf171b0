"""DistillationTrainer: transformers' Trainer with the dense model as the teacher.

    trainer = DistillationTrainer(model, args, train_dataset=Sequences(tokens), teacher=dense)
    trainer = DistillationTrainer(model, args, train_dataset=Targets("targets"))

All else is Trainer's: adapters, resuming, gradient checkpointing, bf16, evaluation. To distil
with another trainer, such as TRL's SFTTrainer, mix it in:

    class DistillationSFTTrainer(Distillation, SFTTrainer): ...
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer

from ..refine.distillation import TOP_K, distillation_loss, teacher_targets
from .tunable import check_trainable

_TARGETS = ("target_ids", "target_log_p")


class Distillation:
    """Makes the loss of a Trainer the KL divergence from a teacher, in nats per token.

    teacher: the dense model, or None where the dataset brings targets (`distill.Targets`).
    top_k: how many of the teacher's tokens count on their own; the others are one bucket.
    task_weight: how much of the usual cross entropy on the labels is added.
    """

    def __init__(
        self,
        *args: Any,
        teacher: Any = None,
        top_k: int = TOP_K,
        task_weight: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_trainable(self.model)  # type: ignore[attr-defined]
        if teacher is not None:
            _check_vocabulary(teacher, self.model)  # type: ignore[attr-defined]
            teacher.eval().requires_grad_(False)
        self.teacher, self.top_k, self.task_weight = teacher, top_k, task_weight
        # the loss is a mean per batch: gradient accumulation has to divide it
        self.model_accepts_loss_kwargs = False

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        self._signature_columns: list[str]
        self._signature_columns += [t for t in _TARGETS if t not in self._signature_columns]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        ids, log_p = (inputs.pop(name, None) for name in _TARGETS)
        if ids is None:
            if self.teacher is None:
                raise ValueError(
                    "distillation needs a teacher: pass teacher=<the dense model>, or a dataset "
                    "with its targets (hf_evopress.refine.distillation.Targets)"
                )
            ids, log_p = self._ask(inputs)
        outputs = model(**inputs, use_cache=False)
        mask = _mask(inputs, labels)
        loss = distillation_loss(outputs.logits, ids, log_p, mask)
        if self.task_weight and labels is not None:
            loss = loss + self.task_weight * _cross_entropy(outputs.logits, labels)
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _ask(self, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        device = inputs["input_ids"].device
        if self.teacher.device != device:
            self.teacher.to(device)
        return teacher_targets(self.teacher(**inputs, use_cache=False).logits, self.top_k)


class DistillationTrainer(Distillation, Trainer):
    """Trainer whose loss is the KL divergence from the dense model; see `Distillation`."""


def _check_vocabulary(teacher: Any, model: Any) -> None:
    sizes = [m.config.get_text_config(decoder=True).vocab_size for m in (teacher, model)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the teacher has a vocabulary of {sizes[0]}, the model of {sizes[1]}: distil from "
            "the model that this one was compressed from"
        )


def _mask(inputs: dict[str, Any], labels: Tensor | None) -> Tensor | None:
    """Return the positions whose prediction counts: those before a label, without padding."""
    if labels is not None:
        return F.pad(labels[..., 1:] != -100, (0, 1), value=False)
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.bool()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(
        logits[..., :-1, :].float().flatten(0, -2), labels[..., 1:].flatten(), ignore_index=-100
    )
