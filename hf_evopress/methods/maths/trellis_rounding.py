"""Weights to walks through a trellis: rotate, round in step, rescale, pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import channel_scales
from .codebook import codebook, spread
from .linalg import Stats
from .rotation import WHOLE, rotate, rotate_moment, unrotate
from .tile_order import along_walk, in_rows
from .two_sided import TILE, Weight, block_factor, round_in_step
from .viterbi import encode
from .walks import LENGTH, pack_starts, pack_walks

ROTATIONS = ("full", "none", "256", "128", "64", "32")
FEEDBACKS = ("both", "inputs", "none")
# Codebook width over the weights' that leaves the least error on Gaussian weights.
GAIN: dict[float, float] = {
    **{1: 0.9, 1.5: 0.97, 2: 1.03, 2.5: 1.06, 3: 1.09, 3.5: 1.1, 4: 1.12, 4.5: 1.13},
    **{5: 1.15, 6: 1.19, 7: 1.22, 8: 1.3},
}
MAX_VALUES = 2**27  # float32 numbers of all weights that are rounded in step: 512 MB

Settings = Mapping[str, Any]


def block_of(rotation: str) -> int:
    """Return the block size of a rotation, 0 for the whole side or none at all."""
    return int(rotation) if rotation.isdecimal() else WHOLE


def rotate_inputs(X: Tensor, rotation: str, seed: int) -> Tensor:
    """Return Q_i X for X (in, n)."""
    return X.float() if rotation == "none" else rotate(X, 2 * seed, block_of(rotation))


def rotate_outputs(X: Tensor, rotation: str, seed: int) -> Tensor:
    """Return Q_o X for X (out, n)."""
    return X.float() if rotation == "none" else rotate(X, 2 * seed + 1, block_of(rotation))


def unrotate_outputs(X: Tensor, rotation: str, seed: int) -> Tensor:
    """Return Q_o^T X for X (out, n)."""
    return X.float() if rotation == "none" else unrotate(X, 2 * seed + 1, block_of(rotation))


def unrotate_sides(Y: Tensor, rotation: str, seed: int) -> Tensor:
    """Return Q_o^T Y Q_i for Y (out, in)."""
    if rotation == "none":
        return Y
    half = unrotate(Y.T.contiguous(), 2 * seed, block_of(rotation))
    return unrotate_outputs(half.T.contiguous(), rotation, seed)


@dataclass
class _Job:
    """One weight at one setting, in the rotated basis."""

    R: Tensor
    H: Tensor | None
    G: Tensor | None
    weight: Weight
    params: Settings
    channels: _Channels | None
    scale: float
    states: Tensor  # (rows of tiles, columns of tiles, 256) int32

    @property
    def kind(self) -> tuple[Any, ...]:
        """What walks must have in common to be looked for together."""
        return tuple(self.params[k] for k in ("bits", "state_bits", "codebook", "tail_biting"))


def round_weights(
    Ws: Sequence[Tensor], stats: Stats | None, settings: Sequence[Settings]
) -> list[list[dict[str, Tensor]]]:
    """Return, per setting, the packed tensors of weights W (out_i, in) that share one input."""
    made: dict[tuple[int, int], dict[str, Tensor]] = {}
    waiting: dict[tuple[int, int], _Job] = {}
    rotated: dict[tuple[Any, ...], _Rotated] = {}
    for s, params in enumerate(settings):
        for w, W in enumerate(Ws):
            key = (w, *(params[k] for k in _ROTATED_BY))
            if key not in rotated:
                rotated[key] = _Rotated.of(W, w, stats, params)
            job = _job(rotated[key], params)
            if waiting and _values([*waiting.values(), job]) > MAX_VALUES:
                made |= _finish(waiting)
                waiting = {}
            waiting[s, w] = job
    made |= _finish(waiting)
    return [[made[s, w] for w in range(len(Ws))] for s in range(len(settings))]


_ROTATED_BY = ("rotation", "seed", "scales", "feedback", "damp", "damp_outputs", "sink")


@dataclass
class _Channels:
    """A weight as it is, the scales of its rows and columns, and its damped moments."""

    W: Tensor
    a: Tensor
    b: Tensor
    H: Tensor | None = None
    G: Tensor | None = None


@dataclass
class _Rotated:
    """A weight and its moments in the rotated basis, and the moments' factors."""

    R: Tensor
    H: Tensor | None = None
    G: Tensor | None = None
    M: Tensor | None = None
    N: Tensor | None = None
    channels: _Channels | None = None

    @classmethod
    def of(cls, W: Tensor, index: int, stats: Stats | None, params: Settings) -> _Rotated:
        rotation, seed = params["rotation"], params["seed"]
        W = W.to(W.device if stats is None else stats.gram.device, torch.float32)
        channels = None
        if params["scales"] == "channels":
            channels = _Channels(W, *channel_scales.flatten(W))
            W = channel_scales.divided(W, channels.a, channels.b)
        half = rotate_outputs(W, rotation, seed)
        R = rotate_inputs(half.T.contiguous(), rotation, seed).T.contiguous()
        made = cls(R, channels=channels)
        if params["feedback"] == "none" or stats is None:
            return made
        made._add_inputs(stats, params)
        G = stats.outputs[index] if stats.outputs and params["feedback"] == "both" else None
        if G is not None and G.shape[0] != W.shape[0]:
            raise ValueError(
                f"a weight of shape {tuple(W.shape)} has {W.shape[0]} outputs, the moments of "
                f"its gradients have {G.shape[0]}"
            )
        if G is not None:
            made._add_outputs(G.to(W.device), params)
        return made

    def _add_inputs(self, stats: Stats, params: Settings) -> None:
        rotation, seed, sink, damp = (params[k] for k in ("rotation", "seed", "sink", "damp"))

        def moment() -> Tensor:
            H = stats.hessian(sink=sink)
            if self.channels is not None:
                self.channels.H = _damped(H, damp)
                H = H * self.channels.b * self.channels.b.unsqueeze(1)
            return _rotated_moment(H, rotation, 2 * seed)

        if self.channels is not None:  # a weight's own
            self.H = moment()
            self.M = block_factor(self.H, damp)
            return
        key = ("trellis", rotation, seed, sink)
        self.H = H = stats.remember(key, moment)
        self.M = stats.remember((*key, damp), lambda: block_factor(H, damp))

    def _add_outputs(self, G: Tensor, params: Settings) -> None:
        damp = params["damp_outputs"]
        if self.channels is not None:
            self.channels.G = _damped(G, damp)
            G = G * self.channels.a * self.channels.a.unsqueeze(1)
        self.G = _rotated_moment(G, params["rotation"], 2 * params["seed"] + 1)
        self.N = block_factor(self.G, damp, upper=True)


def _rotated_moment(H: Tensor, rotation: str, seed: int) -> Tensor:
    return H if rotation == "none" else rotate_moment(H, seed, block_of(rotation))


def _damped(H: Tensor, damp: float) -> Tensor:
    """Return H + damp * mean(diag H) * I."""
    H = H.clone()
    H.diagonal().add_(damp * H.diagonal().mean())
    return H


def _job(rotated: _Rotated, params: Settings) -> _Job:
    R, bits = rotated.R, params["bits"]
    M = rotated.M
    if M is None:
        M = torch.eye(R.shape[1] + -R.shape[1] % TILE, device=R.device)
    weight = Weight(R, M, rotated.N)
    width = spread(params["codebook"], params["state_bits"], bits)
    scale = GAIN[bits] / width * float(R.square().mean().sqrt())
    states = torch.empty(weight.rows, weight.columns, LENGTH, dtype=torch.int32, device=R.device)
    return _Job(R, rotated.H, rotated.G, weight, params, rotated.channels, scale, states)


def _values(jobs: Sequence[_Job]) -> int:
    return sum(6 * job.R.numel() for job in jobs)


def _finish(jobs: dict[tuple[int, int], _Job]) -> dict[tuple[int, int], dict[str, Tensor]]:
    """Return the packed tensors of jobs, after rounding them in step."""
    everyone = list(jobs.values())
    kinds = {job.kind: [j for j in everyone if j.kind == job.kind] for job in everyone}
    where = {id(job): i for i, job in enumerate(everyone)}
    step = 0

    def rounder(targets: list[Tensor]) -> list[Tensor]:
        nonlocal step
        rounded = list(targets)
        for (bits, state_bits, name, tail_biting), members in kinds.items():
            values = codebook(name, state_bits, bits, targets[0].device)
            tiles = [targets[where[id(job)]] for job in members]
            scaled = [
                along_walk(x.flatten(1), job.params["order"]) / (job.scale or 1.0)
                for x, job in zip(tiles, members, strict=True)
            ]
            states = encode(torch.cat(scaled), values, bits, tail_biting=tail_biting)
            for job, own in zip(members, states.split([len(x) for x in tiles]), strict=True):
                if len(own):
                    job.states[job.weight.places(step)] = own
                Y = in_rows(values[own.long()] * job.scale, job.params["order"])
                rounded[where[id(job)]] = Y.view(-1, TILE, TILE)
        step += 1
        return rounded

    round_in_step([job.weight for job in everyone], rounder)
    return {key: _packed(job) for key, job in jobs.items()}


def _packed(job: _Job) -> dict[str, Tensor]:
    params, states = job.params, job.states
    bits, state_bits = params["bits"], params["state_bits"]
    values = codebook(params["codebook"], state_bits, bits, states.device)
    Y = in_rows(values[states.long()], params["order"]).unflatten(-1, (TILE, TILE))
    Y = Y.transpose(1, 2).reshape(job.weight.W.shape)[: job.R.shape[0], : job.R.shape[1]]
    state = {"codes": pack_walks(states, bits), **_scales(job, Y)}
    if not params["tail_biting"]:
        state["starts"] = pack_starts(states, bits, state_bits)
    return state


def _scales(job: _Job, Y: Tensor) -> dict[str, Tensor]:
    """Return the scales of least squares for the coded Y, as they are stored."""
    scale = _least_squares(job.R, Y, job.H, job.G) if job.scale else 0.0
    if (channels := job.channels) is None:
        return {"scale": torch.tensor([scale], dtype=torch.float32, device=Y.device)}
    a, b = scale * channels.a, channels.b
    if scale:
        Z = unrotate_sides(Y, job.params["rotation"], job.params["seed"])
        a, b = channel_scales.fit(channels.W, Z, a, b, channels.H, channels.G)
    a, b = channel_scales.in_half(a, b)
    return {"row_scales": a, "column_scales": b}


def _least_squares(R: Tensor, Y: Tensor, H: Tensor | None, G: Tensor | None) -> float:
    """Return the a that minimises tr(G (R - a Y) H (R - a Y)^T).

    Moments in which Y has no size say nothing, such as those of a layer that no gradient reaches:
    they are left out, G before H.
    """
    for rows, columns in ((G, H), (None, H), (None, None)):
        weighed = Y if columns is None else Y @ columns
        weighed = weighed if rows is None else rows @ weighed
        energy = float((weighed * Y).sum(dtype=torch.float64))
        if energy > 0:
            return float((weighed * R).sum(dtype=torch.float64)) / energy
    return 0.0
