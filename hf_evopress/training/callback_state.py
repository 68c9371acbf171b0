"""Tensors of a Trainer callback: written into Trainer's checkpoints, read when a run is resumed.

Trainer itself keeps callbacks as JSON, and only those that it makes anew when it resumes. A
callback that owns tensors writes them in its on_save and reads them in its on_train_begin.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..base.fingerprint import text_fingerprint
from ..base.reading import reading
from ..base.resources import atomic_path
from ..store.unit_file import one_entry, read_about


def write_tensors(
    args: Any, state: Any, name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]
) -> None:
    """Write `name`.safetensors into the checkpoint that Trainer has just written, whole or not.

    args, state: what Trainer gives its callbacks. settings: what a resumed run has to agree on,
    JSON values.
    """
    if not args.should_save or state.is_hyper_param_search:  # nobody resumes a trial
        return
    kept = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    about = {"run": _run(state), "settings": dict(settings)}
    with atomic_path(_checkpoint(args.output_dir, state) / f"{name}.safetensors") as temporary:
        save_file(kept, temporary, metadata=one_entry(about))


def read_tensors(
    args: Any, state: Any, name: str, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return what `write_tensors` wrote into the checkpoint that a run is resumed from.

    Trainer does not tell callbacks where that is. It is looked for in `args.output_dir`, and in
    `args.resume_from_checkpoint` where that is a path. ValueError where no file there belongs to
    the run that is resumed, as its log tells, or where its settings differ.
    """
    folders = [_checkpoint(args.output_dir, state)]
    if args.resume_from_checkpoint:
        folders.insert(0, Path(args.resume_from_checkpoint))
    for path in (folder / f"{name}.safetensors" for folder in folders):
        if not path.is_file():
            continue
        run, found, tensors = _read(path, "resume from an earlier checkpoint, or start anew")
        if run != _run(state):
            continue
        if found != dict(settings):
            raise ValueError(f"{path} was written with {found}, this run has {dict(settings)}")
        return tensors
    raise ValueError(
        f"{name}.safetensors of step {state.global_step} of this run is not in "
        f"{' or '.join(map(str, folders))}: resume from a checkpoint in output_dir, or name "
        "another one in TrainingArguments(resume_from_checkpoint=...) as well"
    )


def read_best(state: Any, name: str) -> dict[str, Tensor]:
    """Return what `write_tensors` wrote into the checkpoint of which Trainer has loaded the
    model, the best one."""
    path = Path(state.best_model_checkpoint) / f"{name}.safetensors"
    return _read(path, "load a checkpoint that has it, or train without load_best_model_at_end")[2]


def _read(path: Path, way_out: str) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Return which run wrote a file, its settings and its tensors."""
    with reading(path, way_out=way_out), safe_open(path, framework="pt") as file:
        about = read_about(file)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return about["run"], about["settings"], tensors


def _checkpoint(output_dir: str, state: Any) -> Path:
    return Path(output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _run(state: Any) -> str:
    """Return what tells one run from another at the same step: its log, losses and all."""
    return text_fingerprint(json.dumps([state.global_step, state.log_history], sort_keys=True))
