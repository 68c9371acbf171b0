"""A second device, "sim", of CPU tensors: what refuses to mix with the CPU there does so on a GPU.

`import` registers it. Two cards, sim:0 and sim:1. A tensor on one wraps a CPU tensor; operators
run on that, after the checks that CUDA makes: all tensors on one device, but for CPU scalars
(tensors without dimensions) in pointwise operators and CPU indices of a tensor on the device.
Bytes are counted per storage, so that views count once; a limit makes a small card.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .second_device_backend import N_CARDS, backend, generator_of, indexed, register

aten = torch.ops.aten

# -- memory ------------------------------------------------------------------------------------


class _Card:
    """What one card holds, and how often the CPU has waited for it."""

    def __init__(self) -> None:
        self.live = self.peak = self.n_syncs = 0
        self.limit: int | None = None
        self.storages: dict[int, weakref.ref[_Claim]] = {}


class _Claim:
    """The bytes of one storage, held by all tensors that view it."""

    def __init__(self, storage: torch.UntypedStorage, card: _Card) -> None:
        self.storage, self.card, self.nbytes = storage, card, 0  # the storage outlives its claim
        self.update()

    def update(self) -> None:
        """Count what the storage has grown by."""
        more, card = self.storage.nbytes() - self.nbytes, self.card
        if more > 0 and card.limit is not None and card.live + more > card.limit:
            raise torch.OutOfMemoryError(
                f"sim out of memory. Tried to allocate {more} bytes; {card.live} of {card.limit} "
                "are in use"
            )
        self.nbytes += more
        card.live += more
        card.peak = max(card.peak, card.live)

    def __del__(self) -> None:
        self.card.live -= self.nbytes
        self.card.storages.pop(self.storage._cdata, None)


_cards = [_Card() for _ in range(N_CARDS)]


def live_bytes(device: Any = None) -> int:
    """Return the bytes of all storages on a card (sim:0)."""
    return backend.card(device).live


def peak_bytes(device: Any = None) -> int:
    """Return the most bytes that were live at once since the last reset."""
    return backend.card(device).peak


def reset_peak(device: Any = None) -> None:
    """Let the peak begin again at what is live now."""
    backend.reset_peak_memory_stats(device)


def n_syncs(device: Any = None) -> int:
    """Return how often a value of the card was read: each makes the CPU wait for a GPU."""
    return backend.card(device).n_syncs


@contextmanager
def memory_of(n_bytes: int, device: Any = None) -> Iterator[None]:
    """Make a card that has `n_bytes`: what needs more raises torch.OutOfMemoryError."""
    card = backend.card(device)
    before, card.limit = card.limit, n_bytes
    try:
        yield
    finally:
        card.limit = before


# -- tensors -----------------------------------------------------------------------------------


class Sim(Tensor):
    """A tensor on a card: `raw` holds its values."""

    raw: Tensor
    claim: _Claim
    place: torch.device

    @staticmethod
    def __new__(  # type: ignore[misc]
        cls, raw: Tensor, device: torch.device | None = None, *, requires_grad: bool = True
    ) -> Tensor:
        if device is None:  # called as the class of a parameter, which on a GPU is nn.Parameter
            return torch.nn.Parameter(raw, requires_grad)
        claim = _claim(raw, _cards[device.index])
        made = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=device,
            storage_size=1 << 62,  # any shape may be written to it; the true one is the raw one's
        )
        made.raw, made.claim, made.place = raw, claim, device
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The values without their graph; setting it, by another tensor of the device."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, Sim):
            raise RuntimeError("incompatible tensor type: .data of another device")
        self.raw, self.claim = value.raw, value.claim
        _DATA.__set__(self, value)  # the metadata

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{self.raw!r:.200} on {self.device}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Sim:
        if id(self) not in memo:
            with torch.no_grad():
                made = self.detach().clone()
            if getattr(self, "_is_param", False):
                made._is_param = True  # type: ignore[attr-defined]
            memo[id(self)] = made.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().cpu().__reduce_ex__(protocol)  # a file is loaded on the CPU first

    def as_subclass(self, cls: type) -> Any:  # type: ignore[override]
        """Return the tensor as it is: a wrapper cannot be of another class as well."""
        return self

    def tolist(self) -> Any:
        """Return the values, which the CPU waits for."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refuse what CUDA refuses."""
        if not force:
            raise TypeError(
                f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to "
                "copy the tensor to host memory first."
            )
        return self.detach().cpu().numpy()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def untyped_storage(self) -> torch.UntypedStorage:
        """Return where the values lie, by which others tell views and tied weights."""
        return self.raw.untyped_storage()

    def data_ptr(self) -> int:
        """Return where the first value lies."""
        return self.raw.data_ptr()

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["raw"], self.device  # makes nn.Module.to swap tensors rather than set .data

    @staticmethod
    def __tensor_unflatten__(inner: Any, device: Any, size: Any, stride: Any) -> Sim:
        return Sim(inner["raw"], device)


_DATA: Any = Tensor.data


def _claim(raw: Tensor, card: _Card) -> _Claim:
    storage = raw.untyped_storage()
    found = card.storages.get(storage._cdata)
    claim = None if found is None else found()
    if claim is None:
        claim = _Claim(storage, card)
        card.storages[storage._cdata] = weakref.ref(claim)
    return claim


# -- operators ---------------------------------------------------------------------------------

# index operators, which take indices on the CPU, and values without dimensions
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPIES = {"aten::_to_copy", "aten::copy_", "aten::copy", "aten::_copy_from"}
_SCALARS = {"aten::fill_", "aten::fill", "aten::masked_fill", "aten::masked_fill_", "aten::where"}
_SYNCS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::_to_copy"}


class _Signature:
    """What has to be known of an operator, from its schema."""

    def __init__(self, func: Any) -> None:
        schema = func._schema
        self.name = schema.name
        self.names = [a.name for a in schema.arguments]
        self.generator = "generator" in self.names
        self.written = [
            i for i, a in enumerate(schema.arguments) if a.alias_info and a.alias_info.is_write
        ]
        by_alias = {frozenset(schema.arguments[i].alias_info.before_set): i for i in self.written}
        self.returned = [
            by_alias.get(frozenset(r.alias_info.before_set)) if r.alias_info else None
            for r in schema.returns
        ]
        self.takes_scalars = torch.Tag.pointwise in func.tags or self.name in _SCALARS
        self.is_composite = torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        )
        self.changes_shape = torch.Tag.inplace_view in func.tags


@cache
def _signature(func: Any) -> _Signature:
    return _Signature(func)


def _tensors(args: Any, found: list[Tensor]) -> list[Tensor]:
    """Return the tensors in arguments, added to `found`."""
    for a in args:
        if isinstance(a, Tensor):
            found.append(a)
        elif isinstance(a, (list, tuple)):
            _tensors(a, found)
    return found


def _raw(a: Any) -> Any:
    if isinstance(a, Sim):
        return a.raw
    if isinstance(a, (list, tuple)) and a and not isinstance(a[0], (int, float)):
        return type(a)([_raw(x) for x in a])
    return a


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Return what an operator gives, on its device, after the checks that CUDA makes."""
    sign = _signature(func)
    if sign.is_composite and torch.is_inference_mode_enabled():  # nothing has taken it apart
        made = func.decompose(*args, **kwargs)
        if made is not NotImplemented:
            return made
    tensors = _tensors(kwargs.values(), _tensors(args, [])) if kwargs else _tensors(args, [])
    device = next((t.place for t in tensors if isinstance(t, Sim)), None)
    if len(tensors) > 1 and device is not None:
        _check(sign, args, kwargs, tensors, device)
    if kwargs.get("device") is not None:
        device = indexed(kwargs["device"])
        on = torch.device("cpu") if device.type == "sim" else device
        kwargs = {
            **kwargs,
            "device": on,
            **({"pin_memory": None} if "pin_memory" in kwargs else {}),
        }
    on_card = device is not None and device.type == "sim"
    if sign.generator and on_card:
        args, kwargs = _with_generator(sign, args, kwargs, device)
    if sign.name in _SYNCS and not (sign.name == "aten::_to_copy" and on_card):
        for index in {t.device.index for t in tensors if isinstance(t, Sim)}:
            _cards[index].n_syncs += 1
    raws = {k: _raw(v) for k, v in kwargs.items()} if kwargs else {}
    out = func(*[_raw(a) for a in args], **raws)
    return _wrapped(func, sign, args, kwargs, out, device if on_card else None)


def _with_generator(sign: _Signature, args: Any, kwargs: Any, device: Any) -> Any:
    place = sign.names.index("generator")
    if place < len(args):
        args = (*args[:place], generator_of(args[place], device), *args[place + 1 :])
        return args, kwargs
    return args, {**kwargs, "generator": generator_of(kwargs.get("generator"), device)}


def _wrapped(func: Any, sign: _Signature, args: Any, kwargs: Any, out: Any, device: Any) -> Any:
    """Return an operator's results as tensors on the card; what it wrote to as what was given."""
    given: dict[int, Any] = {}
    if sign.written:
        given = {i: args[i] if i < len(args) else kwargs.get(sign.names[i]) for i in sign.written}
        for tensor in _tensors(given.values(), []):
            if isinstance(tensor, Sim):
                _grown(func, sign, args, kwargs, tensor)
    elif device is not None and isinstance(out, Tensor):
        return Sim(out, device)
    if device is None:
        return out
    results = list(out) if isinstance(out, tuple) else [out]
    for i, (was, result) in enumerate(zip(sign.returned, results, strict=False)):
        if was is not None:
            results[i] = given[was]
        elif isinstance(result, Tensor):
            results[i] = Sim(result, device)
        elif isinstance(result, (list, tuple)):
            results[i] = [Sim(t, device) if isinstance(t, Tensor) else t for t in result]
    return type(out)(results) if isinstance(out, tuple) else results[0]


def _grown(func: Any, sign: _Signature, args: Any, kwargs: Any, tensor: Sim) -> None:
    """Bring the shape that a written tensor shows up to date with its values'."""
    raw = tensor.raw
    tensor.claim = _claim(raw, _cards[tensor.device.index])
    tensor.claim.update()
    if tensor.shape == raw.shape and tensor.stride() == raw.stride():
        return
    before = torch._C._meta_in_tls_dispatch_include()
    torch._C._set_meta_in_tls_dispatch_include(True)
    try:
        with torch.utils._mode_utils.no_dispatch():
            aten.as_strided_.default(tensor, raw.shape, raw.stride(), raw.storage_offset())
    finally:
        torch._C._set_meta_in_tls_dispatch_include(before)


def _check(sign: _Signature, args: Any, kwargs: Any, tensors: Any, device: torch.device) -> None:
    """Refuse what CUDA refuses."""
    if all(isinstance(t, Sim) and t.place is device for t in tensors) or sign.name in _COPIES:
        return
    strangers = [t for t in tensors if t.device != device]
    if not strangers:
        return
    if sign.name in _INDEXING and args[0].device == device:
        indices = {id(t) for t in _tensors(args[1], [])}
        if all(t.device.type == "cpu" and (t.ndim == 0 or id(t) in indices) for t in strangers):
            return
    elif sign.takes_scalars and all(t.device.type == "cpu" and t.ndim == 0 for t in strangers):
        written = [args[i] if i < len(args) else kwargs[sign.names[i]] for i in sign.written]
        if all(t.device == device for t in _tensors(written, [])):
            return
    raise RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, "
        f"{device} and {strangers[0].device}! (when checking arguments of {sign.name})"
    )


def _copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between devices, for torch.tensor(..., device="sim")."""
    _raw(to).copy_(_raw(source))
    return to


register(_run, _copy_from, _cards)
