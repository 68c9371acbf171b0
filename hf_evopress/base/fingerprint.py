"""Fingerprints of models, tensors and text: a rerun continues a folder or refuses to mix."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from .reading import read_object
from .resources import atomic_write, clear_leftovers

INDEX = "index.json"
_SAMPLES = 1024  # values per tensor: a fine-tune changes nearly all of them


def model_fingerprint(model: nn.Module) -> str:
    """Return 16 hex digits over the names, shapes and some values of all parameters.

    Cheap: every tensor gives up to 1024 evenly spaced values, whatever its size.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        # in which dtype values are held, or on which device, is not part of a model
        dtype = torch.float32 if parameter.is_floating_point() else parameter.dtype
        digest.update(f"{name} {tuple(parameter.shape)} {dtype}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            digest.update(_bytes(flat[:: max(1, flat.numel() // _SAMPLES)].to(dtype)))
    return digest.hexdigest()[:16]


def tensor_fingerprint(tensor: Tensor) -> str:
    """Return 16 hex digits over the shape and all bytes of a tensor."""
    digest = hashlib.sha256(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()[:16]


def text_fingerprint(*parts: str) -> str:
    """Return 16 hex digits over texts and where each ends."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of what decides the numbers."""
    from .version import __version__

    found = {"hf_evopress": __version__, "torch": torch.__version__}
    return {**found, "transformers": transformers.__version__}


def claim(folder: Path, made_from: Mapping[str, Any], *, what: str) -> None:
    """Write `folder`/index.json for new results, or check that those there are of the same make.

    Raises ValueError that names what differs, and the way out, where they are not.
    """
    clear_leftovers(folder)
    path = folder / INDEX
    wanted = json.loads(json.dumps(made_from))
    if not path.is_file():
        atomic_write(path, json.dumps({"format_version": 1, "made_from": wanted}, indent=1) + "\n")
        return
    way_out = f"it is damaged; remove {folder} to make {what} anew"
    found = read_object(path, way_out=way_out).get("made_from")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: made_from is not an object; {way_out}")
    differing = [
        f"{key} ({found.get(key)} there, {wanted.get(key)} now)"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise ValueError(
            f"{folder} holds {what} made with other {', '.join(differing)}; "
            "give another work folder, or remove this one to make them anew"
        )


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
