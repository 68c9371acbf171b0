"""Hidden states of the dense model and of the compressed prefix, advanced block by block.

What block i reads is known twice: as the dense model has it, and as the blocks before it, already
compressed, produce it. The differences are what refinement works on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.placement import device_of
from ..methods.maths.linalg import Stats
from ..models.experts import others
from ..models.patching import patched
from ..models.stream import BlockStream
from .asymmetric import CrossMoment, Shift
from .input_moments import distinct_inputs, first_tokens, unit_inputs

BATCH_TOKENS = 4096


class TwoStreams:
    """Hidden states of one set of sequences at the input of `block`, in batches.

    dense, compressed: (batch, seq, dim) each. After aim(): targets are the dense block's outputs,
    inputs (one dict per batch, unit -> tensor) what the units asked for read in it. bfloat16:
    multiply in it, where that is faster.
    """

    def __init__(
        self,
        stream: BlockStream,
        tokens: Tensor,
        *,
        batch_tokens: int,
        forwards: Mapping[str, Any] | None = None,
        bfloat16: bool = False,
    ) -> None:
        self.stream, self.block, self.bfloat16 = stream, 0, bfloat16
        batches = tokens.split(max(1, batch_tokens // tokens.shape[1]))
        rest = stream.place.let_rest
        self.dense = [rest(stream.embed(part)) for part in batches]
        self.compressed = list(self.dense)
        if forwards:
            with patched(stream.model, forwards):
                self.compressed = [rest(stream.embed(part)) for part in batches]
        self.targets: list[Tensor] = []
        self.inputs: list[dict[str, Tensor]] = []

    def aim(self, names: Sequence[str] = ()) -> None:
        """Run the dense block: its outputs are the targets. Keeps what the linears `names` read."""
        self.inputs = []
        if not names:
            self.targets = self._run(self.dense)
            return
        self.targets = []
        rest = self.stream.place.let_rest
        for hidden in self.dense:
            with unit_inputs(self.stream.model, names) as seen:
                self.targets += self._run([hidden])
            groups = ((group, rest(x)) for group, x in distinct_inputs(seen))
            self.inputs.append({name: x for group, x in groups for name in group})

    def advance(self) -> None:
        """Go on to the next block, while the model computes at the levels of this one."""
        self.compressed = self._run(self.compressed)
        self.dense, self.targets, self.block = self.targets, [], self.block + 1
        self.inputs = []

    def input_of(self, name: str, hidden: Tensor) -> Tensor | None:
        """Return what the linear called `name` reads when `hidden` goes into the block, if any."""
        with self._mixed():
            return input_of(self.stream, self.block, name, hidden)

    def _run(self, hidden: Sequence[Tensor]) -> list[Tensor]:
        stream = self.stream
        with self._mixed():
            return [stream.place.let_rest(stream.run_block(self.block, h)) for h in hidden]

    def _mixed(self) -> torch.autocast:
        kind = device_of(self.stream.model).type
        return torch.autocast(kind, torch.bfloat16, enabled=self.bfloat16)


Sets = Mapping[str, TwoStreams]


def two_streams(
    stream: BlockStream,
    tokens: Tensor,
    heldout: Tensor,
    *,
    n_sink: int = 64,
    batch_tokens: int = BATCH_TOKENS,
    forwards: Mapping[str, Any] | None = None,
    bfloat16: bool = False,
) -> Sets:
    """Return the streams of all tokens (gram), of single first tokens (sink), and held out.

    forwards: module path -> forward of a compressed embedding, with which the prefix begins.
    bfloat16: multiply in it, but for what is held out: that judges.
    """
    sets = {"gram": tokens, "sink": first_tokens(tokens, n_sink)[:, None], "heldout": heldout}
    how: dict[str, Any] = {"batch_tokens": batch_tokens, "forwards": forwards}
    return {
        kind: TwoStreams(stream, ids, bfloat16=bfloat16 and kind != "heldout", **how)
        for kind, ids in sets.items()
    }


def input_groups(
    stream: BlockStream, block: int, hidden: Tensor, names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return the units that share each distinct input, in the order in which they run.

    An expert that no token goes to is in none of them; another unit that is not run is an error.
    """
    with unit_inputs(stream.model, names) as seen:
        stream.run_block(block, hidden)
    groups = [group for group, _ in distinct_inputs(seen)]
    absent = set(names) - {name for group in groups for name in group}
    if absent := {name for name in absent if not others(name, names)}:
        raise ValueError(f"block {block} never ran {', '.join(sorted(absent))}")
    return groups


def cross_moments(sets: Sets, name: str, forwards: Mapping[str, Any]) -> tuple[Stats, Shift | None]:
    """Return the moments of a unit's input in the compressed stream, and its shift, float32.

    The streams have been aimed with this unit among the names. forwards: those of the units of
    this block that are finished, and of dropped sub-blocks. The shift is None where a unit sees
    other tokens in the two streams, as an expert may. ValueError where it sees none.
    """
    made: dict[str, CrossMoment] = {}
    is_paired = True
    for kind in ("gram", "sink"):
        streams = sets[kind]
        for inputs, dense, compressed in zip(
            streams.inputs, streams.dense, streams.compressed, strict=True
        ):
            x = inputs.get(name)
            with patched(streams.stream.model, forwards):
                own = streams.input_of(name, compressed)
            if own is None:  # an expert that no token of the batch goes to
                is_paired = False
                continue
            # experts see the tokens that are routed to them, which the two streams may do apart
            same = x is not None and x.shape == own.shape
            is_paired &= same and own[..., 0].numel() == dense[..., 0].numel()
            other = x.to(own.device) if x is not None and is_paired else own
            made.setdefault(kind, CrossMoment(own)).add(other, own)
    if "gram" not in made:
        raise ValueError(f"no token of the compressed model comes to {name}")
    gram, sink = made["gram"], made.get("sink")
    stats = Stats(
        gram.own.gram(),
        None if sink is None else sink.own.gram(),
        gram.own.mean(),
        gram.own.n_tokens,
    )
    if not is_paired or sink is None:
        return stats, None
    return stats, Shift(gram.shift(), sink.shift())


class _Reached(Exception):
    """Ends a forward once the input of interest has been seen."""


def input_of(stream: BlockStream, block: int, name: str, hidden: Tensor) -> Tensor | None:
    """Return what the linear called `name` reads when `hidden` goes into `block`, if anything."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["input"])
        raise _Reached

    hook = stream.model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    try:
        stream.run_block(block, hidden)
    except _Reached:
        return seen[0]
    finally:
        hook.remove()
    return None
