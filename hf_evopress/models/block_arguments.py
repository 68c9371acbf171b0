"""What a model passes to its blocks besides hidden states, and the forms of what they return."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arguments:
    """What the model passes to one block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_keyword: bool  # hidden states come as hidden_states=..., not as the first argument
    added: Tensor | None = None  # to what the block puts out: features of images (Qwen3-VL)

    def call(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        if self.is_keyword:
            return block(*self.args, hidden_states=hidden, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)

    def output(self, block: Callable[..., Any], hidden: Tensor) -> Tensor:
        """Return the hidden states that go on to the next block."""
        out = hidden_of(self.call(block, hidden))
        return out if self.added is None else out + self.added


def split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Arguments]:
    """Return the hidden states of a block call and everything else."""
    if args:
        return args[0], Arguments(args[1:], dict(kwargs), False)
    rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
    return kwargs["hidden_states"], Arguments((), rest, True)


def hidden_of(out: Any) -> Tensor:
    return out[0] if isinstance(out, (tuple, list)) else out


def as_form(hidden: Tensor, tuple_size: int) -> Any:
    return (hidden, *[None] * (tuple_size - 1)) if tuple_size else hidden


def same(one: Any, two: Any) -> bool:
    """Return whether two nested arguments hold equal tensors."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(same, one, two))
    return True


def held_bytes(arguments: Sequence[Arguments]) -> int:
    """Return the bytes of all tensors in the arguments of blocks; what they share counts once."""
    found = [t for one in arguments for t in _tensors((one.args, one.kwargs, one.added))]
    storages = [tensor.untyped_storage() for tensor in found]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, tuple, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
