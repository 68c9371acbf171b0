"""The file of one unit in a level store: tensors of its levels, each stored once, with checksums.

Tensors are called <level number>/<name>. One that is the leading part of another of the same name
is stored once: nested ranks, and the codes that levels with the same first term have in common.
The file's metadata say under `shared` of which tensor it is what leading shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..base.reading import reading
from ..base.resources import atomic_path
from ..methods.base import State
from .checksums import checksum


def unit_file(folder: Path, number: int) -> Path:
    """Return the file of a store's unit: by number, so that names never become paths."""
    return folder / f"unit_{number:05d}.safetensors"


def write_unit(
    path: Path, unit: str, states: Sequence[State], scores: Sequence[Mapping[str, float]]
) -> None:
    """Write the states of a unit, one per level, and what was measured of each."""
    tensors, shared = share(states)
    about = {
        "unit": unit,
        "shared": shared,
        "scores": list(scores),
        "crc32": [checksums(state) for state in states],
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=one_entry(about))


def one_entry(about: Mapping[str, Any]) -> dict[str, str]:
    """Return metadata for a safetensors file: several entries would come in a random order."""
    return {"about": json.dumps(about)}


def read_about(file: Any) -> dict[str, Any]:
    """Return what `one_entry` was given; any error if damaged."""
    return json.loads(file.metadata()["about"])


def read_state(path: Path, unit: str, number: int) -> State:
    """Return the packed tensors of level `number`; a damaged file raises ValueError."""
    prefix = f"{number}/"
    with damage(path, f"levels of {unit}"):
        with safe_open(path, framework="pt") as file:
            about = read_about(file)
            shared = about["shared"]
            state = {
                key.removeprefix(prefix): _tensor(file, *shared.get(key, (key, None)))
                for key in sorted({*file.keys(), *shared})
                if key.startswith(prefix)
            }
            expected = about["crc32"][number]
        if checksums(state) != expected:
            raise ValueError("a checksum differs")
    return state


def read_scores(path: Path, unit: str) -> list[dict[str, float]]:
    """Return what was measured of each level when it was made."""
    with damage(path, f"levels of {unit}"), safe_open(path, framework="pt") as file:
        scores = read_about(file)["scores"]
        if not isinstance(scores, list) or not all(isinstance(s, dict) for s in scores):
            raise TypeError(f"scores are a list of objects, got {scores!r:.200}")
        return scores


def checksums(state: State) -> dict[str, str]:
    """Return tensor name -> CRC-32 of the tensors of a state."""
    return {name: checksum(_bytes(tensor), tensor.shape) for name, tensor in state.items()}


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def share(
    states: Sequence[State],
) -> tuple[dict[str, Tensor], dict[str, tuple[str, list[int]]]]:
    """Return the tensors to store by key, and key -> (stored key, shape) of all others.

    A tensor is left out where it is, bit for bit, the leading part of a stored one.
    """
    everything = [
        (name, i, tensor) for i, state in enumerate(states) for name, tensor in state.items()
    ]
    everything.sort(key=lambda entry: -entry[2].numel())
    stored: dict[str, list[tuple[str, Tensor]]] = {}
    shared: dict[str, tuple[str, list[int]]] = {}
    for name, i, tensor in everything:
        key, known = f"{i}/{name}", stored.setdefault(name, [])
        source = next((k for k, larger in known if _is_leading(tensor, larger)), None)
        if source is None:
            known.append((key, tensor.contiguous()))
        else:
            shared[key] = (source, list(tensor.shape))
    return {key: tensor for kept in stored.values() for key, tensor in kept}, shared


def _is_leading(part: Tensor, whole: Tensor) -> bool:
    if part.dtype != whole.dtype or part.ndim != whole.ndim or not part.numel():
        return False
    if any(n > m for n, m in zip(part.shape, whole.shape, strict=True)):
        return False
    # The first row tells nearly all of those that differ.
    leading = whole[tuple(slice(n) for n in part.shape)]
    return torch.equal(part[:1], leading[:1]) and torch.equal(part, leading)


def _tensor(file: Any, key: str, shape: Sequence[int] | None) -> Tensor:
    if shape is None:
        return file.get_tensor(key)
    return file.get_slice(key)[tuple(slice(n) for n in shape)].contiguous()


@contextmanager
def damage(path: Path, what: str, again: str = "build") -> Iterator[None]:
    """Make what is raised while `path` is read a ValueError that says how to make it again."""
    try:
        with reading(path):
            yield
    except (ValueError, TypeError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise ValueError(
            f"{path} ({what}) is damaged: truncated or changed after it was written ({reason}); "
            f"delete it and run the same {again} again, which makes only what is missing"
        ) from error
