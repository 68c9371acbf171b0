"""The P-step of PV-Tuning for trellis codes: tiles are coded again, a step downhill.

Malinovskii et al. 2024 (arXiv:2405.14852), where codes are walks. With W = s Q_o^T Y Q_i, G = dL/dW
and x the inputs, the direction is u = G diag(1 / E x^2): what lowers the loss most for what it
changes of the outputs, as a column of large inputs has a large gradient whatever is wrong. The walk
of a tile becomes the one nearest to Y - eta u, in the rotated basis, found by Viterbi's algorithm
among those that begin and end as the tile's own; only tiles with <G, dW> < 0 change. eta is such
that a tile's proposal lies as far away as coding Gaussian weights errs; much nearer no other walk
is the nearest, much further the direction holds no longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..methods.base import State
from ..methods.maths.codebook import codebook
from ..methods.maths.tile_order import along_walk, in_rows
from ..methods.maths.trellis_rounding import rotate_inputs, rotate_outputs, unrotate_sides
from ..methods.maths.two_sided import TILE
from ..methods.maths.viterbi import nearest_walks
from ..methods.maths.walks import LENGTH, pack_starts, pack_walks, unpack_walks

REACH = 1.0  # of a proposal, in root mean square errors of the code
DAMPING = 1e-2  # of the mean squared inputs, in their mean


def rotated_gradient(G: Tensor, params: Mapping[str, Any], state: State | None = None) -> Tensor:
    """Return Q_o G Q_i^T: the gradient (out, in) of a weight, as that of its rotated weight.

    With a state of scales=channels Q_o diag(a) G diag(b) Q_i^T, with its scales a and b.
    """
    if state is not None and params["scales"] == "channels":
        G = G * _channels(state)
    rotation, seed = params["rotation"], params["seed"]
    half = rotate_outputs(G, rotation, seed)
    return rotate_inputs(half.T.contiguous(), rotation, seed).T.contiguous()


def move_walks(
    state: State,
    G: Tensor,
    inputs: Tensor,
    params: Mapping[str, Any],
    *,
    max_change: float,
    trust: float,
) -> tuple[Tensor, int]:
    """Code tiles of a weight again, in place; return where (rows, columns) bool, and how many
    weights have another value.

    G (out, in): the gradient of the weight; inputs (in,): the mean square of each of its inputs. Of
    all tiles at most a share `max_change` (rounded up), those with the longest u, and as long as
    |dW|_x <= trust |W|_x, |.|_x weighing columns with `inputs`.
    """
    bits, state_bits = params["bits"], params["state_bits"]
    codes, starts = state["codes"], state.get("starts")
    rows, columns = codes.shape[:2]
    moved = torch.zeros(rows * columns, dtype=torch.bool, device=codes.device)
    tiles, uphill = _directions(state, G, inputs, params)
    sizes = tiles.square().mean(1).sqrt()
    most = min(math.ceil(max_change * len(tiles)), int((sizes > 0).sum()))
    if not most:
        return moved.view(rows, columns), 0
    order = sizes.topk(most).indices
    values = codebook(params["codebook"], state_bits, bits, codes.device)
    flat = codes.view(rows * columns, -1)
    own_start = () if starts is None else (starts,)  # all in one string
    every = unpack_walks(flat, bits, state_bits, *own_start)
    old = every[order]
    Y = values[old.long()]
    width = float(values.square().mean().sqrt())
    eta = REACH * width * 2.0**-bits / sizes[order].unsqueeze(1)
    past = old[:, 0] >> int(bits) if starts is None else None
    new = nearest_walks(Y - eta * tiles[order], values, bits, past)
    change = values[new.long()] - Y
    gain = -(uphill[order] * change).sum(1)
    best = gain.argsort(descending=True, stable=True)
    best = best[: int((gain > 0).sum())]
    size_of = partial(_output_size, state, inputs, params, (G.shape[0], G.shape[1]))
    limit = trust**2 * size_of(
        torch.arange(rows * columns, device=codes.device), values[every.long()]
    )
    while len(best) and size_of(order[best], change[best]) > limit:
        best = best[: len(best) // 2]
    chosen = order[best]
    flat[chosen] = pack_walks(new[best], bits)
    if starts is not None:
        every[chosen] = new[best]
        starts.copy_(pack_starts(every, bits, state_bits))
    moved[chosen] = True
    return moved.view(rows, columns), int((change[best] != 0).sum())


def _directions(
    state: State, G: Tensor, inputs: Tensor, params: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return u and G of each tile (tiles, 256), in the rotated basis and the order of walks."""
    rows, columns = state["codes"].shape[:2]
    sign = state["scale"].sign() if "scale" in state else 1.0  # the others' lie in u and G
    damped = (inputs + DAMPING * inputs.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    away = G / damped
    if "scale" not in state:  # twice: `rotated_gradient` multiplies by it, a step is divided by it
        scale = _channels(state)
        away = torch.where(scale == 0, 0.0, away / scale.square())
    made = []
    for X in (away, G):
        rotated = rotated_gradient(X, params, state) * sign
        made.append(along_walk(_tiles(rotated, rows, columns), params["order"]))
    return made[0], made[1]


def _output_size(
    state: State,
    inputs: Tensor,
    params: Mapping[str, Any],
    shape: tuple[int, int],
    which: Tensor,
    tiles: Tensor,
) -> float:
    """Return |.|_x^2 of the weight that has `tiles` (n, 256) at the places `which`, else zeros."""
    rows, columns = state["codes"].shape[:2]
    Y = torch.zeros(rows * columns, LENGTH, device=tiles.device)
    Y[which] = in_rows(tiles, params["order"])
    Y = Y.view(rows, columns, TILE, TILE).transpose(1, 2).reshape(rows * TILE, -1)
    W = unrotate_sides(Y[: shape[0], : shape[1]].contiguous(), params["rotation"], params["seed"])
    scale = state["scale"] if "scale" in state else _channels(state)
    return float(((W * scale).square() * inputs).sum(dtype=torch.float64))


def _channels(state: State) -> Tensor:
    """Return the scale of each weight (out, in) of a state of scales=channels."""
    return state["row_scales"].float().unsqueeze(1) * state["column_scales"].float()


def _tiles(u: Tensor, rows: int, columns: int) -> Tensor:
    """Return u (out, in), padded with zeros, as its tiles (rows * columns, 256)."""
    u = torch.nn.functional.pad(u, (0, columns * TILE - u.shape[1], 0, rows * TILE - u.shape[0]))
    return u.view(rows, TILE, columns, TILE).transpose(1, 2).reshape(rows * columns, LENGTH)
