"""Refine a plan block by block: requantize on the inputs that the compressed prefix produces.

Two hidden streams go through the model block by block, that of the dense model and that of the
blocks finished so far. For each distinct input of a block, in the order in which they are read,
the levels are made again on the moments of the compressed stream and for the dense model's
outputs (`asymmetric`); then, in mode `best`, codes, scales and factors of the whole block are
tuned by gradients (`block_tuning`). Whatever is not better on held-out tokens is not kept. Bytes
stay those of the plan. In memory: one block, and the hidden states of all tokens, twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.fingerprint import claim, model_fingerprint, tensor_fingerprint, text_fingerprint
from ..base.placement import on_cpu, place_of
from ..base.progress import Progress
from ..calibration.asymmetric import shifted_weight
from ..calibration.two_streams import BATCH_TOKENS, Sets, cross_moments, input_groups, two_streams
from ..methods import compose
from ..methods.base import State
from ..models.patching import operators, patched
from ..models.stream import BlockStream
from ..models.sub_blocks import find_sub_blocks
from ..plans.level import Level
from ..recipes.recipe import BLOCKWISE
from ..store.level_store import LevelStore
from .block_tuning import BlockLoss, Tuning, block_loss, tune_block
from .in_turn import made_in_turn
from .learned_rounding import TunedLevel
from .states import RefinedStates, write_block

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to finish a plan.

    mode: fast makes levels anew along the compressed prefix, best also tunes them by gradients.
    alphas: shares of the asymmetric correction to try in each block; the store's own levels are
    always tried as well, and the best on held-out tokens is taken. is_alone: each block on the
    dense model's inputs, for levels whose plan is not known yet.
    """

    mode: str = "fast"
    alphas: tuple[float, ...] = (0.5,)
    tuning: Tuning = field(default_factory=Tuning)
    is_alone: bool = False

    def __post_init__(self) -> None:
        if self.mode not in BLOCKWISE[1:]:
            raise ValueError(f"blocks are refined {' or '.join(BLOCKWISE[1:])}; got {self.mode!r}")
        for alpha in self.alphas:
            if not 0.0 <= alpha <= 1.0:
                raise ValueError(f"alphas are shares of a correction, in 0 .. 1; got {alpha}")


def refine(
    model: Any,
    store: LevelStore,
    levels: Mapping[str, Level],
    tokens: Tensor,
    heldout: Tensor,
    folder: str | Path,
    *,
    settings: Settings | None = None,
    moments: Callable[[int], Mapping[str, Tensor]] | None = None,
    batch_tokens: int = BATCH_TOKENS,
    progress: Progress | None = None,
) -> RefinedStates:
    """Return the states of a plan's levels, finished block by block and kept in `folder`.

    levels: unit -> level, a plan's; dense and dropped ones pass through. tokens, heldout
    (n_sequences, seq_len) int64. moments(block): unit -> output-gradient moment G, for the metric
    of block errors. Blocks whose file is there are not made again, so a run that was stopped goes
    on to the same result. Raises ValueError where `folder` holds one made from something else.
    """
    settings = settings or Settings()
    levels = {unit: compose.normalize(level) for unit, level in levels.items()}
    result = RefinedStates(store, folder, levels)
    claim(
        result.refined,
        _made_from(model, store, levels, tokens, heldout, settings),
        what="refined levels",
    )
    ends = {} if settings.is_alone else _ends(store, levels)
    by_block = _by_block(model, store, levels)
    missing = [i for i, of in by_block.items() if _coded(of) and not result.file(i).is_file()]
    if not missing:
        return result
    stream = BlockStream(model)
    stream.check(tokens[:1, :8])
    with torch.no_grad(), stream:
        states = {unit: store.state(unit, level) for unit, level in _coded(ends).items()}
        forwards = operators(model, ends, states)
        how: dict[str, Any] = {"batch_tokens": batch_tokens, "forwards": forwards}
        sets = two_streams(stream, tokens, heldout, bfloat16=settings.tuning.bfloat16, **how)
        for block in range(max(missing) + 1):
            here = by_block.get(block, {})
            for kind, streams in sets.items():
                is_read = block in missing and kind != "heldout"
                streams.aim(list(_coded(here)) if is_read else ())
            if block in missing:
                G = moments(block) if moments else {}
                states, notes = _finish(sets, store, here, G, settings)
                write_block(result.file(block), states, notes)
                logger.info("block %d: %s", block, notes)
            prefix = {} if settings.is_alone else here
            states = {unit: result.state(unit, level) for unit, level in _coded(prefix).items()}
            with patched(model, operators(model, prefix, states)):
                for streams in sets.values():
                    streams.advance()
            if progress:
                progress("refine", block + 1, max(missing) + 1)
    return result


def _finish(
    sets: Sets,
    store: LevelStore,
    levels: Mapping[str, Level],
    G: Mapping[str, Tensor],
    settings: Settings,
) -> tuple[dict[str, State], dict[str, Any]]:
    """Return the best states found for the units of one block, and their held-out losses.

    G: unit -> second moment of the gradients at its outputs, {} where unknown.
    """
    heldout, coded = sets["heldout"], _coded(levels)
    stream, block, model = heldout.stream, heldout.block, heldout.stream.model
    stream.bring(block)
    G = {unit: stream.place.on_device(moment) for unit, moment in G.items()}
    run = lambda hidden: stream.run_block(block, hidden)  # noqa: E731
    loss = BlockLoss(_output_moment(model, levels, G))
    best = {unit: store.state(unit, level) for unit, level in coded.items()}
    dropped = operators(model, {u: x for u, x in levels.items() if x.is_drop}, {})

    def score(states: Mapping[str, State]) -> float:
        with patched(model, dropped | operators(model, coded, states)):
            return block_loss(run, loss, heldout.compressed, heldout.targets)

    least = score(best)
    notes: dict[str, Any] = {"before": least}
    for alpha in settings.alphas:
        states = {**best, **requantised(sets, coded, dropped, alpha=alpha, moments=G)}
        notes[f"alpha {alpha}"] = value = score(states)
        if value < least:
            best, least = states, value
    if settings.mode == "best":
        how: dict[str, Any] = {"run": run, "loss": loss, "settings": settings.tuning}
        states = {**best, **made_in_turn(sets, coded, dropped, moments=G, **how)}
        notes["in turn"] = value = score(states)
        if value < least:
            best, least = states, value
        start = dict(best)

        def fresh() -> dict[str, TunedLevel]:
            return {
                unit: TunedLevel(
                    x,
                    {name: tensor.to(W.device) for name, tensor in start[unit].items()},
                    store.units[unit].shape,
                    W,
                )
                for unit, x in coded.items()
                for W in [_weight(model, unit)]
            }

        with patched(model, dropped):
            tuned, _, value = tune_block(
                model, run, fresh, loss, sets["gram"], heldout, settings.tuning
            )
        notes["tuned"] = value
        best = best if tuned is None else {unit: on_cpu(state) for unit, state in tuned.items()}
    return best, notes


def requantised(
    sets: Sets,
    levels: Mapping[str, Level],
    dropped: Mapping[str, Any],
    *,
    alpha: float,
    moments: Mapping[str, Tensor],
) -> dict[str, State]:
    """Return the levels of a block made from the compressed stream's inputs, input by input.

    Each input is seen as the levels made before it leave it. moments: unit -> G, for levels that
    round with feedback along outputs. Experts that no token goes to are left out.
    """
    stream = sets["gram"].stream
    forwards = dict(dropped)
    made: dict[str, State] = {}
    with patched(stream.model, dropped):
        groups = input_groups(stream, sets["gram"].block, sets["gram"].dense[0], list(levels))
    for group in groups:
        stats, shift = cross_moments(sets, group[0], forwards)
        by_level: dict[Level, list[str]] = {}
        for unit in group:
            by_level.setdefault(levels[unit], []).append(unit)
        for level, units in by_level.items():
            Ws = [_weight(stream.model, unit) for unit in units]
            if shift is not None:
                Ws = [shifted_weight(W, stats, shift, alpha=alpha) for W in Ws]
            known = stats.with_outputs(moments.get(unit) for unit in units)
            states = compose.compress_stacked(level, Ws, known)
            made |= {unit: on_cpu(state) for unit, state in zip(units, states, strict=True)}
        forwards |= operators(stream.model, levels, {unit: made[unit] for unit in group})
    return {unit: made[unit] for unit in levels if unit in made}


def _weight(model: nn.Module, unit: str) -> Tensor:
    weight: Tensor = model.get_submodule(unit).weight.detach()  # type: ignore[assignment, operator, union-attr]
    return place_of(model).on_device(weight).float()


def _coded(levels: Mapping[str, Level]) -> dict[str, Level]:
    return {u: level for u, level in levels.items() if not (level.is_dense or level.is_drop)}


def _by_block(
    model: nn.Module, store: LevelStore, levels: Mapping[str, Level]
) -> dict[int, dict[str, Level]]:
    blocks = {unit.name: unit.block for unit in store.units.values()}
    if any(level.is_drop for level in levels.values()):
        blocks |= {sub.name: sub.block for sub in find_sub_blocks(model)}
    found: dict[int, dict[str, Level]] = {}
    for unit, level in levels.items():
        if unit not in blocks:
            raise ValueError(f"the plan gives a level to {unit}, which the level store lacks")
        if unit in store.units and store.units[unit].is_end:
            continue  # in no block: it stays as it is
        found.setdefault(blocks[unit], {})[unit] = level
    return found


def _ends(store: LevelStore, levels: Mapping[str, Level]) -> dict[str, Level]:
    return {u: x for u, x in levels.items() if u in store.units and store.units[u].is_end}


def _output_moment(
    model: nn.Module, levels: Mapping[str, Level], G: Mapping[str, Tensor]
) -> Tensor | None:
    """Return G of the block's output: that of its last linear, which writes to it."""
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    known = [unit for unit in G if unit in levels and len(G[unit]) == width]
    return G[known[-1]] if known else None


def _made_from(
    model: nn.Module,
    store: LevelStore,
    levels: Mapping[str, Level],
    tokens: Tensor,
    heldout: Tensor,
    settings: Settings,
) -> dict[str, Any]:
    return {
        "model": model_fingerprint(model),
        "store": text_fingerprint(*(str(store.index[k]) for k in ("fingerprint", "defaults"))),
        "levels": text_fingerprint(*(f"{u} {level}" for u, level in sorted(levels.items()))),
        "tokens": tensor_fingerprint(tokens),
        "held-out tokens": tensor_fingerprint(heldout),
        "settings": asdict(settings),
    }
