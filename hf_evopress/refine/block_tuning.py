"""Tune the levels of one decoder block until its output is close to the dense block's.

The loss is the squared difference of the block's outputs in the metric of the output-gradient
moment G (what the final loss makes of a change there; identity where it is not known), relative
to the output's own size, with position 0 a term of its own: attention sinks live there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.placement import device_of
from ..calibration.two_streams import TwoStreams
from ..methods import compose
from ..methods.base import State
from ..methods.maths.decompositions import cholesky
from ..models.patching import patched

SLOWER = 0.2  # rates of the next attempt
SINK = 0.05  # weight of position 0 beside the mean of all others

logger = logging.getLogger(__name__)

Run = Callable[[Tensor], Tensor]  # hidden (batch, seq, dim) -> the block's output


@dataclass(frozen=True)
class Tuning:
    """How long and how fast. A latent travels at most steps * code_rate / 2 codes."""

    steps: int = 240
    batch: int = 1  # sequences per step
    # Rates fit the steps: with four times these the sixth block of SmolLM2-135M, whose inputs have
    # the errors of five, lost a third more, though a block on exact inputs lost less.
    code_rate: float = 0.0075  # of one code, falling linearly to 0
    float_rate: float = 5e-4
    weight_rate: float = 2e-3  # of a dense weight that is tuned before it is made (`in_turn`)
    zero_rate: float = 0.0075  # of one code; a zero point moves when it has gone half of one
    looks: int = 5  # how often the held-out loss is measured
    attempts: int = 3  # each at a fifth of the rates, where the one before improved nothing
    bfloat16: bool = False  # multiply in bfloat16: 2 to 3 times faster where the CPU has it
    seed: int = 0

    @property
    def rates(self) -> tuple[float, float, float]:
        """Of codes, scales and other floats, zero points."""
        return self.code_rate, self.float_rate, self.zero_rate

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "looks", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class BlockLoss:
    """Squared error of a block's outputs (batch, seq, dim) relative to the size of each position.

    Relative, because the norm that reads the residual stream divides by that size; a few
    positions with massive activations would otherwise be all that counts.
    """

    def __init__(self, G: Tensor | None = None, *, sink: float = SINK) -> None:
        self.root = None if G is None else _root(G)
        self.sink = sink

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        target = target.to(output.device)
        error = (output - target).float()
        if self.root is not None:
            error = error @ self.root.T
        size = target.float().square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        share = error.square().sum(-1) / size  # (batch, seq)
        first = self.sink * share[:, 0].mean()
        return first + share[:, 1:].mean() if share.shape[1] > 1 else first


def _root(G: Tensor, *, shrink: float = 0.1) -> Tensor:
    """Return R with R^T R = (1 - shrink) G + shrink mean(diag G) I: few tokens went into G."""
    G = G.double()
    mean = G.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    I = torch.eye(len(G), dtype=G.dtype, device=G.device)  # noqa: E741
    L = cholesky(((1 - shrink) * G + shrink * mean * I) / mean)
    return L.T.float().contiguous()


def block_loss(
    run: Run, loss: BlockLoss, inputs: Sequence[Tensor], targets: Sequence[Tensor]
) -> float:
    """Return the mean loss of a block over batches of inputs and the dense block's outputs."""
    with torch.no_grad():
        values = [loss(run(x), y) for x, y in zip(inputs, targets, strict=True)]
        return float(torch.stack(values).double().mean())


def tune_block(
    model: nn.Module,
    run: Run,
    tuned: Callable[[], Mapping[str, Any]],
    loss: BlockLoss,
    train: TwoStreams,
    heldout: TwoStreams,
    settings: Tuning,
) -> tuple[dict[str, State] | None, float, float]:
    """Return the states of the best step on held-out tokens, and the loss before and after.

    tuned() gives the levels as they are at the start. The states are None where no step was
    better: rates that are right for most blocks are too high for some of the first, where
    errors are small, so these are tried again at lower ones. Deterministic by the seed.
    """
    before = best = _heldout(model, run, tuned(), loss, heldout)
    states: dict[str, State] | None = None
    for slower in range(settings.attempts):
        rates = [r * SLOWER**slower for r in settings.rates]
        for value, now in _attempt(model, run, tuned(), loss, (train, heldout), settings, rates):
            if value < best:
                best, states = value, {unit: level.state() for unit, level in now.items()}
        if states is not None:
            break
    return states, before, best


def _attempt(
    model: nn.Module,
    run: Run,
    tuned: Mapping[str, Any],
    loss: BlockLoss,
    sets: tuple[TwoStreams, TwoStreams],
    settings: Tuning,
    rates: Sequence[float],
) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Yield the held-out loss and what it is the loss of, at each look."""
    train, heldout = sets
    groups = [
        {"params": [x for level in tuned.values() for x in level.latents()]},
        {"params": [x for level in tuned.values() for x in level.floats()]},
        {"params": [x for level in tuned.values() for x in level.moves()]},
    ]
    # Adam: of signs, momentum and signs of momentum it leaves the least held-out loss
    optimizer = torch.optim.Adam([g for g in groups if g["params"]], betas=(0.9, 0.95))
    firsts = [rate for g, rate in zip(groups, rates, strict=True) if g["params"]]
    looks = {round(settings.steps * (k + 1) / settings.looks) for k in range(settings.looks)}
    inputs, targets = (_sequences(x) for x in (train.compressed, train.targets))
    for step, picked in enumerate(_batches(len(inputs), settings)):
        mixed = torch.autocast(device_of(model).type, torch.bfloat16, enabled=settings.bfloat16)
        with torch.enable_grad(), patched(model, _forwards(model, tuned)), mixed:
            x, y = (torch.cat([all_of[i] for i in picked]) for all_of in (inputs, targets))
            value = loss(run(x), y)
        value.backward()
        for group, first in zip(optimizer.param_groups, firsts, strict=True):
            group["lr"] = (1.0 - step / settings.steps) * first
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for level in tuned.values():
            level.bound()
        if step + 1 in looks:
            now = _heldout(model, run, tuned, loss, heldout)
            logger.debug("step %d: train %.6f, held-out %.6f", step + 1, value.item(), now)
            yield now, tuned


def _heldout(
    model: nn.Module,
    run: Run,
    tuned: Mapping[str, Any],
    loss: BlockLoss,
    heldout: TwoStreams,
) -> float:
    with torch.no_grad(), patched(model, _forwards(model, tuned)):
        return block_loss(run, loss, heldout.compressed, heldout.targets)


def _sequences(batches: Sequence[Tensor]) -> list[Tensor]:
    return [sequence for batch in batches for sequence in batch.split(1)]


def _forwards(model: nn.Module, tuned: Mapping[str, Any]) -> dict[str, Any]:
    return {unit: _forward(model.get_submodule(unit), level) for unit, level in tuned.items()}


def _forward(module: Any, level: Any) -> Callable[[Tensor], Tensor]:
    fix = compose.bias_fix(level.level, level.start)
    bias = module.bias if fix is None else fix if module.bias is None else module.bias + fix
    weight = level.weight()
    return lambda x: F.linear(x, weight.to(x.dtype), bias)


def _batches(n: int, settings: Tuning) -> Iterator[list[int]]:
    """Yield the numbers of each step's sequences: a new random order each time all were seen."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = min(settings.batch, n)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(settings.steps):
        if len(order) < size:
            order = torch.randperm(n, generator=generator)
        yield order[:size].tolist()
        order = order[size:]
