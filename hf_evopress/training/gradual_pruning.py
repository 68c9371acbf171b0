"""Gradual magnitude pruning: a Trainer callback that prunes while the model trains.

    pruning = GradualPruning(0.6, every=10)
    Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()
    to_sparse(model)                      # packed: `magnitude:sparsity=0.6` in every layer
    model.save_pretrained("sparse")

At steps t0, t0 + n, ... the share of zeros of each layer follows Zhu and Gupta 2017
(arXiv:1710.01878), eq. 1,

    s_t = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3

and the smallest |w|, or |w| sqrt(E x^2) where `inputs` are given, are masked. Between two updates
a masked weight has no gradient and stays 0; at an update those that were masked stay the smallest.

`PQStop` is the rule of SAP (Diao et al. 2023, arXiv:2302.05601): of the d weights that a layer has
left, at most d min(gamma (1 - r / d), beta) go at one update, r from the PQ-index of those d. A
layer whose weights are all of one size is then pruned no further, whatever the schedule wants.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..loading.layers import CompressedLinear
from ..loading.quantizer import attach
from ..loading.stitch import compress_model
from ..methods.maths.pq_index import P, Q, kept_share
from ..methods.maths.sparse import largest
from ..models.units import find_units
from ..plans.plan import Plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PQStop:
    """SAP's limit on what one update prunes of a layer: see the module.

    gamma: how much of what the index allows is taken; beta: the most of what is left.
    """

    p: float = P
    q: float = Q
    eta: float = 0.0
    gamma: float = 1.0
    beta: float = 0.9

    def __post_init__(self) -> None:
        if not (self.gamma > 0 and 0 < self.beta <= 1):
            raise ValueError(
                f"gamma is above 0 and beta in (0, 1]; got gamma={self.gamma}, beta={self.beta}"
            )

    def most(self, left: Tensor) -> int:
        """Return how many of the weights `left` (d,) may be pruned now."""
        share = 1 - kept_share(left, p=self.p, q=self.q, eta=self.eta)
        return int(len(left) * min(self.gamma * share, self.beta))


class GradualPruning(TrainerCallback):
    """Prune the linear layers of the decoder blocks step by step while Trainer trains them.

    sparsity: the share of zeros at the end, for all layers or by unit (others are left alone).
    start: the share at the first update. begin, end: steps between which updates fall, by default
    0 and three quarters of the run, so that the last quarter heals; every: steps between updates.
    inputs: unit -> second moments of its inputs (in,), to prune by |w| sqrt(E x^2). skip: patterns
    of units, as everywhere. A run that Trainer resumes reads the masks off the zeros.

    >>> Trainer(model, args, train_dataset=data, callbacks=[GradualPruning(0.6)])  # doctest: +SKIP
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float],
        *,
        start: float = 0.0,
        begin: int = 0,
        end: int | None = None,
        every: int = 10,
        inputs: Mapping[str, Tensor] | None = None,
        skip: Sequence[str] = (),
        stop: PQStop | None = None,
    ) -> None:
        given = sparsity.values() if isinstance(sparsity, Mapping) else [sparsity]
        for value in [start, *given]:
            if not 0 <= value < 1:
                raise ValueError(f"a sparsity is a share of zeros in [0, 1), got {value}")
        if begin < 0 or every < 1 or (end is not None and end < begin):
            raise ValueError(
                f"updates fall at begin, begin + every, ... up to end; got begin={begin}, "
                f"every={every}, end={end}"
            )
        self.sparsity, self.start, self.begin, self.end = sparsity, start, begin, end
        self.every, self.inputs, self.skip, self.stop = every, inputs, tuple(skip), stop
        self.masks: dict[str, Tensor] = {}  # unit -> (out, in) bool, True where kept
        self.history: list[tuple[int, float]] = []  # (step, share of zeros) of each update
        self._layers: dict[str, nn.Linear] = {}

    # -- what Trainer calls -----------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._layers = self._found(kwargs["model"])
        if self.end is None:
            self.end = max(self.begin, state.max_steps * 3 // 4)
        if self.begin > state.max_steps:
            raise ValueError(f"pruning begins at step {self.begin} of {state.max_steps}")
        if state.global_step and state.global_step >= self.begin:  # resumed
            self.masks = {n: m.weight.detach() != 0 for n, m in self._layers.items()}
            if not all(bool(mask.all()) for mask in self.masks.values()):
                return  # an update due at this step was done before the checkpoint
        self._maybe_update(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, mask in self.masks.items():
            gradient = self._layers[name].weight.grad
            if gradient is not None:
                gradient.mul_(mask)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._apply()  # weight decay and momentum of a masked weight move it

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._maybe_update(state.global_step)

    # -- pruning ------------------------------------------------------------------------------

    def wanted(self, step: int, final: float) -> float:
        """Return the share of zeros that the schedule has at `step`, for a layer's last share."""
        assert self.end is not None  # training has begun
        if step < self.begin:
            return 0.0
        done = min(1.0, (step - self.begin) / max(1, self.end - self.begin))
        return final + (min(self.start, final) - final) * (1 - done) ** 3

    @property
    def sparsities(self) -> dict[str, float]:
        """Unit -> the share of its weights that is masked."""
        return {name: 1 - float(mask.double().mean()) for name, mask in self.masks.items()}

    def _maybe_update(self, step: int) -> None:
        assert self.end is not None
        if not self.begin <= step <= self.end:
            return
        if (step - self.begin) % self.every and step != self.end:
            return
        for name, layer in self._layers.items():
            self.masks[name] = self._mask(name, layer.weight.detach(), step)
        self._apply()
        total = sum(mask.numel() for mask in self.masks.values())
        zeros = total - sum(int(mask.sum()) for mask in self.masks.values())
        self.history.append((step, zeros / total))
        logger.info("step %d: %.4f of the weights are pruned", step, zeros / total)

    def _mask(self, name: str, W: Tensor, step: int) -> Tensor:
        final = self.sparsity[name] if isinstance(self.sparsity, Mapping) else self.sparsity
        keep = W.numel() - round(W.numel() * self.wanted(step, final))
        scores = W.float().abs()
        if self.inputs is not None and name in self.inputs:
            scores = scores * self.inputs[name].to(W.device).float().clamp(min=0.0).sqrt()
        mask = self.masks.get(name)
        if mask is not None:
            scores = torch.where(mask, scores, -1.0)  # what was pruned stays behind what was not
            keep = min(keep, int(mask.sum()))
        if self.stop is not None:
            left = scores.flatten() if mask is None else scores[mask]
            keep = max(keep, len(left) - self.stop.most(left))
        return largest(scores, max(1, keep))

    @torch.no_grad()
    def _apply(self) -> None:
        for name, mask in self.masks.items():
            self._layers[name].weight.mul_(mask)

    def _found(self, model: Any) -> dict[str, nn.Linear]:
        units = [unit.name for unit in find_units(model, skip=self.skip)]
        if isinstance(self.sparsity, Mapping):
            unknown = sorted({*self.sparsity} - {*units})
            if unknown:
                raise ValueError(f"no linear layer {unknown[0]!r} in the blocks to prune")
            units = [name for name in units if name in self.sparsity]
        layers = {name: model.get_submodule(name) for name in units}
        for name, layer in layers.items():
            if isinstance(layer, CompressedLinear):
                raise ValueError(
                    f"{name} holds level '{layer.level}', whose codes cannot be pruned in "
                    "training: prune the dense model and quantise it then"
                )
            if not layer.weight.requires_grad:
                raise ValueError(f"{name} is frozen: pruning needs weights that are trained")
        return layers


def to_sparse(model: Any) -> Plan:
    """Return the plan of `model` after packing, in place, every layer that has zeros.

    A layer of share s of zeros takes level `magnitude:sparsity=s`, exactly those zeros; one
    without any stays dense. The kept weights are rounded to 16 bits.
    """
    levels: dict[str, Any] = {}
    units = find_units(model)
    for unit in units:
        W = model.get_submodule(unit.name).weight.detach()
        zeros = W.numel() - int(torch.count_nonzero(W))
        if zeros == W.numel():
            levels[unit.name] = "zero"
        elif zeros:
            values = "bfloat16" if W.dtype == torch.bfloat16 else "float16"
            levels[unit.name] = f"magnitude:sparsity={_share(zeros, W.numel())},values={values}"
        else:
            levels[unit.name] = "dense"
    if all(level == "dense" for level in levels.values()):
        raise ValueError("no linear layer of the model has a zero: there is nothing to pack")
    base = getattr(model.config, "_name_or_path", None) or None
    plan = Plan(levels, shapes={u.name: u.shape for u in units}, base_model=base)
    compress_model(model, plan, None)
    attach(model, plan)
    return plan


def _share(zeros: int, of: int) -> float:
    """Return the shortest sparsity that stands for exactly so many zeros, as a level counts."""
    short = (round(zeros / of, digits) for digits in range(2, 16))
    return next((s for s in short if 0 < s < 1 and round(of * s) == zeros), zeros / of)
