"""Make the levels of a block input by input, and tune what is still dense to make up for the rest.

Before each group of weights is compressed, all weights of the block that are not are tuned, as
plain numbers, until the block's output is close to the dense block's: they learn to undo the
errors of the compressed prefix and of the groups made so far, and are compressed from there. The
fine-tuning within blocks of QuIP# (Tseng et al. 2024, arXiv:2402.04396, section 5); any method
takes part, as only its targets change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.two_streams import Sets, cross_moments, input_groups
from ..methods import compose
from ..methods.base import State
from ..models.patching import operators, patched
from ..plans.level import DENSE, Level
from .block_tuning import BlockLoss, Run, Tuning, tune_block


class TunedWeight:
    """A dense weight that is tuned, by the interface of `learned_rounding.TunedLevel`.

    W (out, in) float32. It changes in units of its own root mean square.
    """

    level = DENSE

    def __init__(self, W: Tensor) -> None:
        self.W, self.start = W, {"weight": W}
        self.size = W.square().mean().sqrt()
        self.change = nn.Parameter(torch.zeros_like(W))

    def latents(self) -> Iterator[Tensor]:
        """Yield nothing: there are no codes."""
        yield from ()

    def floats(self) -> Iterator[Tensor]:
        """Yield the change of the weight."""
        yield self.change

    def moves(self) -> Iterator[Tensor]:
        """Yield nothing: there are no zero points."""
        yield from ()

    def bound(self) -> None:
        """Do nothing: any number is allowed."""

    def weight(self) -> Tensor:
        """Return the weight (out, in) float32 with its graph."""
        return self.W + self.size * self.change

    @torch.no_grad()
    def state(self) -> State:
        """Return the weight as it is now."""
        return {"weight": self.weight()}


def made_in_turn(
    sets: Sets,
    levels: Mapping[str, Level],
    dropped: Mapping[str, Any],
    *,
    run: Run,
    loss: BlockLoss,
    moments: Mapping[str, Tensor],
    settings: Tuning,
) -> dict[str, State]:
    """Return the levels of a block, each made from a weight tuned after those before it were made.

    moments: unit -> G, for levels that round with feedback along outputs. Steps are shared out
    over the groups of units with one input. Experts that no token goes to are left out.
    """
    stream = sets["gram"].stream
    with patched(stream.model, dropped):
        groups = input_groups(stream, sets["gram"].block, sets["gram"].dense[0], list(levels))
    steps = max(settings.looks, settings.steps // len(groups))
    tuning = dataclasses.replace(settings, steps=steps, float_rate=settings.weight_rate)
    weights = {unit: _dense(stream.model, unit) for group in groups for unit in group}
    made: dict[str, State] = {}
    forwards = dict(dropped)
    for group in groups:
        left = {unit: W for unit, W in weights.items() if unit not in made}

        def fresh(left: Mapping[str, Tensor] = left) -> dict[str, Any]:
            return {unit: TunedWeight(W) for unit, W in left.items()}

        with patched(stream.model, forwards):
            tuned, _, _ = tune_block(
                stream.model, run, fresh, loss, sets["gram"], sets["heldout"], tuning
            )
        weights |= {unit: state["weight"] for unit, state in (tuned or {}).items()}
        stats, _ = cross_moments(sets, group[0], forwards)
        for level in dict.fromkeys(levels[unit] for unit in group):
            units = [unit for unit in group if levels[unit] == level]
            known = stats.with_outputs(moments.get(unit) for unit in units)
            states = compose.compress_stacked(level, [weights[u] for u in units], known)
            made |= dict(zip(units, states, strict=True))
        forwards |= operators(stream.model, levels, {unit: made[unit] for unit in group})
    return {unit: made[unit] for unit in levels if unit in made}


def _dense(model: nn.Module, unit: str) -> Tensor:
    return model.get_submodule(unit).weight.detach().float()  # type: ignore[union-attr, operator]
