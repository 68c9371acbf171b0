"""Score plans on the real end-to-end loss, sharing all the work that plans have in common.

Candidates are run block by block: those that agree on every block so far share one hidden state,
so a mutation costs only the blocks from the first one it changes, and each block's levels are
decompressed once per round. What is scored is what ships: the operators are those of the packed
tensors in the store.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import compose
from .dropped import dropped_forward
from .fitness.base import Fitness, Targets
from .level import Level
from .methods.base import Operator
from .store import LevelStore, Progress
from .stream import BlockStream
from .sub_blocks import find_sub_blocks

HIDDEN_BYTES = 1 << 30  # of hidden states of all candidates at once
CACHE_BYTES = 4 << 30  # of decompressed weights
_ROOM = 3  # a block holds about this many activations as large as its input, per candidate


class Evaluator:
    """Losses of plans on a pool of token sequences (n_sequences, seq_len).

    model: the dense model, in the dtype to compute in; it is patched while a call runs and is
    whole again after. Levels are mappings unit -> Level as `Plan.levels`.
    """

    def __init__(
        self,
        model: Any,
        store: LevelStore,
        tokens: Tensor,
        fitness: Fitness,
        *,
        cache_bytes: int = CACHE_BYTES,
        hidden_bytes: int = HIDDEN_BYTES,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.store, self.tokens, self.fitness = model, store, tokens, fitness
        self.stream = BlockStream(model)
        self.device = model.get_input_embeddings().weight.device
        self.hidden_bytes = hidden_bytes
        self.progress = progress
        self.evaluated_tokens = 0
        self._targets: dict[int, Targets] = {}
        self._operators = _OperatorCache(model, store, cache_bytes)
        self._units: dict[int, list[str]] = defaultdict(list)
        for unit in store.units.values():
            self._units[unit.block].append(unit.name)
        self._dropped: dict[str, Operator] = {}
        for sub in find_sub_blocks(model):
            self._units[sub.block].append(sub.name)
            self._dropped[sub.name] = dropped_forward(model, sub)

    def losses(
        self, plans: Sequence[Mapping[str, Level]], sequences: Sequence[int]
    ) -> list[list[float]]:
        """Return for each plan its loss on each of the pool's `sequences`, given by number.

        All plans see the same sequences, so differences between them are paired. ValueError
        where the pool has no such sequence.
        """
        for number in sequences:
            if not 0 <= number < len(self.tokens):
                raise ValueError(
                    f"the pool has sequences 0 to {len(self.tokens) - 1}, not {number}"
                )
        losses: list[list[float]] = [[] for _ in plans]
        self.evaluated_tokens += len(plans) * len(sequences) * self.tokens.shape[1]
        with torch.no_grad():
            for part in _chunks(sequences, self._sequences_at_once(len(plans))):
                self._make_targets(part)
                for i, values in self._score(plans, part):
                    losses[i].extend(values)
        return losses

    @torch.no_grad()
    def logits(self, plan: Mapping[str, Level], input_ids: Tensor) -> Tensor:
        """Return the logits (batch, seq, vocabulary) of the model compressed by `plan`."""
        with self._installed(plan, [unit for units in self._units.values() for unit in units]):
            return self.stream.run_from(0, input_ids, self.stream.embed(input_ids))

    # -- one round -----------------------------------------------------------------------------

    def _score(
        self, plans: Sequence[Mapping[str, Level]], part: Sequence[int]
    ) -> Iterator[tuple[int, list[float]]]:
        ids = self.tokens[list(part)].to(self.device)
        groups = [(self.stream.embed(ids), list(range(len(plans))))]
        for block in range(self.stream.n_blocks):
            groups = [
                (out, members)
                for hidden, together in groups
                for out, members in self._split(block, hidden, together, plans)
            ]
            if self.progress:
                self.progress("evaluate", block + 1, self.stream.n_blocks)
        for hidden, members in groups:
            values = [
                self._loss(number, ids[j : j + 1], hidden[j : j + 1])
                for j, number in enumerate(part)
            ]
            for member in members:
                yield member, values

    def _split(
        self, block: int, hidden: Tensor, together: list[int], plans: Sequence[Mapping[str, Level]]
    ) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield the block's output for each distinct choice of levels among plans so far equal."""
        units = self._units[block]
        choices: dict[tuple[Level | None, ...], list[int]] = defaultdict(list)
        for i in together:
            choices[tuple(plans[i].get(unit) for unit in units)].append(i)
        for members in choices.values():
            with self._installed(plans[members[0]], units):
                yield self.stream.run_block(block, hidden), members

    def _loss(self, number: int, ids: Tensor, hidden: Tensor) -> float:
        logits = self.stream.head(ids, hidden)[0]
        return self.fitness.loss(logits, ids[0], self._targets[number])

    def _make_targets(self, part: Sequence[int]) -> None:
        for number in part:
            if number not in self._targets:
                ids = self.tokens[number : number + 1].to(self.device)
                logits = self.model(input_ids=ids, use_cache=False).logits[0]
                self._targets[number] = self.fitness.targets(logits, ids[0])

    def _sequences_at_once(self, n_plans: int) -> int:
        width = self.model.get_input_embeddings().weight.shape[1]
        each = self.tokens.shape[1] * width * 4 * (n_plans + _ROOM)
        return max(1, self.hidden_bytes // each)

    @contextmanager
    def _installed(self, plan: Mapping[str, Level], units: Sequence[str]) -> Iterator[None]:
        """Make the modules of `units` compute at their levels; absent ones stay dense."""
        patched = []
        try:
            for unit in units:
                level = plan.get(unit)
                if level is not None and not level.is_dense:
                    module = self.model.get_submodule(unit)
                    forward = self._dropped.get(unit) if level.is_drop else None
                    module.forward = forward or self._operators.get(unit, level)
                    patched.append(module)
            yield
        finally:
            for module in patched:
                del module.forward


class _OperatorCache:
    """Operators of (unit, level), least recently used dropped first."""

    def __init__(self, model: Any, store: LevelStore, limit_bytes: int) -> None:
        self.model, self.store, self.limit_bytes = model, store, limit_bytes
        self.size_bytes = 0
        self._kept: OrderedDict[tuple[str, Level], tuple[Operator, int]] = OrderedDict()

    def get(self, unit: str, level: Level) -> Operator:
        key = (unit, level)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        module = self.model.get_submodule(unit)
        shape, weight = self.store.units[unit].shape, module.weight
        state = {k: v.to(weight.device) for k, v in self.store.state(unit, level).items()}
        operator = compose.operator(level, state, module.bias, shape, weight.dtype)
        size = shape[0] * shape[1] * weight.element_size()
        self._kept[key] = (operator, size)
        self.size_bytes += size
        while self.size_bytes > self.limit_bytes and len(self._kept) > 1:
            _, (_, freed) = self._kept.popitem(last=False)
            self.size_bytes -= freed
        return operator


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
