"""Scores of published baselines: similarity of hidden states, single drops, outliers, PQ-index.

Each returns plain numbers by name, measured on the dense model outside of any search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.placement import place_of
from ..methods.maths.linalg import Stats
from ..methods.maths.pq_index import kept_share
from ..models.dropped import dropped_forward
from ..models.stream import BlockStream
from ..models.sub_blocks import SubBlock, find_sub_blocks
from ..models.units import Unit
from ..plans.level import DROP, Level
from .evaluator import Evaluator

OUTLIER = 5.0  # times the mean: M of OWL
SPREAD = 0.08  # lambda of OWL: how far a block's sparsity may be from the average


def single_drops(
    evaluator: Evaluator, names: Sequence[str], sequences: Sequence[int]
) -> dict[str, float]:
    """Return sub-block -> the mean loss per token when it alone is dropped, the rest dense.

    With the fitness `perplexity` it is the score of Shortened Llama (Kim et al. 2024,
    arXiv:2402.02834). Costs one evaluation per name, blocks before the dropped one shared.
    """
    rows = evaluator.losses([{name: DROP} for name in names], sequences)
    return {name: sum(row) / len(row) for name, row in zip(names, rows, strict=True)}


def single_levels(
    evaluator: Evaluator, choices: Sequence[tuple[str, Level]], sequences: Sequence[int]
) -> list[float]:
    """Return how much more a token loses with each unit alone at its level, the rest dense."""
    plans: list[dict[str, Level]] = [{}, *({unit: level} for unit, level in choices)]
    dense, *losses = (sum(row) / len(row) for row in evaluator.losses(plans, sequences))
    return [loss - dense for loss in losses]


@torch.no_grad()
def influences(model: Any, tokens: Tensor) -> dict[str, float]:
    """Return sub-block -> 1 - cos of the residual stream before and after it, mean over tokens.

    Block influence of ShortGPT (Men et al. 2024, arXiv:2403.03853) for sub-blocks. The stream
    after a sub-block is the block's output with those behind it dropped, which holds for any
    order of norms. tokens (n_sequences, seq_len).
    """
    stream = BlockStream(model)
    of_block: dict[int, list[SubBlock]] = {}
    for sub in find_sub_blocks(model):
        of_block.setdefault(sub.block, []).append(sub)
    total: dict[str, float] = {}
    rest = stream.place.let_rest
    with stream:
        hidden = [rest(stream.embed(ids)) for ids in tokens.split(1)]
        for block in range(stream.n_blocks):
            subs = of_block.get(block, [])
            for n, (one, ids) in enumerate(zip(hidden, tokens.split(1), strict=True)):
                states = [
                    _without(model, stream, block, one, ids, subs[k:]) for k in range(len(subs))
                ]
                after = stream.run_block(block, one, ids)
                for sub, before, behind in zip(subs, states, [*states[1:], after], strict=True):
                    total[sub.name] = total.get(sub.name, 0.0) + _distance(before, behind)
                hidden[n] = rest(after)
    return {name: value / len(tokens) for name, value in total.items()}


@torch.no_grad()
def window_distances(model: Any, tokens: Tensor, size: int) -> list[float]:
    """Return, per first block of a window of `size`, 1 - cos of its input and its output.

    The least one is the window that Gromov et al. 2024 (arXiv:2403.17887) drop; here the mean
    over tokens, there an angle at the last one. tokens (n_sequences, seq_len).
    """
    stream = BlockStream(model)
    if not 0 < size <= stream.n_blocks:
        raise ValueError(f"a window has 1 to {stream.n_blocks} blocks, got {size}")
    total = [0.0] * (stream.n_blocks - size + 1)
    rest = stream.place.let_rest
    with stream:
        windows = [[rest(stream.embed(ids))] for ids in tokens.split(1)]  # the last size + 1 inputs
        for block in range(stream.n_blocks):
            for hiddens, ids in zip(windows, tokens.split(1), strict=True):
                hiddens.append(rest(stream.run_block(block, hiddens[-1], ids)))
                if len(hiddens) > size:
                    total[block + 1 - size] += _distance(hiddens.pop(0), hiddens[-1])
    return [value / len(tokens) for value in total]


def outlier_ratios(
    model: Any, units: Iterable[Unit], stats: Callable[[int], Mapping[str, Stats]]
) -> dict[int, float]:
    """Return block -> the share of its weights with |w| |x| above OUTLIER times the mean.

    |x| is the root mean square of the weight's input. OWL (Yin et al. 2024, arXiv:2310.05175).
    """
    of_block: dict[int, list[Unit]] = {}
    for unit in units:
        of_block.setdefault(unit.block, []).append(unit)
    ratios = {}
    for block, members in of_block.items():
        known = stats(block)
        sizes = []
        for unit in members:
            weight = model.get_submodule(unit.name).weight.detach()
            weight = place_of(model).on_device(weight).float()
            norms = known[unit.name].gram.diagonal().clamp(min=0.0).sqrt().to(weight.device)
            sizes.append((weight.abs() * norms).reshape(-1))
        values = torch.cat(sizes)
        ratios[block] = float((values > OUTLIER * values.mean()).double().mean())
    return ratios


def owl_kept(ratios: Mapping[int, float], sparsity: float) -> dict[int, float]:
    """Return block -> the share of weights that OWL keeps: more where there are more outliers.

    The ratios are spread over 2 SPREAD and centred, as in the published code.
    """
    low, high = min(ratios.values()), max(ratios.values())
    scale = 2 * SPREAD / (high - low) if high > low else 0.0
    spread = {block: (ratio - low) * scale for block, ratio in ratios.items()}
    centre = sum(spread.values()) / len(spread)
    return {block: 1 - sparsity + value - centre for block, value in spread.items()}


def pq_shares(
    model: Any, units: Iterable[Unit], stats: Callable[[int], Mapping[str, Stats]]
) -> dict[str, float]:
    """Return unit -> the least share of its weights that SAP keeps, by the PQ-index of |w| |x|.

    |x| is the root mean square of the weight's input. Diao et al. 2023 (arXiv:2302.05601).
    """
    shares = {}
    for unit in units:
        weight = model.get_submodule(unit.name).weight.detach()
        weight = place_of(model).on_device(weight).float()
        known = stats(unit.block)[unit.name]
        norms = known.gram.diagonal().clamp(min=0.0).sqrt().to(weight.device)
        shares[unit.name] = kept_share(weight * norms)
    return shares


def pq_kept(
    shares: Mapping[str, float], weights: Mapping[str, int], sparsity: float
) -> dict[str, float]:
    """Return unit -> the share of weights to keep: `shares` times one factor, at most 1 each.

    The factor is the one by which 1 - sparsity of all `weights` (unit -> number) are kept.
    """
    total = (1 - sparsity) * sum(weights[unit] for unit in shares)
    low, high = 0.0, 1 / max(min(shares.values()), 1e-9)
    for _ in range(60):
        factor = (low + high) / 2
        kept = sum(min(1.0, factor * share) * weights[unit] for unit, share in shares.items())
        low, high = (factor, high) if kept < total else (low, factor)
    return {unit: min(1.0, high * share) for unit, share in shares.items()}


def _without(
    model: Any,
    stream: BlockStream,
    block: int,
    hidden: Tensor,
    ids: Tensor,
    subs: Sequence[SubBlock],
) -> Tensor:
    modules = [model.get_submodule(sub.name) for sub in subs]
    for module, sub in zip(modules, subs, strict=True):
        module.forward = dropped_forward(model, sub)
    try:
        return stream.run_block(block, hidden, ids)
    finally:
        for module in modules:
            del module.forward


def _distance(a: Tensor, b: Tensor) -> float:
    return 1 - float(F.cosine_similarity(a.float(), b.float(), dim=-1).mean())
