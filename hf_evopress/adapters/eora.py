"""EoRA: the compression error of each layer, approximated at low rank, as a LoRA adapter.

Liu et al. 2024 (arXiv:2410.21271): the best rank-r answer B A to the error W - W_hat in the
metric of the layer's inputs. Closed form in `methods.lowrank`: no inverse of the Gram matrix,
nested in the rank, position 0 given its due. Inputs are those of the *compressed* model whose
earlier blocks are already repaired, on text of the user's task.

Works for any transformers model whose quantised linear layers say what their weight is, or answer
to an input, not only for evopress checkpoints: see `foreign`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.progress import Progress
from ..base.resources import parse_size
from ..calibration.asymmetric import CrossMoment, Shift, shifted_weight
from ..calibration.input_moments import check_tokens, distinct_inputs, first_tokens, unit_inputs
from ..methods import compose
from ..methods.maths.factors import FLOATS
from ..methods.maths.linalg import Stats
from ..methods.maths.metric import Metric
from ..models.stream import BlockStream
from ..models.units import Unit, find_units
from ..plans.level import Level
from .eora_ranks import ErrorCurve, ranks_for_size
from .folder import Factors, base_fingerprint, check_target, write_adapter
from .foreign import check_readable, dense_weight
from .peft_layers import takes_adapter

logger = logging.getLogger(__name__)

Moments = Callable[[int], Mapping[str, Tensor]]  # block -> unit -> G (out, out)
Choose = Callable[[str, "Residual"], int]  # unit, its error -> rank
BATCH_TOKENS = 4096


def eora(
    compressed: Any,
    dense: Any,
    tokens: Tensor,
    folder: str | Path,
    *,
    rank: int | None = None,
    size: str | int | None = None,
    error: float | None = None,
    prefix: bool = False,
    moments: Moments | None = None,
    sink: float = 0.05,
    dtype: str = "bfloat16",
    base_model: str | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> Path:
    """Return `folder` after writing the EoRA adapter of `compressed` into it.

    Exactly one of: rank, the same for every layer; size, bytes of the file ("8MB"), shared out
    by an exact knapsack over the error spectra, in nats if `moments` (see `sensitivity`) are
    given; error, the relative squared output error that each layer may keep.
    tokens (n_sequences, seq_len) int64 of the task's text. prefix: aim at the dense model's
    outputs of its own inputs, and so make up for what earlier blocks got wrong as well. dtype:
    of the factors, bfloat16 or float16.
    """
    check_target(folder)
    _check_request(rank, size, error, dtype)
    walk = Walk(
        compressed, dense, tokens,
        prefix=prefix, sink=sink, batch_tokens=batch_tokens, progress=progress,
    )  # fmt: skip
    if size is not None:
        curves = walk.curves(moments)
        ranks = ranks_for_size(curves, parse_size(size))
        choose: Choose = lambda name, residual: ranks[name]  # noqa: E731
    elif error is not None:
        choose = lambda name, residual: residual.curve(sink).rank_for(error)  # noqa: E731
    else:
        choose = lambda name, residual: rank or 0  # noqa: E731
    about = {
        "made_by": "eora",
        "base": base_fingerprint(compressed),
        "n_tokens": tokens.numel(),
        "asked": {"rank": rank, "size": size, "error": error, "prefix": prefix, "sink": sink},
    }
    factors = walk.factors(choose, dtype=dtype)
    base_model = base_model or getattr(compressed, "name_or_path", None)
    return write_adapter(folder, factors, base_model=base_model, about=about)


@dataclass(frozen=True)
class Residual:
    """The error of one layer and the inputs that it matters on.

    weight (out, in): what the layer should be; delta: that minus what it is; float32.
    """

    weight: Tensor
    delta: Tensor
    stats: Stats

    def curve(self, sink: float, G: Tensor | None = None) -> ErrorCurve:
        """Return what each rank leaves of the error."""
        values, U = Metric(self.stats, sink=sink).basis(self.delta)
        W = self.weight.double()
        output = float(((W @ self.stats.hessian(sink=sink).double()) * W).sum())
        shape = (self.delta.shape[0], self.delta.shape[1])
        return ErrorCurve.of(shape, values, U, output, G)


class Walk:
    """A compressed model and its dense base, gone through block by block, side by side.

    In memory: the hidden states of all tokens (twice with `prefix`) and one block's moments.
    """

    def __init__(
        self,
        compressed: Any,
        dense: Any,
        tokens: Tensor,
        *,
        prefix: bool = False,
        sink: float = 0.05,
        batch_tokens: int = BATCH_TOKENS,
        progress: Progress | None = None,
    ) -> None:
        check_tokens(tokens, dense.get_input_embeddings().weight.shape[0])
        self.compressed, self.dense, self.prefix, self.sink = compressed, dense, prefix, sink
        self.units = shared_units(compressed, dense)
        check_readable(compressed)
        self.sets = {"gram": tokens, "sink": first_tokens(tokens, 64)[:, None]}
        self.batch_tokens, self.progress = batch_tokens, progress

    def curves(self, moments: Moments | None = None) -> dict[str, ErrorCurve]:
        """Return the error curve of every layer, on the inputs of the model as it is."""
        found = {}
        for i, residuals, _ in self._blocks("spectra"):
            G = moments(i) if moments else {}
            for name, residual in residuals.items():
                found[name] = residual.curve(self.sink, G.get(name))
        return found

    def factors(self, choose: Choose, *, dtype: str = "bfloat16") -> dict[str, Any]:
        """Return A and B of every layer that `choose` gives a rank above 0."""
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for _, residuals, repaired in self._blocks("adapter"):
            ranks = {name: _rank(choose(name, r), r) for name, r in residuals.items()}
            for names in _alike(residuals, ranks):
                level = _level(ranks[names[0]], dtype, self.sink)
                deltas = [residuals[name].delta for name in names]
                states = compose.compress_stacked(level, deltas, residuals[names[0]].stats)
                for name, state in zip(names, states, strict=True):
                    found[name] = repaired[name] = (state["A"], state["B"])
        return found

    @torch.no_grad()
    def _blocks(self, label: str) -> Iterator[tuple[int, dict[str, Residual], dict[str, Any]]]:
        """Yield block number, errors of its layers, and a dict that takes factors to go on with."""
        streams = {"compressed": BlockStream(self.compressed)}
        if self.prefix:
            streams["dense"] = BlockStream(self.dense)
        streams["compressed"].check(self.sets["gram"][:1, :8])
        hidden = {
            (which, kind): [stream.embed(ids) for ids in _batches(tokens, self.batch_tokens)]
            for which, stream in streams.items()
            for kind, tokens in self.sets.items()
        }
        by_block: dict[int, list[Unit]] = {}
        for unit in self.units:
            by_block.setdefault(unit.block, []).append(unit)
        for i in range(max(by_block) + 1):
            repaired: dict[str, Any] = {}
            for units in self._turns(streams["compressed"], hidden, by_block.get(i, []), i):
                with attached(self.compressed, repaired):
                    residuals = self._residuals(streams, hidden, units, i)
                yield i, residuals, repaired
            for (which, _), batches in hidden.items():
                with attached(self.compressed, repaired if which == "compressed" else {}):
                    batches[:] = [streams[which].run_block(i, h) for h in batches]
            if self.progress:
                self.progress(label, i + 1, max(by_block) + 1)

    def _turns(
        self,
        stream: BlockStream,
        hidden: Mapping[tuple[str, str], list[Tensor]],
        units: list[Unit],
        block: int,
    ) -> list[list[Unit]]:
        """Return the layers of a block in the groups that are repaired together.

        A layer that is to make up for what comes before it has to see the layers before it in
        the block repaired already: with `prefix` there is a group for each distinct input.
        """
        if not self.prefix or not units:
            return [units] if units else []
        with unit_inputs(self.compressed, [unit.name for unit in units]) as seen:
            stream.run_block(block, hidden["compressed", "sink"][0])
        groups = [group for group, _ in distinct_inputs(seen)]
        return [[unit for unit in units if unit.name in group] for group in groups]

    def _residuals(
        self,
        streams: Mapping[str, BlockStream],
        hidden: Mapping[tuple[str, str], list[Tensor]],
        units: Sequence[Unit],
        block: int,
    ) -> dict[str, Residual]:
        names = [unit.name for unit in units]
        crossed: dict[str, dict[tuple[str, ...], CrossMoment]] = {}
        for kind in self.sets:
            made = crossed.setdefault(kind, {})
            for n, h in enumerate(hidden["compressed", kind]):
                with unit_inputs(self.compressed, names) as seen:
                    streams["compressed"].run_block(block, h)
                other = seen
                if self.prefix:
                    with unit_inputs(self.dense, names) as other:
                        streams["dense"].run_block(block, hidden["dense", kind][n])
                for group, x in distinct_inputs(seen):
                    moment = made.setdefault(group, CrossMoment(x))
                    moment.add(other[group[0]], x) if self.prefix else moment.own.add(x)
        found = {}
        for group, moment in crossed["gram"].items():
            at_0 = crossed["sink"].get(group)
            stats = Stats(
                gram=moment.own.gram(),
                sink=at_0.own.gram() if at_0 else None,
                n_tokens=moment.own.n_tokens,
            )
            shift = Shift(moment.shift(), at_0.shift() if at_0 else None) if self.prefix else None
            for unit in (u for u in units if u.name in group):
                found[unit.name] = self._residual(unit, stats, shift)
        return found

    def _residual(self, unit: Unit, stats: Stats, shift: Shift | None) -> Residual:
        W = self.dense.get_submodule(unit.name).weight.detach().float()
        module = self.compressed.get_submodule(unit.name)
        W_hat = dense_weight(module, unit.shape, self.compressed.dtype)
        target = W if shift is None else shifted_weight(W, stats, shift, sink=self.sink)
        return Residual(W, target - W_hat.to(W.device), stats)


def shared_units(compressed: nn.Module, dense: nn.Module) -> list[Unit]:
    """Return the linear layers of `dense` that `compressed` has as well, of the same shape."""
    modules = dict(compressed.named_modules())
    units = [unit for unit in find_units(dense) if unit.name in modules]
    units = [unit for unit in units if takes_adapter(dense, unit.name)]
    if not units:
        raise ValueError(
            f"{type(compressed).__name__} and {type(dense).__name__} share no linear layers; "
            "give the dense model that the compressed one was made from"
        )
    for unit in units:
        module = modules[unit.name]
        shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if None not in shape and shape != unit.shape:
            raise ValueError(
                f"{unit.name} is {shape} in the compressed model and {unit.shape} in the dense "
                "one; give the dense model that the compressed one was made from (of a model that "
                "`widths` narrowed, the folder dense in its work folder's width-...)"
            )
    return units


@contextmanager
def attached(model: nn.Module, factors: Factors) -> Iterator[None]:
    """Let layers answer with B (A x) added, for a while."""

    def add(A: Tensor, B: Tensor) -> Callable[..., Tensor]:
        def added(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            x = args[0]
            return out + F.linear(F.linear(x, A.to(x)), B.to(x)).to(out.dtype)

        return added

    hooks = [
        model.get_submodule(n).register_forward_hook(add(*pair)) for n, pair in factors.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_request(
    rank: int | None, size: str | int | None, error: float | None, dtype: str
) -> None:
    given = {k: v for k, v in (("rank", rank), ("size", size), ("error", error)) if v is not None}
    if len(given) != 1:
        raise ValueError(f"say how large the adapter is by rank, size or error; got {given}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank is 1 or more, got {rank}")
    if error is not None and not 0 < error < 1:
        raise ValueError(f"error is the share of each layer's output, in (0, 1); got {error}")
    if dtype not in FLOATS:
        raise ValueError(f"factors are stored as {' or '.join(FLOATS)}, got {dtype!r}")
    if size is not None:
        parse_size(size)


def _rank(asked: int, residual: Residual) -> int:
    """Return the rank that makes sense: none for a layer without error."""
    return min(asked, *residual.delta.shape) if bool(residual.delta.any()) else 0


def _level(rank: int, dtype: str, sink: float) -> Level:
    return compose.normalize(f"lowrank:rank={rank},factors={dtype},sink={float(sink)}")


def _alike(residuals: Mapping[str, Residual], ranks: Mapping[str, int]) -> list[list[str]]:
    """Return groups of layers with one input and one rank, without those of rank 0."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, residual in residuals.items():
        if ranks[name]:
            groups.setdefault((id(residual.stats), ranks[name]), []).append(name)
    return list(groups.values())


def _batches(tokens: Tensor, batch_tokens: int) -> tuple[Tensor, ...]:
    return tokens.split(max(1, batch_tokens // tokens.shape[1]))
