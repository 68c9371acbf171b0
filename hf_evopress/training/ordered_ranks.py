"""Ordered low-rank training: one checkpoint of which every rank is a level, by cutting factors.

    make_ordered(model)                                     # of lowrank levels, at their top ranks
    DistillationTrainer(model, args, train_dataset=data, teacher=dense,
                        callbacks=[OrderedRanks()]).train()
    settle(model)
    ordered_store("store", model, dense, ranks)             # every rank is a level for the search
    cut_ranks(model, 0.5)                                   # or one rank for all, in place

Maestro (Horvath et al. 2023, arXiv:2308.14929): each step draws a share b of all ranks and trains
W_b = B[:, :b] A[:b], the first b columns and rows alone, so that the most important directions
come first (eq. 3); `lasso` adds lambda sum_b (|B[:, b:]|_F + |A[b:]|_F), which takes ranks that
nobody needs to 0 (eq. 4). For one linear layer its optimum is the truncated SVD in the metric of
the inputs, from which `lowrank` levels start.

`RankTruncation` is Trained Rank Pruning (Xu et al. 2019, arXiv:1812.02402): every m steps B A is
replaced by its own truncated SVD that loses a share `error` of the squared spectrum, here of B A D,
D the size of the inputs; `nuclear` first takes so much from each singular value, the proximal step
of the nuclear norm.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..base.placement import on_cpu
from ..base.ranks import mean_over_group
from ..loading.layers import CompressedLinear, compressed_linears
from ..loading.quantizer import attach
from ..methods import compose
from ..methods.maths.decompositions import qr, svd
from ..models.units import Unit, find_units
from ..plans.level import Level, Term
from ..plans.plan import Plan
from ..store.index import new_index, start
from ..store.judge import Judge
from ..store.level_store import LevelStore, Source
from ..store.unit_file import write_unit
from .tunable import make_tunable


class OrderedLinear(CompressedLinear):
    """A low-rank layer that computes with its first `active` ranks; with all where it is None."""

    active: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        if self.active is None:
            return super().forward(input)
        A, B = (self.get_parameter(name).to(input.dtype) for name in ("A", "B"))
        hidden = nn.functional.linear(input, A[: self.active])
        return nn.functional.linear(hidden, B[:, : self.active], self.bias)


def make_ordered(model: Any, kinds: Sequence[str] = ("factors", "norms")) -> list[str]:
    """Return the names of the layers whose ranks are trained in order from now on.

    Those are all at a single `lowrank` level with float factors; `kinds` as for `make_tunable`,
    which this calls. Raises ValueError where there are none.
    """
    found = dict(_lowrank(model))
    if not found:
        levels = sorted({str(layer.level) for layer in compressed_linears(model).values()})
        raise ValueError(
            "ordered training needs layers at a level such as lowrank:rank=64, with float factors "
            f"and no other term; the model's are {', '.join(levels) or 'all dense'}"
        )
    for name, layer in found.items():
        model.set_submodule(name, _made(OrderedLinear, layer, layer.level, layer.state))
    make_tunable(model, kinds)
    return list(found)


class OrderedRanks(TrainerCallback):
    """Draw for each step the share of ranks that it trains, the same in all layers.

    least: the smallest share; full: the probability of all ranks, without which the last of them
    would hardly be trained. lasso: lambda of the module. Draws depend on seed and step only, so a
    resumed run equals a straight one.
    """

    def __init__(
        self, *, least: float = 0.25, full: float = 0.2, lasso: float = 0.0, seed: int = 0
    ) -> None:
        if not (0 < least <= 1 and 0 <= full <= 1 and lasso >= 0):
            raise ValueError(
                f"least is in (0, 1], full in [0, 1], lasso 0 or more; got least={least}, "
                f"full={full}, lasso={lasso}"
            )
        self.least, self.full, self.lasso, self.seed = least, full, lasso, seed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not any(isinstance(m, OrderedLinear) for m in kwargs["model"].modules()):
            raise ValueError("no layer is trained in order: call make_ordered(model) first")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        draw = random.Random(f"{self.seed} {state.global_step}")
        share = 1.0 if draw.random() < self.full else draw.uniform(self.least, 1.0)
        for layer in _ordered(kwargs["model"]):
            layer.active = rank_of(layer, share)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.lasso:
            for layer in _ordered(kwargs["model"]):
                A, B = _factors(layer)
                for factor, X in ((A, A.detach()), (B, B.detach().T)):
                    gradient = self.lasso * lasso_gradient(X)
                    gradient = gradient if factor is A else gradient.T
                    factor.grad = gradient if factor.grad is None else factor.grad.add_(gradient)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in _ordered(kwargs["model"]):
            layer.active = None  # evaluations and checkpoints see all ranks


class RankTruncation(TrainerCallback):
    """Replace B A by its truncated SVD at every `every`-th step; what is cut off becomes 0.

    error: the share of the squared spectrum that may go. nuclear: taken from every singular
    value before. Ranks stay in order of their singular values. weighted: the spectrum is that of
    B A D, D the sizes of the step's inputs, of mean square 1, so that what goes is what the outputs
    need least; without, the paper's, in which columns of large inputs count as all others.
    """

    def __init__(
        self, *, every: int, error: float = 1e-3, nuclear: float = 0.0, weighted: bool = True
    ) -> None:
        if every < 1 or not 0 <= error < 1 or nuclear < 0:
            raise ValueError(
                f"every is 1 or more, error in [0, 1), nuclear 0 or more; got every={every}, "
                f"error={error}, nuclear={nuclear}"
            )
        self.every, self.error, self.nuclear, self.weighted = every, error, nuclear, weighted
        self.ranks: dict[str, int] = {}  # layer -> what the last truncation kept
        self._inputs: dict[str, Tensor] = {}  # layer -> sum of squared inputs (in,), of this step
        self._hooks: list[Any] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget()  # what a step that was broken off has left
        if self.weighted and (state.global_step + 1) % self.every == 0:
            for name, layer in _lowrank(kwargs["model"]):
                self._hooks.append(layer.register_forward_pre_hook(partial(self._see, name)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            for name, layer in _lowrank(kwargs["model"]):
                D = None
                if self.weighted:
                    seen = self._inputs.get(name, torch.zeros_like(_factors(layer)[0][0]))
                    D = _sizes(mean_over_group(seen.float()))
                self.ranks[name] = truncate(layer, error=self.error, nuclear=self.nuclear, D=D)
        self._forget()

    def _forget(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._inputs = [], {}

    def _see(self, name: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        squares = args[0].detach().flatten(0, -2).float().square().sum(0)
        self._inputs[name] = self._inputs.get(name, 0.0) + squares


def _sizes(squares: Tensor) -> Tensor:
    """Return sizes (in,) of mean square 1 from sums of squares, none below 1e-3; 1 without any."""
    mean = squares.mean()
    return (squares / mean).clamp(min=1e-6).sqrt() if mean > 0 else torch.ones_like(squares)


@torch.no_grad()
def truncate(
    layer: CompressedLinear, *, error: float, nuclear: float = 0.0, D: Tensor | None = None
) -> int:
    """Return the rank that is left of a layer's B A, in place; the factors keep their shapes.

    D (in,): what its columns weigh.
    """
    keep_A, keep_B = _factors(layer)
    A, B = keep_A.double(), keep_B.double()
    weights = A.new_ones(A.shape[1]) if D is None else D.to(A)
    (Qb, Rb), (Qa, Ra) = qr(B), qr((A * weights).T)
    U, S, Vt = svd(Rb @ Ra.T)
    S = (S - nuclear).clamp(min=0.0)
    energy = S.square()
    lost = energy.sum() - energy.cumsum(0)  # by keeping the first 1, 2, ...
    rank = int((lost > error * energy.sum() + 1e-12 * energy.sum()).sum()) + 1
    S[rank:] = 0.0
    root = S.sqrt()
    keep_B.copy_((Qb @ U) * root)
    keep_A.copy_(root[:, None] * (Vt @ Qa.T) / weights)
    return rank


def lasso_gradient(X: Tensor) -> Tensor:
    """Return the gradient of sum_b |X[b:]|_F, X (rank, n): X[i] times sum_{b <= i} 1 / |X[b:]|."""
    tails = X.float().square().sum(1).flip(0).cumsum(0).flip(0).sqrt()
    inverse = torch.where(tails > 0, 1 / tails.clamp(min=1e-12), 0.0)
    return X * inverse.cumsum(0)[:, None].to(X.dtype)


def rank_of(layer: CompressedLinear, share: float) -> int:
    """Return the rank of `layer` that is a share of its top rank, at least 1."""
    top = int(layer.level.terms[0].kwargs["rank"])
    return min(top, max(1, round(share * top)))


def cut_ranks(model: Any, ranks: float | Mapping[str, int]) -> Plan:
    """Return the plan of `model` after cutting its low-rank layers, in place.

    ranks: a share of every top rank, or layer -> rank (others keep theirs). Call `settle` before.
    """
    found = dict(_lowrank(model))
    if isinstance(ranks, Mapping):
        wanted = dict(ranks)
    else:
        wanted = {name: rank_of(layer, ranks) for name, layer in found.items()}
    if unknown := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"{unknown[0]} is no layer at a lowrank level")
    for name, rank in wanted.items():
        layer = found[name]
        level, state = _prefix(layer, rank)
        model.set_submodule(name, _made(CompressedLinear, layer, level, state))
    layers = compressed_linears(model)
    base = getattr(getattr(model.config, "quantization_config", None), "plan", None)
    plan = Plan(
        {name: layer.level for name, layer in layers.items()},
        shapes={name: layer.shape for name, layer in layers.items()},
        base_model=base.base_model if base else None,
    )
    attach(model, plan)
    return plan


@torch.no_grad()
def ordered_store(
    folder: str | Path,
    model: Any,
    dense: Any,
    ranks: Mapping[str, Sequence[int]] | Sequence[float],
    source: Source,
) -> LevelStore:
    """Return a level store in `folder` of `dense`, and of the trained factors cut to `ranks`.

    ranks: layer -> ranks, or shares of every top rank. source: what levels are scored with, as
    for `LevelStore.build`. The factors are stored once, as all ranks are leading parts of them.
    Call `settle` on `model` before. A finished unit is not written again.
    """
    layers = dict(_lowrank(model))
    units = [unit for unit in find_units(dense) if unit.name in layers]
    prefixes: dict[str, dict[Level, Any]] = {}
    for unit in units:
        layer = layers[unit.name]
        if isinstance(ranks, Mapping):
            numbers: Sequence[int] = ranks[unit.name]
        else:
            numbers = [rank_of(layer, share) for share in ranks]
        made = dict(_prefix(layer, rank) for rank in sorted({*numbers}))
        dense_level = compose.normalize("dense")
        W = dense.get_submodule(unit.name).weight.detach().float()
        prefixes[unit.name] = {**made, dense_level: compose.compress(dense_level, W, None)}
    menus = {name: list(made) for name, made in prefixes.items()}
    folder = Path(folder)
    start(folder, new_index(units, menus, source.fingerprint))
    for number, unit in enumerate(units):
        file = folder / f"unit_{number:05d}.safetensors"
        if not file.is_file():
            _write(file, unit, prefixes[unit.name], dense, source)
    return LevelStore(folder)


def _write(file: Path, unit: Unit, made: Mapping[Level, Any], dense: Any, source: Source) -> None:
    W = dense.get_submodule(unit.name).weight.detach().float()
    stats, losses = source.known([unit])
    judge = Judge(W, stats.get(unit.name), losses.get(unit.name))
    scores = [judge.scores(level, state) for level, state in made.items()]
    write_unit(file, unit.name, [on_cpu(state) for state in made.values()], scores)


def _factors(layer: CompressedLinear) -> tuple[nn.Parameter, nn.Parameter]:
    return layer.get_parameter("A"), layer.get_parameter("B")


def _prefix(layer: CompressedLinear, rank: int) -> tuple[Level, dict[str, Tensor]]:
    """Return the level of a layer's first `rank` ranks, and its tensors."""
    term = layer.level.terms[0]
    top = int(term.kwargs["rank"])
    if not 1 <= rank <= top:
        raise ValueError(f"a layer at '{layer.level}' has ranks 1 to {top}, got {rank}")
    level = compose.normalize(Level((Term.of(term.method, **{**term.kwargs, "rank": rank}),)))
    A, B = (factor.detach() for factor in _factors(layer))
    A, B = A[:rank], B[:, :rank]
    return level, {"A": A.contiguous(), "B": B.contiguous()}


def _made(
    kind: type[CompressedLinear], layer: CompressedLinear, level: Level, state: Mapping[str, Tensor]
) -> CompressedLinear:
    new = kind.from_state(level, dict(state), layer.bias, layer.shape, dtype=layer.weight_dtype)
    return new.train(layer.training)


def _ordered(model: Any) -> Iterator[OrderedLinear]:
    return (m for m in model.modules() if isinstance(m, OrderedLinear))


def _lowrank(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield name and layer of those at one lowrank term with float factors."""
    for name, layer in compressed_linears(model).items():
        is_one = len(layer.level.terms) == 1 and layer.level.terms[0].method == "lowrank"
        if is_one and sorted(layer.state) == ["A", "B"]:
            yield name, layer
