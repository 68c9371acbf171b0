"""Go on from the last whole checkpoint of a training run that was stopped."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState

from ..base.reading import read_object

_NAME = re.compile(r"checkpoint-(\d+)")


def train(trainer: Trainer, work: Path) -> None:
    """Train to args.max_steps, from the last checkpoint in `work` where there is one.

    Trainer takes one step more when it resumes from its very last one: that is only loaded.
    """
    steps = trainer.args.max_steps
    found = last_checkpoint(work, steps)
    if found is None or _step(found) < steps:
        trainer.train(resume_from_checkpoint=None if found is None else str(found))
        return
    trainer._load_from_checkpoint(str(found))
    trainer.state = TrainerState.load_from_json(str(found / TRAINER_STATE_NAME))


def last_checkpoint(work: Path, steps: int) -> Path | None:
    """Return the last whole checkpoint of at most `steps` steps, and remove all others.

    Trainer writes a checkpoint file by file and its state last: without a state that can be read
    the process was killed in between, and the weights beside it may be half written.
    """
    found = [path for path in work.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    whole = [path for path in found if _step(path) <= steps and _is_whole(path)]
    last = max(whole, key=_step, default=None)
    for path in found:
        if path != last:
            shutil.rmtree(path)
    return last


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _is_whole(path: Path) -> bool:
    try:
        return read_object(path / TRAINER_STATE_NAME).get("global_step") == _step(path)
    except (OSError, ValueError, TypeError):
        return False
