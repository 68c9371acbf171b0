"""SparseGPT: drop one weight at a time and let those not yet visited absorb the error.

Frantar and Alistarh 2023 (arXiv:2301.00774). Input by input, as in `gptq`: weights of least
w^2 / U_ii^2 become zero and the later inputs make up for it. Unstructured, they are chosen per
block of about 128 inputs over all rows, so that rows differ and blocks do not; n:m, n of every
m neighbours are kept, chosen when the loop reaches them. With bits=b the kept weights are rounded
in the same loop, to a grid that is found from kept weights only, and later weights absorb both
errors. As in `gptq` the Hessian gives position 0 its due and is damped (`sink`, `damp`).

Stores what `maths/sparse.py` says: 16 (1 - s) + 1 bits per weight at sparsity s, with bits=b
b (1 - s) + 1 + (16 + b) / group_size; pattern=2:4 takes 0.75 instead of 1 for the places. Time as
`gptq`; the factor of the Hessian is shared by all levels.

When to use it: between 2 and 3 bits, as sparsity=0.4 to 0.6 with bits=3 and a large group, where
whole codes leave a gap. On three MLP weights of SmolLM2-135M sparsity=0.5,bits=3,group_size=192
(2.60 bits) loses 23 to 39 % less on the calibration inputs than gptq:bits=2,group_size=32 (2.56);
at 3.3 bits and above gptq is better. Unstructured sparsity saves bytes, not time, and without bits
it cannot in bytes either: sparsity=0.5 (9 bits) loses 1.2 to 1.9 times as much as gptq at 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Param, SharedWork, State
from .maths.linalg import DAMP, SINK, Stats
from .maths.obs import BLOCK, MAX_VALUES, Rounding, blocks, solve
from .maths.sparse import (
    ANY,
    FLOAT_BITS,
    SCALE_DTYPES,
    SPARSE_PARAMS,
    SparseMethod,
    largest,
    largest_of_each,
    n_kept,
    pack_sparse,
    share,
    to_stored,
)


class SparseGPT(SharedWork, SparseMethod):
    """`sparsegpt:sparsity=0.5,bits=4,group_size=64`: what is left answers for what is gone."""

    name = "sparsegpt"
    needs_stats = True
    params: ClassVar[Mapping[str, Param]] = {
        **SPARSE_PARAMS,
        "damp": Param(float, "share of the mean diagonal added", default=DAMP, at_least=0.0),
        "sink": Param(float, "weight of position 0 in the Hessian", default=SINK, at_least=0.0),
    }
    examples = (
        "sparsegpt:sparsity=0.5",
        "sparsegpt:pattern=2:4,values=bfloat16",
        "sparsegpt:sparsity=0.5,bits=4,group_size=32",
        "sparsegpt:pattern=4:8,bits=3,group_size=-1,symmetric=true,damp=0.01,sink=0.0",
    )

    def compress_many(
        self, Ws: Sequence[Tensor], stats: Stats | None, settings: Sequence[Mapping[str, Any]]
    ) -> list[list[State]]:
        """Return, per setting, the states of weights that share one input.

        All weights go through one column loop, with all settings that differ in `sparsity` and
        in how many `bits` only; other settings take a loop each, on the same factor.
        """
        stats = self.required(stats, Ws)
        loops: dict[tuple[Any, ...], list[_Job]] = {}
        for i, params in enumerate(settings):
            key = tuple((k, v) for k, v in sorted(params.items()) if k not in ("sparsity", "bits"))
            key += (params["bits"] == FLOAT_BITS,)
            for j, W in enumerate(Ws):
                self.check_shape((W.shape[0], W.shape[1]), **params)
                loops.setdefault(key, []).extend(_jobs(i, j, W, params))
        parts: dict[tuple[int, int], list[_Part]] = {}
        for jobs in loops.values():
            for batch in _batches(jobs):
                for job, part in zip(batch, _prune(batch, stats), strict=True):
                    parts.setdefault((job.setting, job.weight), []).append(part)
        return [
            [_state(parts[i, j], params) for j in range(len(Ws))]
            for i, params in enumerate(settings)
        ]


@dataclass(frozen=True)
class _Job:
    """Some rows of one weight, at one setting; `kept` of their weights are to be kept."""

    setting: int
    weight: int
    rows: Tensor
    kept: int
    params: Mapping[str, Any]


# Mask, kept weights or codes, and scale and zero point where there are codes, of a job's rows.
_Part = tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]


def _jobs(setting: int, weight: int, W: Tensor, params: Mapping[str, Any]) -> list[_Job]:
    """Return the jobs of a weight: one, unless it is too large to be worked on at once."""
    rows, columns = W.shape
    kept, step = n_kept((rows, columns), params), max(1, MAX_VALUES // columns)
    return [
        _Job(
            setting,
            weight,
            W[low : low + step],
            share(kept, low, min(low + step, rows), rows),
            params,
        )
        for low in range(0, rows, step)
    ]


def _batches(jobs: Sequence[_Job]) -> list[list[_Job]]:
    """Return `jobs` in batches of at most MAX_VALUES weights."""
    batches: list[list[_Job]] = [[]]
    size = 0
    for job in jobs:
        if batches[-1] and size + job.rows.numel() > MAX_VALUES:
            batches.append([])
            size = 0
        batches[-1].append(job)
        size += job.rows.numel()
    return batches


def _prune(jobs: Sequence[_Job], stats: Stats) -> list[_Part]:
    """Return what becomes of the rows of each job; jobs differ in `sparsity` and `bits` only."""
    params = jobs[0].params
    U = stats.inverse_factor(sink=params["sink"], damp=params["damp"])
    sizes = [len(job.rows) for job in jobs]
    # (columns, rows of all jobs): an input's weights lie together, the loop reads them once.
    W = torch.cat([job.rows.T.to(U.device, torch.float32) for job in jobs], dim=1)
    rounding = None
    if params["bits"] != FLOAT_BITS:
        maxq = torch.tensor([2.0 ** job.params["bits"] - 1 for job in jobs], device=U.device)
        rounding = Rounding(
            W,
            U,
            maxq.repeat_interleave(torch.tensor(sizes, device=U.device)),
            params["group_size"],
            symmetric=params["symmetric"],
            scale_dtype=SCALE_DTYPES[params["scales"]],
            clip=params["clip"],
        )
    rule = _Pruning(W, U, jobs, rounding)
    solve(W, U, rule, rule.group)
    masks, kept = (x.T.split(sizes) for x in (rule.mask, rule.kept))
    if rounding is None:
        return [(mask, values, None) for mask, values in zip(masks, kept, strict=True)]
    scales, zeros = (x.T.split(sizes) for x in rounding.grids)
    return list(zip(masks, kept, zip(scales, zeros, strict=True), strict=True))


class _Pruning:
    """The rule of the column loop: which weights become zero, and what the others become."""

    def __init__(
        self, W: Tensor, U: Tensor, jobs: Sequence[_Job], rounding: Rounding | None
    ) -> None:
        params, columns = jobs[0].params, W.shape[0]
        self.mask = torch.zeros(W.shape, dtype=torch.bool, device=W.device)
        # What is stored of W: codes, or the weights as they stand when the loop reaches them.
        self.kept = W if rounding is None else rounding.codes
        self.group = BLOCK if rounding is None else rounding.group
        self._jobs, self._pattern, self._dtype = jobs, params["pattern"], params["values"]
        self._rounding = rounding
        # The loss that dropping w_i adds is w_i^2 / U_ii^2.
        self._weight = (U.diagonal() ** -2).unsqueeze(1)
        m = 0 if self._pattern == ANY else int(self._pattern.partition(":")[2])
        cuts = ((i, i + m) for i in range(0, columns, m)) if m else blocks(columns, self.group)
        self._stops = dict(cuts)  # input where a choice of weights begins -> where it ends
        self._decided = 0

    def __call__(self, W: Tensor, i: int) -> Tensor:
        if i in self._stops:
            self._decided = self._stops[i]
            self.mask[i : self._decided] = self._choose(W, i, self._decided)
        if self._rounding is None:
            return to_stored(W[i], self._dtype) * self.mask[i]
        if i % self.group == 0:
            stop = i + self.group
            # Where the choice is not made yet, what it would be now.
            keep = self.mask[i:stop] if stop <= self._decided else self._choose(W, i, stop)
            self._rounding.begin(W[i:stop] * keep, i)
        return self._rounding.round(W[i], i) * self.mask[i]

    def _choose(self, W: Tensor, low: int, high: int) -> Tensor:
        """Return which weights of inputs low .. high to keep, (high - low, n) bool."""
        scores = W[low:high].square() * self._weight[low:high]
        if self._pattern != ANY:
            return largest_of_each(scores.T, self._pattern).T
        sizes = [len(job.rows) for job in self._jobs]
        chosen = [
            largest(mine, share(job.kept, low, high, W.shape[0]))
            for job, mine in zip(self._jobs, scores.split(sizes, dim=1), strict=True)
        ]
        return torch.cat(chosen, dim=1)


def _state(parts: Sequence[_Part], params: Mapping[str, Any]) -> State:
    masks, kept, grids = zip(*parts, strict=True)
    if params["bits"] == FLOAT_BITS:
        return pack_sparse(torch.cat(masks), torch.cat(kept), None, **params)
    scale, zero = (torch.cat(x) for x in zip(*grids, strict=True))
    return pack_sparse(torch.cat(masks), torch.cat(kept), (scale, zero), **params)
