"""The level store: every candidate of every unit, packed as it will ship (EvoPress's database).

A folder with `index.json` (what the store is made from and what it will hold) and one safetensors
file per unit, whole or absent, so that a killed build resumes at the next unit. Files are
numbered; unit names never become paths.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.placement import on_cpu, place_of
from ..base.progress import Progress
from ..base.ranks import ALONE, Ranks
from ..calibration.end_moments import EndMoments
from ..calibration.output_moments import kfac_loss
from ..methods import compose
from ..methods.base import State
from ..methods.maths.linalg import Stats, map_shared
from ..models.neighbours import neighbour
from ..models.units import Unit
from ..plans.level import Level
from .index import INDEX, covers, new_index, read_index, same_make, start
from .judge import Judge, Loss
from .other_stores import Made, OtherStores
from .shared import shared_states
from .unit_file import read_scores, read_state, unit_file, write_unit

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What a store is made from: the statistics of each block, and a fingerprint of it all.

    ends: the moments of the embedding and the head, which are in no block.
    """

    fingerprint: Mapping[str, Any]
    stats: Callable[[int], Mapping[str, Stats]]
    moments: Callable[[int], Mapping[str, Tensor]] | None = None
    ends: Callable[[], Mapping[str, EndMoments]] | None = None

    def known(self, units: Sequence[Unit]) -> tuple[Mapping[str, Stats], Mapping[str, Loss]]:
        """Return for the units of one block their statistics, and what an error of each costs."""
        if units[0].is_end:
            ends = self.ends() if self.ends else {}
            return {k: m.stats() for k, m in ends.items()}, {k: m.loss for k, m in ends.items()}
        stats = self.stats(units[0].block)
        moments = self.moments(units[0].block) if self.moments else {}
        # sink-aware: the plain Hessian does not see errors at position 0
        return stats, {
            name: partial(kfac_loss, H=stats[name].hessian(), G=G)
            for name, G in moments.items()
            if name in stats
        }

    def outputs(self, units: Sequence[Unit]) -> Mapping[str, Tensor]:
        """Return the second moments of the gradients at the outputs of the units of one block."""
        is_known = self.moments is not None and not units[0].is_end
        return self.moments(units[0].block) if is_known else {}  # type: ignore[misc]


class LevelStore:
    """Read access to a finished store; `LevelStore.build` makes or continues one.

    >>> store = LevelStore("work/store")                      # doctest: +SKIP
    >>> store.weight("model.layers.0.mlp.up_proj", "gptq:bits=3,group_size=64", torch.float32)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.units: dict[str, Unit] = {
            u["name"]: Unit(
                u["name"], (u["shape"][0], u["shape"][1]), u["block"], u.get("role", "linear")
            )
            for u in self.index["units"]
        }
        self._numbers = {name: i for i, name in enumerate(self.units)}
        self._levels = {
            u["name"]: [compose.normalize(level) for level in u["levels"]]
            for u in self.index["units"]
        }
        self._scores: dict[str, list[dict[str, float]]] = {}
        missing = [u for u in self.units if not self._file(u).is_file()]
        if missing:
            raise ValueError(
                f"the store {self.folder} is not finished: {len(missing)} of {len(self.units)} "
                "units are missing; run the same build again to continue it"
            )

    # -- building ------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: Any,
        units: Sequence[Unit],
        menus: Mapping[str, Sequence[Level]],
        source: Source,
        *,
        others: Iterable[Path] = (),
        ranks: Ranks = ALONE,
        progress: Progress | None = None,
    ) -> LevelStore:
        """Return the store in `folder`, after building what is not there yet.

        A store of the same make that has these levels and more serves as it is.

        One block at a time: its statistics are read, each distinct input's Hessian is factorised
        once, and all levels of the units behind it are made in one pass. others: folders of
        stores whose levels are copied instead, where they were made from the same. ranks:
        processes that share the folder; each takes some blocks. Raises ValueError where the
        folder holds a store made from something else.
        """
        folder = Path(folder)
        with ranks.first_alone():
            index = start(folder, new_index(units, menus, source.fingerprint))
        menus = {u["name"]: [compose.normalize(x) for x in u["levels"]] for u in index["units"]}
        described = {u["name"]: u for u in index["units"]}
        elsewhere = OtherStores(others, index)
        numbers = {unit.name: i for i, unit in enumerate(units)}
        done = sum(unit_file(folder, i).is_file() for i in numbers.values())
        blocks, place = sorted({unit.block for unit in units}), place_of(model)
        for block in (b for n, b in enumerate(blocks) if ranks.owns(n)):
            here = [u for u in units if u.block == block]
            there = {u.name for u in here if unit_file(folder, numbers[u.name]).is_file()}
            if len(there) == len(here):
                continue
            (stats, losses), moments = source.known(here), source.outputs(here)
            known = _Block(model, map_shared(stats, place.on_device), losses, moments, source)
            for group in _by_input(here, known.stats, menus):
                if there.issuperset(u.name for u in group):
                    continue
                levels, new = menus[group[0].name], [u for u in group if u.name not in there]
                copied = {
                    u.name: elsewhere.of(described[u.name], levels, known.measures(u)) for u in new
                }
                lacking = [x for x in levels if any(x not in own for own in copied.values())]
                # a group is made whole, also where some of it is there: same sums
                made = known.made(group, lacking) if lacking else {u.name: {} for u in new}
                for unit in new:
                    found = {**made[unit.name], **copied[unit.name]}
                    states, scores = zip(*(found[x] for x in levels), strict=True)
                    write_unit(unit_file(folder, numbers[unit.name]), unit.name, states, scores)
                    done += 1
                    if progress:
                        progress("levels", done, len(units))
        ranks.wait()
        return cls(folder)

    @classmethod
    def lacks(
        cls,
        folder: str | Path,
        units: Sequence[Unit],
        menus: Mapping[str, Sequence[Level]],
        source: Source,
    ) -> bool | None:
        """Return whether the store in `folder` lacks levels; None without one of this make."""
        if not (Path(folder) / INDEX).is_file():
            return None
        found, wanted = read_index(Path(folder)), new_index(units, menus, source.fingerprint)
        return not covers(found, wanted) if same_make(found, wanted) else None

    # -- reading -------------------------------------------------------------------------------

    def levels(self, unit: str) -> list[Level]:
        """Return the levels stored for `unit`, cheapest first."""
        return self._levels[self._known(unit)]

    def state(self, unit: str, level: Level | str) -> State:
        """Return the packed tensors of `unit` at `level`; a damaged file raises ValueError."""
        return read_state(self._file(unit), unit, self._level_number(unit, level))

    def weight(self, unit: str, level: Level | str, dtype: torch.dtype) -> Tensor:
        """Return the decompressed weight (out, in) of `unit` at `level`."""
        level = compose.normalize(level)
        return compose.decompress(level, self.state(unit, level), self.units[unit].shape, dtype)

    def cost_bits(self, unit: str, level: Level | str) -> int:
        """Return the stored bits of `unit` at `level`."""
        return compose.cost_bits(compose.normalize(level), self.units[self._known(unit)].shape)

    def scores(self, unit: str, level: Level | str) -> dict[str, float]:
        """Return what was measured when the level was made.

        error: tr(dW H dW^T) / tr(W H W^T) on the calibration inputs; heldout_error: the same on
        held-out inputs; sensitivity_nats: the KL that the level is expected to add per token,
        1/2 tr(G dW H' dW^T), or what `end_moments` says of an embedding or a head. The last
        two only where the calibration provides for them.
        """
        number = self._level_number(unit, level)
        if unit not in self._scores:
            self._scores[unit] = read_scores(self._file(unit), unit)
        return self._scores[unit][number]

    @property
    def size_bytes(self) -> int:
        """Bytes of the store's files."""
        return sum(p.stat().st_size for p in self.folder.glob("*.safetensors"))

    def _file(self, unit: str) -> Path:
        return unit_file(self.folder, self._numbers[self._known(unit)])

    def _known(self, unit: str) -> str:
        if unit not in self.units:
            raise ValueError(f"unit {unit!r} is not in the store {self.folder}")
        return unit

    def _level_number(self, unit: str, level: Level | str) -> int:
        level, stored = compose.normalize(level), self.levels(unit)
        if level not in stored:
            raise ValueError(
                f"the store {self.folder} has no level '{level}' for {unit}; "
                f"it has: {', '.join(map(str, stored))}"
            )
        return stored.index(level)


@dataclass(frozen=True)
class _Block:
    """What levels of the units of one block are made from."""

    model: Any
    stats: Mapping[str, Stats]
    losses: Mapping[str, Loss]
    moments: Mapping[str, Tensor]
    source: Source

    def measures(self, unit: Unit) -> list[str]:
        """Return what is measured of each level of a unit."""
        of_error = ["error"] if unit.name in self.stats else []
        return of_error + (["sensitivity_nats"] if unit.name in self.losses else [])

    def made(self, group: Sequence[Unit], levels: Sequence[Level]) -> dict[str, dict[Level, Made]]:
        """Return unit -> level -> what was made of it, for units that share an input."""
        place = place_of(self.model)
        weights = [_weight(self.model, unit) for unit in group]
        known = {u.name: self.moments[u.name] for u in group if u.name in self.moments}
        moments = {name: place.on_device(G) for name, G in known.items()}
        inputs = _with_outputs(self.stats.get(group[0].name), group, moments)
        alone = [level for level in levels if not compose.n_shared(level)]
        of_all = dict(zip(alone, compose.compress_many(alone, weights, inputs), strict=True))
        found: dict[str, dict[Level, Made]] = {}
        for j, (unit, W) in enumerate(zip(group, weights, strict=True)):
            both = _shared(self.model, unit, W, self.stats, levels, self.source)
            judge = Judge(W, self.stats.get(unit.name), self.losses.get(unit.name))
            states = {x: both[x] if x in both else of_all[x][j] for x in levels}
            found[unit.name] = {
                x: (on_cpu(state), judge.scores(x, state)) for x, state in states.items()
            }
        return found


def _shared(
    model: Any,
    unit: Unit,
    W: Tensor,
    stats: Mapping[str, Stats],
    levels: Sequence[Level],
    source: Source,
) -> dict[Level, State]:
    """Return the states of a unit at the levels that it shares with its neighbour.

    Either of the two makes both: blocks are built in any order, by any process.
    """
    sharing = [level for level in levels if compose.n_shared(level)]
    if not sharing:
        return {}
    other = replace(unit, name=neighbour(unit.name) or unit.name, block=unit.block ^ 1)
    place = place_of(model)
    theirs = source.stats(other.block)[other.name].map(place.on_device)
    known = [(unit.block, W, stats[unit.name]), (other.block, _weight(model, other), theirs)]
    known.sort(key=lambda one: one[0])
    mine = unit.block & 1
    Ws, moments = [one[1] for one in known], [one[2] for one in known]
    return {level: shared_states(level, Ws, moments)[mine] for level in sharing}


def _by_input(
    units: Iterable[Unit], stats: Mapping[str, Stats], menus: Mapping[str, Sequence[Level]]
) -> list[list[Unit]]:
    """Group units that share one input and one menu: their rows go through the loop together."""
    groups: dict[Any, list[Unit]] = {}
    for unit in units:
        key = (id(stats[unit.name]) if unit.name in stats else unit.name, tuple(menus[unit.name]))
        groups.setdefault(key, []).append(unit)
    return list(groups.values())


def _with_outputs(
    stats: Stats | None, group: Sequence[Unit], moments: Mapping[str, Tensor]
) -> Stats | None:
    """Return the statistics of a group's input, with the moments of its outputs where known."""
    if stats is None or not moments:
        return stats
    return stats.with_outputs(moments.get(unit.name) for unit in group)


def _weight(model: Any, unit: Unit) -> Tensor:
    return place_of(model).on_device(model.get_submodule(unit.name).weight.detach()).float()
