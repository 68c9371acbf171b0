"""Models by the names that commands take: a folder, a Hub name, OWNER/NAME@REVISION, a GGUF file.

In: such a name. Out: the model, its tokenizer, the plan that it brings. The dense model that a
plan was made from is named with the plan's commit: its branch may have moved on since.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..base.devices import find_device
from ..loading.quantizer import register_with_transformers
from ..models.classes import ModelClass
from ..models.plain import make_plain
from ..models.source import load_checked, read_config, read_tokenizer
from ..plans.plan import Plan
from ..plans.repo import is_repo_id
from .foreign import check_package


def load(name: str, *, dtype: Any = None, kind: ModelClass | None = None) -> Any:
    """Return the model called `name` on the device in use, in float32 on a CPU and bfloat16 on
    a GPU unless told.

    kind: its class; a causal language model where none is given. A name ending in .gguf is that
    of a file, in a folder or in a Hub repository.
    """
    register_with_transformers()
    device = find_device()
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    where, options = _place(name)
    if "gguf_file" not in options:
        read_config(where, **options)  # its errors are clearer
        check_package(where)
    model = load_checked(where, dtype=dtype, kind=kind, **options)
    if getattr(model, "hf_quantizer", None) is None:
        make_plain(model)
    model = model.eval().requires_grad_(False)
    is_placed = model.device.type != "cpu"  # by its quantizer
    return model if is_placed or device.type == "cpu" else model.to(device)


def tokenizer_of(name: str) -> Any:
    """Return the tokenizer in a model's folder or repository."""
    where, options = _place(name)
    return read_tokenizer(where, **options)


def plan_of(model: Any) -> Plan | None:
    """Return the plan of a checkpoint of this package, None for any other model.

    model: the model, or its config as it was read.
    """
    config = getattr(model, "config", model)
    quantized = getattr(config, "quantization_config", None)
    if isinstance(quantized, dict):  # of a config as it was read
        return Plan.from_dict(quantized["plan"]) if quantized.get("plan") else None
    return getattr(quantized, "plan", None)


def dense_name(plan: Plan | None, name: str, *, option: str = "--dense") -> str:
    """Return the model that `name`, whose plan is given, was made from, at the plan's commit."""
    if plan is None or plan.base_model is None:
        raise ValueError(f"{name} does not say which model it was made from: give {option} MODEL")
    return pinned(plan.base_model, plan)


def pinned(dense: str, plan: Plan | None) -> str:
    """Return the name of a dense model with the commit of `plan`, where that was made from it."""
    if plan is None or plan.revision is None or dense != plan.base_model:
        return dense
    return f"{dense}@{plan.revision}"


def is_gguf(name: str) -> bool:
    """Return whether a name is that of a GGUF file."""
    return name.endswith(".gguf")


def _place(name: str) -> tuple[str, dict[str, Any]]:
    """Return the folder or repository of a name, and what transformers is to be told of it."""
    if is_gguf(name):
        return _gguf_file(name)
    where, at, revision = name.rpartition("@")
    is_pinned = at and revision and not Path(name).exists()
    if is_pinned and (Path(where).is_dir() or is_repo_id(where)):
        return where, {"revision": revision}
    return name, {}


def _gguf_file(name: str) -> tuple[str, dict[str, Any]]:
    """Return where transformers finds a GGUF file, and the file."""
    path = Path(name)
    if path.is_file():
        return str(path.parent), {"gguf_file": path.name}
    owner, _, rest = name.partition("/")
    repo, _, file = rest.partition("/")
    if not (owner and repo and file):
        raise FileNotFoundError(
            f"there is no GGUF file {name}; give its path, or OWNER/REPOSITORY/FILE.gguf on the Hub"
        )
    return f"{owner}/{repo}", {"gguf_file": file}
