"""Weights to walks through a trellis: rotate, round in step, rescale, pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .codebook import codebook, spread
from .linalg import Stats
from .rotation import WHOLE, rotate, rotate_moment, unrotate
from .two_sided import TILE, Weight, block_factor, round_in_step
from .viterbi import encode
from .walks import LENGTH, pack_starts, pack_walks

ROTATIONS = ("full", "none", "256", "128", "64", "32")
FEEDBACKS = ("both", "inputs", "none")
# G of some thousand tokens is noisy: with 0.1 of its mean diagonal nothing is gained by it.
DAMP_OUTPUTS = 0.5
# Codebook width over the weights' that leaves the least error on Gaussian weights.
GAIN = {1: 0.9, 2: 1.03, 3: 1.09, 4: 1.12, 5: 1.15, 6: 1.19, 7: 1.22, 8: 1.3}
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


_ROTATED_BY = ("rotation", "seed", "feedback", "damp", "damp_outputs", "sink")


@dataclass
class _Rotated:
    """A weight and its moments in the rotated basis, and the moments' factors."""

    R: Tensor
    H: Tensor | None = None
    G: Tensor | None = None
    M: Tensor | None = None
    N: Tensor | None = None

    @classmethod
    def of(cls, W: Tensor, index: int, stats: Stats | None, params: Settings) -> _Rotated:
        rotation, seed = params["rotation"], params["seed"]
        device = W.device if stats is None else stats.gram.device
        half = rotate_outputs(W.to(device, torch.float32), rotation, seed)
        R = rotate_inputs(half.T.contiguous(), rotation, seed).T.contiguous()
        if params["feedback"] == "none" or stats is None:
            return cls(R)
        sink, damp = params["sink"], params["damp"]
        key = ("trellis", rotation, seed, sink)

        def moment(H: Tensor, seed: int) -> Tensor:
            return H if rotation == "none" else rotate_moment(H, seed, block_of(rotation))

        H = stats.remember(key, lambda: moment(stats.hessian(sink=sink), 2 * seed))
        M = stats.remember((*key, damp), lambda: block_factor(H, damp))
        G = stats.outputs[index] if stats.outputs and params["feedback"] == "both" else None
        if G is None:
            return cls(R, H, None, M)
        if G.shape[0] != W.shape[0]:
            raise ValueError(
                f"a weight of shape {tuple(W.shape)} has {W.shape[0]} outputs, the moments of "
                f"its gradients have {G.shape[0]}"
            )
        G = moment(G.to(device), 2 * seed + 1)
        return cls(R, H, G, M, block_factor(G, params["damp_outputs"], upper=True))


def _job(rotated: _Rotated, params: Settings) -> _Job:
    R, bits = rotated.R, params["bits"]
    M = rotated.M
    if M is None:
        M = torch.eye(R.shape[1] + -R.shape[1] % TILE, device=R.device)
    weight = Weight(R, M, rotated.N)
    width = spread(params["codebook"], params["state_bits"], bits)
    scale = GAIN[bits] / width * float(R.square().mean().sqrt())
    states = torch.empty(weight.rows, weight.columns, LENGTH, dtype=torch.int32, device=R.device)
    return _Job(R, rotated.H, rotated.G, weight, params, scale, states)


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
                x.flatten(1) / (job.scale or 1.0) for x, job in zip(tiles, members, strict=True)
            ]
            states = encode(torch.cat(scaled), values, bits, tail_biting=tail_biting)
            for job, own in zip(members, states.split([len(x) for x in tiles]), strict=True):
                if len(own):
                    job.states[job.weight.places(step)] = own
                Y = values[own.long()] * job.scale
                rounded[where[id(job)]] = Y.view(-1, TILE, TILE)
        step += 1
        return rounded

    round_in_step([job.weight for job in everyone], rounder)
    return {key: _packed(job) for key, job in jobs.items()}


def _packed(job: _Job) -> dict[str, Tensor]:
    params, states = job.params, job.states
    bits, state_bits = params["bits"], params["state_bits"]
    values = codebook(params["codebook"], state_bits, bits, states.device)
    Y = values[states.long()].view(job.weight.rows, job.weight.columns, TILE, TILE)
    Y = Y.transpose(1, 2).reshape(job.weight.W.shape)[: job.R.shape[0], : job.R.shape[1]]
    scale = _least_squares(job.R, Y, job.H, job.G) if job.scale else 0.0
    state = {
        "codes": pack_walks(states, bits),
        "scale": torch.tensor([scale], dtype=torch.float32, device=states.device),
    }
    if not params["tail_biting"]:
        state["starts"] = pack_starts(states, bits, state_bits)
    return state


def _least_squares(R: Tensor, Y: Tensor, H: Tensor | None, G: Tensor | None) -> float:
    """Return the a that minimises tr(G (R - a Y) H (R - a Y)^T)."""
    weighed = Y if H is None else Y @ H
    weighed = weighed if G is None else G @ weighed
    energy = float((weighed * Y).sum(dtype=torch.float64))
    return float((weighed * R).sum(dtype=torch.float64)) / energy if energy > 0 else 0.0
