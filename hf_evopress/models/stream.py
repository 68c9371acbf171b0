"""Run any model of transformers with one stack of blocks block by block.

The model's own forward is run with the forwards of its decoder blocks replaced for a moment,
so that embeddings, masks, rotary tables, final norm and head are the model's own code and the
results are bit-identical to a plain call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..base.placement import Place, Visit, place_of, visiting
from .block_arguments import Arguments, as_form, held_bytes, same, split
from .classes import call
from .images import images_of
from .units import check_weights_stay, find_blocks

# keys of a config, and what blocks get from elsewhere than the block before them (Gemma 3n and 4)
_EXCHANGED = {
    "num_kv_shared_layers": "blocks that read the keys and values of others",
    "hidden_size_per_layer_input": "an embedding of the tokens for each block",
}
# model types, and what their blocks take or give besides hidden states of the tokens
_OTHER_BLOCKS = {
    "fsmt": "a decoder whose blocks get masks that depend on the tokens",
    "led": "an encoder that takes whole attention windows only",
    "pegasus_x": "an encoder whose blocks pass on states of global tokens as well",
    "prophetnet": "a decoder that computes several predictions of each token in one stack",
    "xlnet": "blocks of two streams, of the text and of what is predicted",
}
_MAX_SHAPES = 8  # without images, where masks depend on nothing else
_MAX_BYTES = 2**30  # masks grow with batch * seq^2; with images each batch has its own


_Key = tuple[int, int, Place, bytes]  # batch, seq, where it computes, tokens with images


class _Reached(Exception):
    """Ends a forward once the block of interest has been reached."""


class BlockStream:
    """A model as embed -> block 0 ... block n-1 -> head.

        stream = BlockStream(model)
        hidden = stream.embed(input_ids)
        for i in range(stream.n_blocks):
            hidden = stream.run_block(i, hidden, input_ids)
        logits = stream.head(input_ids, hidden)      # == model(input_ids).logits

    input_ids are LongTensors (batch, seq) without padding; hidden (batch, seq, dim). Works with
    and without autograd. What blocks get besides hidden states (masks, rotary tables) is
    captured once per (batch, seq) and reused; where the model was given images (see `images`), on
    which masks and positions may depend, once per batch of tokens, which `run_block` then needs.
    What is called logits here is what the class of the model puts out (see `classes`); where that
    is pooled, the head needs whole sequences.

    Where the model computes elsewhere than it lies (`base.placement`), the block that runs is
    brought there and stays until another runs; embeddings and head are brought when they run, and
    let go for the next block. `with stream:` has all at home again at the end.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.least_tokens = 1  # of a sequence
        self.names, self.blocks = self._find()
        inside = {id(module) for block in self.blocks for module in block.modules()}
        self._outside = [module for module in model.modules() if id(module) not in inside]
        self._captured: dict[_Key, list[Arguments]] = {}
        self._held: dict[_Key, int] = {}  # bytes of these
        self._tuple_sizes: list[int] | None = None
        self._embedded: Tensor | None = None  # with images, of the tokens that were captured last
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
    def adds_between(self) -> bool:
        """Whether the model adds features of images to what a block puts out, as so far seen."""
        return any(one.added is not None for seen in self._captured.values() for one in seen)

    @property
    def _has_images(self) -> bool:
        """Whether what blocks get may depend on images that the model was given."""
        images = images_of(self.model)
        return images is not None and images.in_masks

    @property
    def n_blocks(self) -> int:
        return len(self.blocks)

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the input of block 0, (batch, seq, dim)."""
        _check_ids(input_ids)
        self._embedded = None
        self._arguments(input_ids, input_ids)
        embedded, self._embedded = self._embedded, None
        if embedded is not None and not torch.is_grad_enabled():
            return embedded  # the tower of images need not run once more
        seen: list[Tensor] = []

        def reach(*args: Any, **kwargs: Any) -> Any:
            seen.append(split(args, kwargs)[0])
            raise _Reached

        with self._patched({0: reach}):
            try:
                self._forward(input_ids)
            except _Reached:
                return seen[0]
        raise ValueError(f"{type(self.model).__name__} never ran its block {self.names[0]}")

    def run_block(self, i: int, hidden: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """Return the output of block i, (batch, seq, dim).

        input_ids: the tokens that the hidden states are of, needed where there may be images.
        """
        arguments = self._arguments(hidden, input_ids)[i]
        self._embedded = None
        self._let_go("ends")
        self.bring(i)
        return arguments.output(self.blocks[i], self.place.on_device(hidden))

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
                hidden = [self.run_block(i, h, ids) for ids, h in zip(batches, hidden, strict=True)]
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

    def _arguments(self, of: Tensor, input_ids: Tensor | None) -> list[Arguments]:
        """Return what the blocks get for hidden states or tokens `of` (batch, seq, ...)."""
        key: _Key = (int(of.shape[0]), int(of.shape[1]), self.place, b"")
        if self._has_images:
            if input_ids is None:
                raise ValueError(
                    f"{type(self.model).__name__} was given images, which this step does not take "
                    "along: take text without images"
                )
            key = (*key[:3], input_ids.cpu().numpy().tobytes())
        if key not in self._captured:
            if input_ids is None:
                input_ids = torch.zeros(key[:2], dtype=torch.long)
            self._capture(input_ids, key)
        return self._captured[key]

    def _forward(self, input_ids: Tensor, *, with_images: bool = True) -> Tensor:
        self._bring("ends", 0, self._outside)
        device = next(self.model.get_input_embeddings().parameters()).device  # type: ignore[operator]
        return call(self.model, input_ids.to(device), with_images=with_images)

    def _give(self, i: int, hidden: Tensor) -> Callable[..., Any]:
        """Return a forward for block i that ignores its input and gives `hidden`."""
        size = self._sizes()[i]
        return lambda *args, **kwargs: as_form(hidden, size)

    def _inject(self, i: int, hidden: Tensor) -> Callable[..., Any]:
        """Return a forward for block i that runs it on `hidden` instead of its input."""
        forward = self.blocks[i].forward

        def injected(*args: Any, **kwargs: Any) -> Any:
            self.bring(i)
            return split(args, kwargs)[1].call(forward, hidden)

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
                    sizes[i] = len(out) if isinstance(out, (tuple, list)) else 0
                    return out

                return watched

            with torch.no_grad(), self._patched({i: watch(i) for i in range(self.n_blocks)}):
                self._forward(torch.zeros((1, self.least_tokens), dtype=torch.long))
            self._tuple_sizes = sizes
        return self._tuple_sizes

    def _capture(self, input_ids: Tensor, key: _Key) -> None:
        """Record what the blocks get for these tokens; of this shape, where there are no images."""
        has_images = self._has_images
        with torch.inference_mode(False), torch.no_grad():  # reused later under autograd
            ids = input_ids.clone()
            arguments = self._record(ids)
            other = arguments if has_images else self._record(ids.flip(-1).roll(1, 0))
        for i, (one, two) in enumerate(zip(arguments, other, strict=True)):
            if not (same(one.args, two.args) and same(one.kwargs, two.kwargs)):
                raise ValueError(
                    f"block {self.names[i]} of {type(self.model).__name__} gets inputs other than "
                    "hidden states that depend on the tokens and cannot be streamed"
                )
        self._held[key] = held_bytes(arguments)
        while self._captured and (
            sum(self._held.values()) > _MAX_BYTES
            or (not has_images and len(self._captured) >= _MAX_SHAPES)
        ):
            oldest = next(iter(self._captured))
            del self._captured[oldest], self._held[oldest]
        self._captured[key] = arguments

    def _record(self, input_ids: Tensor) -> list[Arguments]:
        """Return the arguments of every block; blocks are passed by, the head is not run."""
        sizes, has_images = self._sizes(), self._has_images
        seen: dict[int, Arguments] = {}

        def note(i: int) -> Callable[..., Any]:
            def noted(*args: Any, **kwargs: Any) -> Any:
                hidden, seen[i] = split(args, kwargs)
                if has_images and i == 0:
                    self._embedded = hidden
                if has_images and i > 0 and hidden.any():  # the block before put out nothing
                    seen[i - 1] = replace(seen[i - 1], added=hidden)
                if i == self.n_blocks - 1:
                    raise _Reached
                return as_form(torch.zeros_like(hidden) if has_images else hidden, sizes[i])

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
    check_weights_stay(model)
    config: Any = model.config
    text = config.get_text_config(decoder=True)
    found = [
        f" with {key}={n} has {what}"
        for key, what in _EXCHANGED.items()
        if (n := getattr(text, key, None))
    ]
    if (other := _OTHER_BLOCKS.get(config.model_type)) is not None:
        found.append(f" has {other}")
    if found:
        raise ValueError(
            f"{type(model).__name__}{found[0]}, so it cannot be computed block by block as "
            "calibration and search do; levels that need no data can be given to it by "
            "EvoPressConfig(plan=...)"
        )


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.ndim != 2 or input_ids.dtype != torch.long:
        raise ValueError(
            f"input_ids must be a LongTensor (batch, seq), got {tuple(input_ids.shape)} "
            f"{input_ids.dtype}"
        )
