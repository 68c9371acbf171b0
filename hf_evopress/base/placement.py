"""Which tensor lives where, and when it moves. The one rule, which every step follows:

    dense weights       stay where they were loaded, in their own dtype
    a block's weights   are brought to the compute device, in the dtype to compute in, while the
                        block runs, and let go when another does; so are embeddings and head
    statistics          of a block are brought with it; Gram matrices add up on the device
    hidden states       stay on the device where the model does, else wait on the CPU, or on disk
    packed states       go to the CPU as soon as they are made

`put` says where a model computes, `place_of` asks, `Visit` brings and lets go. Weights do not
change while they visit, so nothing is copied back. A model that was not put anywhere computes
where and as it lies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .devices import find_offload, free_bytes
from .on_disk import on_disk

logger = logging.getLogger(__name__)

_SHARE = 0.5  # of the free memory; the rest is for statistics, activations and levels
_ATTRIBUTE = "_hf_evopress_place"


@dataclass(frozen=True)
class Place:
    """Where and in what a model computes.

    device, dtype: None leaves each tensor as it is. rest: where hidden states wait; None is where
    they were computed. folder: where they are files while they wait, None keeps them in memory.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None
    rest: torch.device | None = None
    folder: Path | None = None

    def bring(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device; floating-point ones in the dtype to compute in."""
        dtype = self.dtype if tensor.is_floating_point() else None
        if dtype is None:
            return tensor if self.device is None else tensor.to(self.device)
        return tensor.to(self.device, dtype)

    def on_device(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device, in its own dtype."""
        return tensor if self.device is None else tensor.to(self.device)

    def let_rest(self, hidden: Tensor) -> Tensor:
        """Return hidden states where they wait for the next block."""
        if self.folder is not None:
            return on_disk(hidden, self.folder)
        return hidden if self.rest is None else hidden.to(self.rest)

    def holds(self, tensor: Tensor) -> bool:
        """Return whether a tensor is already where, and in what, it is computed with."""
        if self.device is not None and tensor.device != self.device:
            return False
        return self.dtype is None or not tensor.is_floating_point() or tensor.dtype == self.dtype


def put(model: Any, place: Place) -> Any:
    """Return `model`, which computes at a place from now on; its weights stay where they are."""
    model.__dict__[_ATTRIBUTE] = place
    return model


def decide(
    model: Any, place: Place, offload: str = "auto", *, folder: str | Path | None = None
) -> Place:
    """Return `place` with what is decided on hidden states, after moving a model that fits.

    offload: none has all of the model and its hidden states on the device; cpu brings weights
    block by block and lets hidden states wait on the CPU; disk lets them wait in files of
    `folder`; auto is none where the weights take at most half of the device's free memory, else
    cpu. One line says what was decided.
    """
    device, offload = place.device, find_offload(offload)
    if device is None:
        return place
    needed, free = size_bytes(model, place.dtype), free_bytes(device)
    if offload == "auto":
        offload = "none" if free is None or needed <= _SHARE * free else "cpu"
        seen = "unknown" if free is None else f"{free / 1e9:.1f} GB"
        logger.info(
            "offload %s: weights %.1f GB, free on %s %s", offload, needed / 1e9, device, seen
        )
    if offload in ("cpu", "disk"):
        at = Path(folder) if offload == "disk" and folder is not None else None
        return replace(place, rest=torch.device("cpu"), folder=at)
    if device.type != "cpu":
        model.to(device)
    return place


def place_of(model: Any) -> Place:
    """Return where a model computes: as it lies, unless it was put somewhere."""
    return getattr(model, "__dict__", {}).get(_ATTRIBUTE, Place())


def device_of(model: Any) -> torch.device:
    """Return the device that a model computes on, of several the first."""
    return place_of(model).device or next(model.get_input_embeddings().parameters()).device


def dtype_of(model: Any) -> torch.dtype:
    """Return the dtype that a model computes in."""
    return place_of(model).dtype or model.dtype


@contextmanager
def computing_in(model: Any, dtype: torch.dtype | None) -> Iterator[None]:
    """Have a model compute in another dtype for a while; None is its own, tensor by tensor."""
    before = place_of(model)
    put(model, replace(before, dtype=dtype))
    try:
        yield
    finally:
        put(model, before)


@contextmanager
def computing_on(model: Any, device: torch.device) -> Iterator[None]:
    """Have a model that lies on the CPU compute on a device for a while, block by block."""
    before = place_of(model)
    if before == Place() and all(t.device.type == "cpu" for t in model.parameters()):
        put(model, Place(device, None, torch.device("cpu")))
    try:
        yield
    finally:
        put(model, before)


class Visit:
    """The tensors of some modules at a place, until they are let go."""

    def __init__(self, modules: Iterable[nn.Module], place: Place) -> None:
        self._homes: list[tuple[dict[str, Any], str, Tensor]] = []
        brought: dict[int, Tensor] = {}  # tied weights are brought once
        for module in modules:
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is None or tensor.is_meta or place.holds(tensor):
                        continue
                    if id(tensor) not in brought:
                        brought[id(tensor)] = _copy(tensor, place)
                    self._homes.append((table, name, tensor))
                    table[name] = brought[id(tensor)]

    def end(self) -> None:
        """Put the modules' own tensors back."""
        for table, name, tensor in self._homes:
            table[name] = tensor
        self._homes.clear()


def _copy(tensor: Tensor, place: Place) -> Tensor:
    made = place.bring(tensor.detach())
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made


@contextmanager
def visiting(module: nn.Module, place: Place) -> Iterator[None]:
    """Have all of a module at a place for a while."""
    visit = Visit(module.modules(), place)
    try:
        yield
    finally:
        visit.end()


def on_cpu(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a packed state on the CPU."""
    return {name: tensor.cpu() for name, tensor in state.items()}


def size_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a model's tensors, in a dtype."""
    tensors = {id(t): t for t in chain(model.parameters(), model.buffers())}.values()
    return sum(
        t.numel() * (dtype if dtype and t.is_floating_point() else t.dtype).itemsize
        for t in tensors
    )
