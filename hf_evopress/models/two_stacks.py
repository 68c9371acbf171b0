"""Run an encoder-decoder block by block, as one line: the encoder's blocks, then the decoder's.

The states of source and target lie next to each other in one tensor (batch, source + target, dim).
A block of the encoder changes the first part; a block of the decoder changes the second and reads
the first, so that gradients of all cross attentions add up in it. With the encoder's last block its
final norm is run as well. All is the model's own code, and bit-identical to a plain call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from .block_arguments import Arguments, as_form, hidden_of, split
from .classes import n_source, source_of
from .stream import BlockStream, _check_ids, _Reached
from .units import find_stacks


class _Encoded:
    """Stands among the arguments of a block for what the encoder puts out."""


_ENCODED = _Encoded()


class TwoStackStream(BlockStream):
    """A BlockStream of an encoder-decoder; input_ids (batch, seq) are source and target.

    The first half is the source, or the places of sound (see `classes`). The logits are those of
    the target, (batch, target, vocab). Blocks of the encoder come first in `names` and `blocks`.
    """

    def _find(self) -> tuple[list[str], list[nn.Module]]:
        (encoder, first), (decoder, second) = find_stacks(self.model)
        self.n_encoder = len(first)
        names = [f"{encoder}.{i}" for i in range(len(first))]
        names += [f"{decoder}.{i}" for i in range(len(second))]
        self.encoder: Any = self.model.get_encoder()  # type: ignore[operator]
        self._puts_out: Any = BaseModelOutput  # the class of what it puts out
        self.least_tokens = n_source(self.model, 2) + 1
        return names, [*first, *second]

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the inputs of the first blocks of both stacks, (batch, seq, dim)."""
        _check_ids(input_ids)
        self._arguments(input_ids, input_ids)
        sizes = self._sizes()
        seen: list[Tensor] = []

        def reach(*args: Any, **kwargs: Any) -> Any:
            seen.append(split(args, kwargs)[0])
            if len(seen) == 2:
                raise _Reached
            return as_form(seen[0], sizes[0])

        patches = {i: _passing_by(sizes[i]) for i in range(1, self.n_encoder)}
        with self._patched({**patches, 0: reach, self.n_encoder: reach}):
            try:
                self._forward(input_ids)
            except _Reached:
                return torch.cat(seen, dim=1)
        raise ValueError(f"{type(self.model).__name__} never ran its decoder")

    def run_block(self, i: int, hidden: Tensor, input_ids: Tensor | None = None) -> Tensor:
        """Return the states of source and target after block i, (batch, seq, dim)."""
        arguments = self._arguments(hidden, input_ids)[i]
        self._let_go("ends")
        self.bring(i)
        hidden = self.place.on_device(hidden)
        n = n_source(self.model, hidden.shape[1])
        source, target = hidden[:, :n], hidden[:, n:]
        if i >= self.n_encoder:
            arguments = _with(arguments, _ENCODED, source)
            target = hidden_of(arguments.call(self.blocks[i], target))
        else:
            source = hidden_of(arguments.call(self.blocks[i], source))
        if i == self.n_encoder - 1:
            source = self._finish(source)
        return torch.cat([source, target], dim=1)

    def run_from(self, i: int, input_ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the logits of the target when `hidden` is the input of block i."""
        _check_ids(input_ids)
        if not 0 <= i <= self.n_blocks:
            raise ValueError(f"the model has blocks 0 to {self.n_blocks - 1}, got {i}")
        for j in range(i, self.n_blocks):
            hidden = self.run_block(j, hidden)
        hidden = self.place.on_device(hidden)
        n = n_source(self.model, hidden.shape[1])
        blocks = range(self.n_encoder, self.n_blocks)
        patches: dict[int, Callable[..., Any]] = {j: self._give(j, hidden[:, n:]) for j in blocks}
        # the decoder's blocks read nothing any more; the encoder need not run
        before = self.encoder.__dict__.get("forward")
        self.encoder.forward = lambda *args, **kwargs: self._puts_out(hidden[:, :n])
        try:
            with self._patched(patches):
                return self._forward(input_ids, with_images=False)  # they are in `hidden`
        finally:
            if before is None:
                del self.encoder.forward
            else:
                self.encoder.forward = before

    def _finish(self, source: Tensor) -> Tensor:
        """Return what the encoder makes of its last block's output."""
        self._bring("ends", 0, self._outside)
        device = next(self.model.get_input_embeddings().parameters()).device  # type: ignore[operator]
        # as many tokens as have a source of this length
        ids = torch.zeros(len(source), 2 * source.shape[1], dtype=torch.long, device=device)
        inputs = source_of(self.model, ids, with_sound=False)
        with self._patched({j: self._give(j, source) for j in range(self.n_encoder)}):
            return hidden_of(self.encoder(**inputs, return_dict=False))

    def _record(self, input_ids: Tensor) -> list[Arguments]:
        """Return the arguments of every block.

        Blocks are run: those of T5 get the position bias that the first of them makes.
        """
        seen: dict[int, Arguments] = {}
        encoded: list[Tensor] = []

        def note(i: int) -> Callable[..., Any]:
            forward = self.blocks[i].forward

            def noted(*args: Any, **kwargs: Any) -> Any:
                arguments = split(args, kwargs)[1]
                seen[i] = _with(arguments, encoded[0], _ENCODED) if encoded else arguments
                self.bring(i)
                return forward(*args, **kwargs)

            return noted

        def after_encoder(module: nn.Module, args: Any, out: Any) -> None:
            encoded.append(hidden_of(out[0]))
            if isinstance(out, ModelOutput):  # a decoder may ask for more (router_logits of Switch)
                self._puts_out = type(out)

        hook = self.encoder.register_forward_hook(after_encoder)
        try:
            with self._patched({i: note(i) for i in range(self.n_blocks)}):
                self._forward(input_ids)
        finally:
            hook.remove()
        if len(seen) < self.n_blocks:
            missing = next(name for i, name in enumerate(self.names) if i not in seen)
            raise ValueError(f"{type(self.model).__name__} never ran its block {missing}")
        return [seen[i] for i in range(self.n_blocks)]


def stream_of(model: nn.Module) -> BlockStream:
    """Return a model as a line of blocks, an encoder-decoder too."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return TwoStackStream(model)
    return BlockStream(model)


def _passing_by(size: int) -> Callable[..., Any]:
    """Return a forward of a block that puts out what comes in."""
    return lambda *args, **kwargs: as_form(split(args, kwargs)[0], size)


def _with(arguments: Arguments, old: Any, new: Any) -> Arguments:
    """Return arguments with one of them, found by identity, replaced."""
    args = tuple(new if value is old else value for value in arguments.args)
    kwargs = {key: new if value is old else value for key, value in arguments.kwargs.items()}
    return replace(arguments, args=args, kwargs=kwargs)
