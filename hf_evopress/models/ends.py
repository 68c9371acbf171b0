"""The two ends of a model: its input embedding and its output head, units like any other.

Where both share one weight, as small models do, they are one unit by the name of the embedding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..base.patterns import matches
from .units import Unit, all_blocks, is_linear

Rows = Callable[[Tensor], Tensor]  # token ids (...) -> rows of the embedding (..., dim)


class End(NamedTuple):
    """An end of a model: its module path, its shape (tokens, dim), and a role as of a Unit."""

    name: str
    shape: tuple[int, int]
    role: str


def find_ends(model: nn.Module, *, skip: Sequence[str] = ()) -> list[Unit]:
    """Return the units of the input embedding and the output head, those that can be packed.

    One of role `tied` where they share a weight, else one of role `embedding` and one of role
    `head`. Left out are those that a glob or regular expression of `skip` matches, embeddings of
    other kinds than a look-up of rows, heads that are no linear layer, and all whose weight is
    that of modules other than these two: the shared embedding of encoder-decoders. Position
    embeddings, embeddings of the tokens for each block, and those of an encoder whose decoder has
    its own, are never units.
    """
    after = len(all_blocks(model))
    return [
        Unit(end.name, end.shape, after if end.role == "head" else -1, end.role)
        for end in ends_of(model)
        if not any(matches(end.name, pattern) for pattern in skip)
    ]


def ends_of(model: nn.Module) -> list[End]:
    """Return the ends that can be packed, of a model without a list of blocks, too."""
    embedding, head = input_embedding(model), output_head(model)
    ends = []
    if embedding is not None:
        name, module = embedding
        shape = (module.num_embeddings, module.embedding_dim)
        shared = _targets(model, name)
        if is_tied(model, name) or _is_of_encoder(model, module):
            pass  # the weight of another module, or the rows of a source
        elif not shared:
            ends.append(End(name, shape, "embedding"))
        elif head is not None and shared == [head[0]]:
            ends.append(End(name, shape, "tied"))
    if head is not None and not is_tied(model, head[0]) and not _targets(model, head[0]):
        name, module = head
        ends.append(End(name, (module.out_features, module.in_features), "head"))
    return ends


def input_embedding(model: nn.Module) -> tuple[str, Any] | None:
    """Return path and module of the input embedding where it looks up rows of its weight."""
    module = _own(model, "get_input_embeddings")
    kind: Any = type(module)
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    return (_path(model, module), module) if looks_up_rows(kind) else None


def has_embedding(model: nn.Module) -> bool:
    """Return whether a model says which module embeds its tokens."""
    return _own(model, "get_input_embeddings") is not None


def output_head(model: nn.Module) -> tuple[str, Any] | None:
    """Return path and module of the output head where it is a linear layer."""
    module = _own(model, "get_output_embeddings")
    return (_path(model, module), module) if module is not None and is_linear(module) else None


def is_tied(model: nn.Module, path: str) -> bool:
    """Return whether the weight of the module at `path` is that of another module."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return any(key.rpartition(".")[0] == path for key in tied)


@lru_cache(maxsize=None)
def looks_up_rows(kind: Any) -> bool:
    """Return whether an embedding class looks up rows and does something with them, or nothing.

    Such as to scale them: its own forward then calls that of nn.Embedding and no other product.
    """
    if kind.forward is nn.Embedding.forward:
        return True
    # ours stand for one that does
    if kind.__module__.partition(".")[0] == __name__.partition(".")[0]:
        return True
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    return "super().forward(" in source and "embedding(" not in source


def embedding_forward(module: nn.Embedding, rows: Rows) -> Callable[..., Tensor]:
    """Return what `module` does to token ids where the rows are those that `rows` looks up."""
    kind: Any = type(module)
    if kind.forward is nn.Embedding.forward:
        return rows
    stand_in = copy.copy(module)  # the same parameters and buffers
    stand_in.__class__ = _with_given_rows(kind)
    stand_in.__dict__["given_rows"] = rows
    stand_in.__dict__.pop("forward", None)
    return stand_in.forward


class _GivenRows(nn.Embedding):
    """The end of the line of inheritance: rows come from elsewhere than the weight."""

    given_rows: Rows

    def forward(self, input: Tensor) -> Tensor:
        return self.given_rows(input)


@lru_cache(maxsize=None)
def _with_given_rows(kind: Any) -> type:
    return type(kind.__name__, (kind, _GivenRows), {})


def _targets(model: nn.Module, name: str) -> list[str]:
    """Return the paths of the modules whose weight is that of the module called `name`."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    found = {
        target.rpartition(".")[0]
        for target, source in tied.items()
        if source.rpartition(".")[0] == name
    }
    return sorted(found)


def _is_of_encoder(model: Any, module: nn.Module) -> bool:
    """Return whether `module` is an encoder-decoder's and not in its decoder, as Whisper's is."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    decoder = _own(model, "get_decoder")
    return decoder is None or all(found is not module for found in decoder.modules())


def _own(model: nn.Module, getter: str) -> Any:
    try:
        return getattr(model, getter, lambda: None)()
    except (AttributeError, RuntimeError):  # models that have none say so by an error
        return None


def _path(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)
