"""Short runs of distillation, and the models that they train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainingArguments

from hf_evopress.refine.distillation import Sequences
from hf_evopress.training.trainer import DistillationTrainer


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    """Return the settings of a run of 40 steps on a CPU, with some changes."""
    settings: dict[str, Any] = {
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "report_to": "none",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(out), **{**settings, **changes})


def train(
    model: Any, dense: Any, tokens: Tensor, out: Path, resume: str | None = None, **changes: Any
) -> list[float]:
    """Train model to do as dense does, 40 steps unless changed; return the loss of each step."""
    args, data = arguments(out, **changes), Sequences(tokens)
    trainer = DistillationTrainer(model, args, train_dataset=data, teacher=dense)
    trainer.train(resume_from_checkpoint=resume)
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def student(dense: Any) -> Any:
    """Return a copy of dense with all of its weights trained."""
    return copy.deepcopy(dense).requires_grad_(True)
