"""The input embedding of a compressed model: an nn.Embedding that decodes the rows it is asked for.

Where the output head has the same weight, it is a CompressedLinear over the same packed tensors.
transformers then ties those instead of dense weights, so that they are stored and loaded once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import compose
from ..methods.base import Shape, State
from ..models.patching import look_up
from ..plans.level import Level
from .kernels.operators import look_up as kernel_look_up
from .kernels.tracing import is_compiled_into_one
from .layers import CompressedLinear
from .packed import PackedWeight, tensors_of
from .runtimes import AUTO

_OWN = (
    "level",
    "shape",
    "weight_dtype",
    "_state_names",
    "_kernel",
    "level_text",
    "_is_looking_up",
    "_is_hf_initialized",
)


class CompressedEmbedding(PackedWeight, nn.Embedding):
    """Token ids (...) -> rows (..., embedding_dim) of a weight stored at a level.

    It is an nn.Embedding so that PEFT and transformers see one, yet it calls only
    nn.Module.__init__. An embedding that does more than look up (scales, norms) is a subclass
    that inherits from both, made by `compress_embedding`.
    """

    def __init__(
        self,
        level: Level | str,
        shape: Shape,
        state: State,
        *,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self._is_looking_up = False
        dtype = dtype or torch.get_default_dtype()
        # `dtype` of a model of transformers is that of its first float parameter: not of scales
        device = next(iter(state.values())).device
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        self.hold(level, shape, state, dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight in `weight_dtype`, computed now; changes to it raise."""
        if not self._is_looking_up:
            return PackedWeight.weight.fget(self)  # type: ignore[attr-defined]
        # classes that scale the rows ask for its dtype
        like = self.like.new_empty(()).expand(self.shape)
        like._is_hf_initialized = True  # type: ignore[attr-defined]
        return like

    def forward(self, input: Tensor) -> Tensor:
        if self._kernel is not None:
            own = self._state_names, tensors_of(self)
            rows = kernel_look_up(self._kernel, *own, input, self.weight_dtype)
            if rows is not None:
                return rows
        if is_compiled_into_one() and not any(t.requires_grad for t in self.state.values()):
            state = list(self.state.values())
            options = self.level_text, [*self.shape], self.weight_dtype, AUTO
            return torch.ops.evopress.look_up(input, state, *options)
        return look_up(self.level, self.state, self.shape, input, self.weight_dtype)

    def dequantize(self, *, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Return the stock embedding with this weight in `dtype` or `weight_dtype`."""
        self.check_loaded("dequantize")
        dtype = dtype or self.weight_dtype
        with torch.no_grad():
            return self.stock(compose.decompress(self.level, self.state, self.shape, dtype))

    def stock(self, W: Tensor) -> nn.Embedding:
        """Return the stock embedding that this one stands for, with weight W."""
        made = nn.Embedding(*self.shape, padding_idx=self.padding_idx, device="meta")
        made.weight = nn.Parameter(W)
        kind = next(k for k in type(self).__mro__ if not _is_ours(k))
        _take_over(self, made, kind)
        return made.train(self.training)

    @contextmanager
    def without_weight(self) -> Iterator[None]:
        """Let whatever looks at `weight` for a while see its shape and dtype only."""
        before, self._is_looking_up = self._is_looking_up, True
        try:
            yield
        finally:
            self._is_looking_up = before

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self.level_repr}"


def compress_embedding(
    embedding: nn.Embedding, level: Level | str, state: State | None = None
) -> CompressedEmbedding:
    """Return the CompressedEmbedding that stands in for `embedding`.

    Without a `state` its packed tensors are on the meta device, ready to be loaded. Raises
    ValueError unless the state is one of the level.
    """
    level = compose.normalize(level)
    shape = (embedding.num_embeddings, embedding.embedding_dim)
    is_packed = isinstance(embedding, CompressedEmbedding)
    dtype: torch.dtype = (
        embedding.weight_dtype  # type: ignore[assignment]
        if is_packed
        else embedding.weight.dtype
    )
    empty = compose.empty(level, shape, dtype)
    made = CompressedEmbedding(level, shape, empty, padding_idx=embedding.padding_idx, dtype=dtype)
    if state is not None:
        made._take(state)
        device = next(iter(state.values())).device
        made.like = nn.Parameter(torch.empty(0, dtype=dtype, device=device), requires_grad=False)
        made.like._is_hf_initialized = True  # type: ignore[attr-defined]
    kind: Any = type(embedding)
    if not is_packed and kind is not nn.Embedding:
        _take_over(embedding, made, _compressed(kind))
    return made.train(embedding.training)


@lru_cache(maxsize=None)
def _compressed(kind: Any) -> type:
    """Return a subclass of an embedding class whose rows come from packed tensors."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        with self.without_weight():
            return kind.forward(self, *args, **kwargs)

    body = {"forward": forward, "__module__": __name__}
    return type(f"Compressed{kind.__name__}", (kind, CompressedEmbedding), body)


def _take_over(source: nn.Module, target: nn.Module, kind: type) -> None:
    """Make `target` one of class `kind` with what `source` holds besides its weight."""
    target.__class__ = kind
    packed = getattr(source, "_state_names", ())
    known = {"_parameters", "_buffers", "_modules", "forward", *_OWN, *target.__dict__}
    target.__dict__.update({k: v for k, v in source.__dict__.items() if k not in known})
    target._buffers.update(source._buffers)
    target._non_persistent_buffers_set.update(source._non_persistent_buffers_set)
    target._modules.update(source._modules)
    for name, parameter in source._parameters.items():
        if name not in ("weight", "like", *packed):
            target._parameters[name] = parameter


def finish_loading(model: Any) -> None:
    """Give embeddings their buffers, such as a scale, which are in no checkpoint."""
    for path, layer in compressed_embeddings(model).items():
        layer.like.requires_grad_(False)
        if layer._non_persistent_buffers_set:
            owner = _owner(model, path)
            with layer.without_weight():
                owner._init_weights(layer)


def _owner(model: nn.Module, path: str) -> Any:
    """Return the innermost model of transformers that the module at `path` is in."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if _is_transformers(module) and f"{path}.".startswith(f"{name}." if name else "")
    ]
    return max(found, key=lambda item: len(item[0]))[1]


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def _is_transformers(module: nn.Module) -> bool:
    return hasattr(module, "get_expanded_tied_weights_keys")


def compressed_embeddings(model: nn.Module) -> dict[str, CompressedEmbedding]:
    """Return module path -> compressed embedding."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedEmbedding)}


# -- one weight for both ends ----------------------------------------------------------------


def tie_head(model: Any, path: str, head_path: str) -> None:
    """Put a head in the place of the one at `head_path` that shares the embedding's tensors."""
    embedding, head = model.get_submodule(path), model.get_submodule(head_path)
    state = {name: embedding.get_parameter(name) for name in embedding.state}
    bias = head.bias
    made = CompressedLinear(
        embedding.level, embedding.shape, state, bias, dtype=embedding.weight_dtype
    )
    made.is_tied = True
    model.set_submodule(head_path, made.train(head.training))
    _retie(model, f"{head_path}.weight", [(f"{head_path}.{n}", f"{path}.{n}") for n in state])


def _retie(model: Any, dense: str, pairs: list[tuple[str, str]]) -> None:
    """Let transformers tie `pairs` of (target, source) instead of the dense weight."""
    for prefix, module in model.named_modules():
        if not _is_transformers(module):
            continue
        start = f"{prefix}." if prefix else ""
        if not dense.startswith(start):
            continue
        own = [(a.removeprefix(start), b.removeprefix(start)) for a, b in pairs]
        tied: dict[str, str] = dict(getattr(module, "all_tied_weights_keys", None) or {})
        if tied.pop(dense.removeprefix(start), None) is not None:
            module.all_tied_weights_keys = {**tied, **dict(own)}
        declared = dict(getattr(module, "_tied_weights_keys", None) or {})
        if declared.pop(dense.removeprefix(start), None) is not None:
            # patterns, which must not take `codes` for the beginning of `codes_1`
            patterns = {f"{re.escape(a)}$": f"{re.escape(b)}$" for a, b in own}
            module._tied_weights_keys = {**declared, **patterns}


def untie_packed(model: Any) -> None:
    """Let transformers tie the dense weights again, as the classes of the model say."""
    for module in model.modules():
        if _is_transformers(module) and module.__dict__.pop("_tied_weights_keys", None):
            module.all_tied_weights_keys = module.get_expanded_tied_weights_keys(all_submodels=True)
