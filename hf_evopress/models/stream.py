"""Run any model of transformers with one stack of blocks block by block.

The model's own forward is run with the forwards of its decoder blocks replaced for a moment,
so that embeddings, masks, rotary tables, final norm and head are the model's own code and the
results are bit-identical to a plain call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.placement import Place, Visit, place_of, visiting
from .classes import call
from .images import images_of
from .units import find_blocks

# keys of a config, and what blocks get from elsewhere than the block before them (Gemma 3n and 4)
_EXCHANGED = {
    "num_kv_shared_layers": "blocks that read the keys and values of others",
    "hidden_size_per_layer_input": "an embedding of the tokens for each block",
}
_MAX_SHAPES = 8  # masks of eager attention grow with batch * seq^2


@dataclass(frozen=True)
class _Arguments:
    """What the model passes to one block besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_keyword: bool  # hidden states come as hidden_states=..., not as the first argument

    def call(self, block: Callable[..., Any], hidden: Tensor) -> Any:
        if self.is_keyword:
            return block(*self.args, hidden_states=hidden, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)


class _Reached(Exception):
    """Ends a forward once the block of interest has been reached."""


class BlockStream:
    """A model as embed -> block 0 ... block n-1 -> head.

        stream = BlockStream(model)
        hidden = stream.embed(input_ids)
        for i in range(stream.n_blocks):
            hidden = stream.run_block(i, hidden)
        logits = stream.head(input_ids, hidden)      # == model(input_ids).logits

    input_ids are LongTensors (batch, seq) without padding; hidden (batch, seq, dim). Works with
    and without autograd. What blocks get besides hidden states (masks, rotary tables) is
    captured once per (batch, seq) and reused. What is called logits here is what the class of the
    model puts out (see `classes`); where that is pooled, the head needs whole sequences.

    Where the model computes elsewhere than it lies (`base.placement`), the block that runs is
    brought there and stays until another runs; embeddings and head are brought when they run, and
    let go for the next block. `with stream:` has all at home again at the end.
    """

    least_tokens = 1  # of a sequence

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names, self.blocks = self._find()
        inside = {id(module) for block in self.blocks for module in block.modules()}
        self._outside = [module for module in model.modules() if id(module) not in inside]
        self._captured: dict[tuple[int, int, Place], list[_Arguments]] = {}
        self._tuple_sizes: list[int] | None = None
        self._here: dict[str, tuple[int, Place, Visit]] = {}  # what is brought: a block, the ends

    def _find(self) -> tuple[list[str], list[nn.Module]]:
        """Return the paths and the modules of the blocks."""
        path, blocks = find_blocks(self.model)
        return [f"{path}.{i}" for i in range(len(blocks))], list(blocks)

    def __enter__(self) -> BlockStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()

    @property
    def place(self) -> Place:
        """Where the model computes."""
        return place_of(self.model)

    def bring(self, i: int) -> None:
        """Have block i where it computes, in the place of the one that was there."""
        self._bring("block", i, self.blocks[i].modules())

    def let_go(self) -> None:
        """Let all that was brought go home."""
        for slot in list(self._here):
            self._let_go(slot)

    def _bring(self, slot: str, number: int, modules: Iterable[nn.Module]) -> None:
        place = self.place
        if (here := self._here.get(slot)) is not None and here[:2] == (number, place):
            return
        self._let_go(slot)
        self._here[slot] = (number, place, Visit(modules, place))

    def _let_go(self, slot: str) -> None:
        if (here := self._here.pop(slot, None)) is not None:
            here[2].end()

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the input of block 0, (batch, seq, dim)."""
        _check_ids(input_ids)
        if self._key(input_ids) not in self._captured:
            self._capture(input_ids)
        seen: list[Tensor] = []

        def reach(*args: Any, **kwargs: Any) -> Any:
            seen.append(_split(args, kwargs)[0])
            raise _Reached

        with self._patched({0: reach}):
            try:
                self._forward(input_ids)
            except _Reached:
                return seen[0]
        raise ValueError(f"{type(self.model).__name__} never ran its block {self.names[0]}")

    def run_block(self, i: int, hidden: Tensor) -> Tensor:
        """Return the output of block i, (batch, seq, dim)."""
        key = self._key(hidden)
        if key not in self._captured:
            self._capture(torch.zeros(key[:2], dtype=torch.long))
        self._let_go("ends")
        self.bring(i)
        hidden = self.place.on_device(hidden)
        return _hidden(self._captured[key][i].call(self.blocks[i], hidden))

    def run_from(self, i: int, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits when `hidden` is the input of block i, (batch, seq, vocab).

        i = n_blocks runs only the final norm and the head.
        """
        _check_ids(input_ids)
        if not 0 <= i <= self.n_blocks:
            raise ValueError(f"the model has blocks 0 to {self.n_blocks - 1}, got {i}")
        hidden = self.place.on_device(hidden)
        patches: dict[int, Callable[..., Any]] = {j: self._give(j, hidden) for j in range(i)}
        if i == 0:
            patches[0] = self._inject(0, hidden)
        with self._patched(patches):
            return self._forward(input_ids, with_images=False)  # they are in `hidden`

    def head(self, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits of the last block's output, (batch, seq, vocab)."""
        return self.run_from(self.n_blocks, input_ids, hidden)

    def head_chunks(
        self, input_ids: Tensor, hidden: Tensor, *, batch_size: int = 1
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield (sequences, logits) for `batch_size` sequences at a time: logits are large."""
        for start in range(0, len(input_ids), batch_size):
            part = slice(start, min(start + batch_size, len(input_ids)))
            yield part, self.head(input_ids[part], hidden[part])

    def check(self, input_ids: Tensor) -> None:
        """Raise ValueError if running block by block does not equal a plain forward.

        A guard for architectures whose blocks exchange more than hidden states: keys and values
        that later blocks share would be those of whichever batch came last.
        """
        check_streamable(self.model)
        batches = [input_ids, input_ids.flip(-1)]
        with torch.no_grad(), self._patched({}):
            hidden = [self.embed(ids) for ids in batches]
            for i in range(self.n_blocks):
                hidden = [self.run_block(i, h) for h in hidden]
            pairs = [
                (self.head(ids, h), self._forward(ids))
                for ids, h in zip(batches, hidden, strict=True)
            ]
        if not all(torch.allclose(*pair, rtol=0, atol=0, equal_nan=True) for pair in pairs):
            raise ValueError(
                f"{type(self.model).__name__} gives other logits block by block than as a whole: "
                "its blocks share state or draw random numbers; call model.eval(), or use a "
                "model whose decoder blocks exchange only hidden states"
            )

    def _key(self, of: Tensor) -> tuple[int, int, Place]:
        return (int(of.shape[0]), int(of.shape[1]), self.place)

    def _forward(self, input_ids: Tensor, *, with_images: bool = True) -> Tensor:
        self._bring("ends", 0, self._outside)
        device = next(self.model.get_input_embeddings().parameters()).device  # type: ignore[operator]
        return call(self.model, input_ids.to(device), with_images=with_images)

    def _give(self, i: int, hidden: Tensor) -> Callable[..., Any]:
        """Return a forward for block i that ignores its input and gives `hidden`."""
        size = self._sizes()[i]
        return lambda *args, **kwargs: _as_form(hidden, size)

    def _inject(self, i: int, hidden: Tensor) -> Callable[..., Any]:
        """Return a forward for block i that runs it on `hidden` instead of its input."""
        forward = self.blocks[i].forward

        def injected(*args: Any, **kwargs: Any) -> Any:
            self.bring(i)
            return _split(args, kwargs)[1].call(forward, hidden)

        return injected

    def _brought(self, i: int) -> Callable[..., Any]:
        """Return the forward of block i, brought to where it computes first."""
        forward = self.blocks[i].forward

        def run(*args: Any, **kwargs: Any) -> Any:
            self.bring(i)
            return forward(*args, **kwargs)

        return run

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Have the model itself run at its place, for a call or for generation.

        Block by block where hidden states do not stay there: the whole may not fit.
        """
        if self.place.rest is None:
            self.let_go()
            with visiting(self.model, self.place):
                yield self.model
            return
        with self, self._patched({}):
            self._bring("ends", 0, self._outside)
            yield self.model

    def _sizes(self) -> list[int]:
        """Return for each block the length of the tuple it returns, 0 for a bare tensor."""
        if self._tuple_sizes is None:
            sizes = [0] * self.n_blocks

            def watch(i: int) -> Callable[..., Any]:
                forward = self.blocks[i].forward

                def watched(*args: Any, **kwargs: Any) -> Any:
                    self.bring(i)
                    out = forward(*args, **kwargs)
                    sizes[i] = len(out) if isinstance(out, tuple) else 0
                    return out

                return watched

            with torch.no_grad(), self._patched({i: watch(i) for i in range(self.n_blocks)}):
                self._forward(torch.zeros((1, self.least_tokens), dtype=torch.long))
            self._tuple_sizes = sizes
        return self._tuple_sizes

    def _capture(self, input_ids: Tensor) -> None:
        """Record what the blocks get for sequences of this shape."""
        with torch.inference_mode(False), torch.no_grad():  # reused later under autograd
            ids = input_ids.clone()
            arguments = self._record(ids)
            other = self._record(ids.flip(-1).roll(1, 0))
        way_out = "" if images_of(self.model) is None else ": take text without images"
        for i, (one, two) in enumerate(zip(arguments, other, strict=True)):
            if not (_same(one.args, two.args) and _same(one.kwargs, two.kwargs)):
                raise ValueError(
                    f"block {self.names[i]} of {type(self.model).__name__} gets inputs other than "
                    f"hidden states that depend on the tokens and cannot be streamed{way_out}"
                )
        while len(self._captured) >= _MAX_SHAPES:
            del self._captured[next(iter(self._captured))]
        self._captured[self._key(ids)] = arguments

    def _record(self, input_ids: Tensor) -> list[_Arguments]:
        """Return the arguments of every block; blocks are passed by, the head is not run."""
        sizes = self._sizes()
        seen: dict[int, _Arguments] = {}

        def note(i: int) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                hidden, seen[i] = _split(args, kwargs)
                if i == self.n_blocks - 1:
                    raise _Reached
                return _as_form(hidden, sizes[i])

            return noted

        with self._patched({i: note(i) for i in range(self.n_blocks)}):
            try:
                self._forward(input_ids)
            except _Reached:
                return [seen[i] for i in range(self.n_blocks)]
        raise ValueError(f"{type(self.model).__name__} never ran its block {self.names[-1]}")

    @contextmanager
    def _patched(self, forwards: Mapping[int, Callable[..., Any]]) -> Iterator[None]:
        """Replace the forwards of some blocks, and restore them whatever happens.

        The others are brought when they run.
        """
        if self.place != Place():
            own = [i for i in range(self.n_blocks) if i not in forwards]
            forwards = {**forwards, **{i: self._brought(i) for i in own}}
        # accelerate hooks are instance attributes as well, so these must be put back, not deleted
        saved = {i: self.blocks[i].__dict__.get("forward") for i in forwards}
        try:
            for i, forward in forwards.items():
                self.blocks[i].forward = forward  # type: ignore[method-assign]
            yield
        finally:
            for i, before in saved.items():
                if before is not None:
                    self.blocks[i].forward = before  # type: ignore[method-assign]
                elif "forward" in self.blocks[i].__dict__:
                    del self.blocks[i].forward


def check_streamable(model: nn.Module) -> None:
    """Raise ValueError where the config says that blocks exchange more than hidden states."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    for key, what in _EXCHANGED.items():
        if n := getattr(config, key, None):
            raise ValueError(
                f"{type(model).__name__} with {key}={n} has {what}, so it cannot be computed block "
                "by block as calibration and search do; levels that need no data can be given to "
                "it by EvoPressConfig(plan=...)"
            )


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Arguments]:
    """Return the hidden states of a block call and everything else."""
    if args:
        return args[0], _Arguments(args[1:], dict(kwargs), False)
    rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
    return kwargs["hidden_states"], _Arguments((), rest, True)


def _hidden(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _as_form(hidden: Tensor, tuple_size: int) -> Any:
    return (hidden, *[None] * (tuple_size - 1)) if tuple_size else hidden


def _same(one: Any, two: Any) -> bool:
    """Return whether two nested arguments hold equal tensors."""
    if isinstance(one, Tensor):
        return isinstance(two, Tensor) and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[k], two[k]) for k in one)
    if isinstance(one, (tuple, list)):
        return len(one) == len(two) and all(map(_same, one, two))
    return True


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.ndim != 2 or input_ids.dtype != torch.long:
        raise ValueError(
            f"input_ids must be a LongTensor (batch, seq), got {tuple(input_ids.shape)} "
            f"{input_ids.dtype}"
        )
