"""Evaluate plans on the end-to-end loss, sharing the computation that plans have in common.

Candidates are run block by block: those that agree on every block so far share one hidden state,
so a mutation costs only the blocks from the first one it changes, and each block's levels are
decompressed once per round. What is scored is what ships: the operators are those of the packed
tensors in the store.

A loss does not depend on a plan's companions, on memory limits or on the number of processes,
to the last bit: sequences go through the model in batches that only their order decides.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..base.memory import within_memory
from ..base.placement import device_of
from ..base.progress import Progress
from ..base.ranks import ALONE, Ranks
from ..methods.base import Operator
from ..models.classes import class_of
from ..models.dropped import dropped_forward
from ..models.head import SomeColumns
from ..models.images import only_text
from ..models.kv_cache import SUFFIX as CACHE
from ..models.kv_cache import cached_forward
from ..models.sub_blocks import find_sub_blocks
from ..models.two_stacks import stream_of
from ..models.vision import BLOCK as VISION
from ..plans.level import Level
from ..store.level_store import LevelStore
from .fitness.base import Fitness, Loss, Targets
from .operator_cache import OperatorCache

HIDDEN_BYTES = 1 << 30  # of hidden states of all candidates at once
CACHE_BYTES = 4 << 30  # of decompressed weights
BATCH_TOKENS = 4096  # through a block at once; a change changes losses in their last bits
_ROOM = 3  # a block holds about this many activations as large as its input

Plans = Sequence[Mapping[str, Level]]
Group = tuple[list[Tensor], list[int]]  # hidden states by batch, the plans that have them


class Evaluator:
    """Losses of plans on a pool of token sequences (n_sequences, seq_len).

    model: the dense model, in the dtype to compute in; it is patched while a call runs and is
    whole again after. Levels are mappings unit -> Level as `Plan.levels`. ranks: processes that
    call with the same plans, divide them, and all get all losses. teacher: the model to come close
    to, where that is another than `model`, of the same embedding, final norm and head.
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
        ranks: Ranks = ALONE,
        progress: Progress | None = None,
        teacher: Any = None,
    ) -> None:
        self.model, self.store, self.tokens, self.fitness = model, store, tokens, fitness
        self.stream = stream_of(model)
        own = teacher is None or teacher is model
        self.teacher = self.stream if own else stream_of(teacher)
        self.is_pooled = class_of(model).is_pooled
        self.device = device_of(model)
        self.hidden_bytes = hidden_bytes
        self.batch_tokens = BATCH_TOKENS
        self.ranks = ranks
        self.progress = progress
        self.evaluated_tokens = 0
        self._targets: dict[int, Targets] = {}
        self._some = SomeColumns(model, self.stream) if fitness.columns else None
        self._operators = OperatorCache(model, store, cache_bytes)
        self._heads = [u.name for u in store.units.values() if u.role in ("head", "tied")]
        self._units: dict[int, list[str]] = defaultdict(list)
        for unit in store.units.values():
            self._units[unit.block].append(unit.name)
        self._first = [*self._units.get(VISION, []), *self._units.get(-1, [])]
        self._dropped: dict[str, Operator] = {}
        for sub in find_sub_blocks(model):
            self._units[sub.block].append(sub.name)
            if sub.kind == "attention":
                self._units[sub.block].append(f"{sub.name}{CACHE}")
            self._dropped[sub.name] = dropped_forward(model, sub)

    def losses(self, plans: Plans, sequences: Sequence[int]) -> list[list[float]]:
        """Return for each plan its loss on each of the pool's `sequences`, given by number.

        All plans see the same sequences, so differences between them are paired. ValueError
        where the pool has no such sequence.
        """
        for number in sequences:
            if not 0 <= number < len(self.tokens):
                raise ValueError(
                    f"the pool has sequences 0 to {len(self.tokens) - 1}, not {number}"
                )
        return within_memory(
            "scoring plans",
            lambda batch_tokens: self._in_batches(batch_tokens, plans, sequences),
            self.device,
            batch_tokens=self.batch_tokens,
            least=self.tokens.shape[1],
        )

    def _in_batches(
        self, batch_tokens: int, plans: Plans, sequences: Sequence[int]
    ) -> list[list[float]]:
        self.batch_tokens = batch_tokens
        with torch.no_grad(), self.stream:
            return self._losses(plans, sequences)

    def _losses(self, plans: Plans, sequences: Sequence[int]) -> list[list[float]]:
        self.evaluated_tokens += len(plans) * len(sequences) * self.tokens.shape[1]
        self.ranks.check_same("what to evaluate", ([sorted(p.items()) for p in plans], sequences))
        distinct = self._by_prefix(plans)
        size = self._batch_size
        batches = [range(i, min(i + size, len(sequences))) for i in range(0, len(sequences), size)]
        my_plans, my_batches = self.ranks.shares(len(distinct), len(batches))
        table = torch.zeros(len(plans), len(sequences), dtype=torch.float64)
        mine = [members for i, members in enumerate(distinct) if i in my_plans]
        if self.fitness.judges_models:
            for members in mine if 0 in my_batches else []:
                with self.stream.whole(), self.installed(plans[members[0]]):
                    table[members] = self.fitness.of_model(self.model)
            self.ranks.add_up(table)
            return table.tolist()
        found: list[tuple[int, list[int], list[Loss]]] = []
        # as many batches at once as memory allows, else as many plans: each is decompressed less
        room = max(1, self.hidden_bytes // self._batch_bytes)
        for together in _chunks(mine, max(1, room - _ROOM)):
            at_once = max(1, room // (len(together) + _ROOM))
            for part in _chunks([batches[i] for i in my_batches], at_once):
                chosen = [plans[members[0]] for members in together]
                ids = [self.tokens[[sequences[i] for i in batch]] for batch in part]
                numbers = [[sequences[i] for i in batch] for batch in part]
                self._make_targets([n for batch in numbers for n in batch])
                columns = [i for batch in part for i in batch]
                for j, values in self._score(chosen, ids, numbers):
                    found += [(member, columns, values) for member in together[j]]
                if not self.fitness.keeps_targets:
                    self._targets.clear()
        _fill(table, found)
        self.ranks.add_up(table)
        return table.tolist()

    @torch.no_grad()
    def logits(self, plan: Mapping[str, Level], input_ids: Tensor) -> Tensor:
        """Return the logits (batch, seq, vocabulary) of the model compressed by `plan`."""
        with self.stream:
            with self._installed(plan, self._first):
                hidden = self.stream.embed(input_ids)
            for block in range(self.stream.n_blocks):
                with self._installed(plan, self._units[block]):
                    hidden = self.stream.run_block(block, hidden, input_ids)
                self._let_go()
            with self._installed(plan, self._heads):
                return self.stream.head(input_ids, hidden)

    def installed(self, plan: Mapping[str, Level]) -> AbstractContextManager[None]:
        """Return a context in which the model computes at the levels of `plan`."""
        return self._installed(plan, [unit for units in self._units.values() for unit in units])

    # -- one round -----------------------------------------------------------------------------

    def _by_prefix(self, plans: Plans) -> list[list[int]]:
        """Return the numbers of equal plans together, plans that agree on first blocks near."""
        order = [unit for block in sorted(self._units) for unit in self._units[block]]
        equal: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for i, plan in enumerate(plans):
            equal[tuple(str(plan.get(unit)) for unit in order)].append(i)
        return [equal[key] for key in sorted(equal)]

    def _score(
        self, plans: Plans, ids: list[Tensor], numbers: list[list[int]]
    ) -> Iterator[tuple[int, list[Loss]]]:
        """Yield each plan's number and its losses, batch after batch."""
        ids = [batch.to(self.device) for batch in ids]
        groups: list[Group] = list(self._embed(ids, plans))
        for block in range(self.stream.n_blocks):
            made: list[Group] = []
            while groups:  # hidden states are let go as soon as a block has used them
                made += self._split(block, groups.pop(), plans, ids)
            groups = made[::-1]
            self._let_go()
            if self.progress:
                self.progress("evaluate", block + 1, self.stream.n_blocks)
        for hidden, together in groups:
            for members in self._choices(together, plans, self._heads):
                plan = plans[members[0]]
                with self._installed(plan, self._heads):
                    weight = self._head_weight(plan)
                    values = [
                        self._loss(number, batch[j : j + 1], states[j : j + 1], weight)
                        for batch, states, named in zip(ids, hidden, numbers, strict=True)
                        for j, number in enumerate(named)
                    ]
                for member in members:
                    yield member, values

    def _embed(self, ids: list[Tensor], plans: Plans) -> Iterator[Group]:
        """Yield the input of the first block for each distinct choice of the embedding's level."""
        units = self._first
        for members in self._choices(range(len(plans)), plans, units):
            with self._installed(plans[members[0]], units):
                rest = self.stream.place.let_rest
                yield [rest(self.stream.embed(batch)) for batch in ids], members

    @staticmethod
    def _choices(
        together: Iterable[int], plans: Plans, units: Sequence[str]
    ) -> Iterable[list[int]]:
        """Return the plans that agree on the levels of `units`, together."""
        choices: dict[tuple[Level | None, ...], list[int]] = defaultdict(list)
        for i in together:
            choices[tuple(plans[i].get(unit) for unit in units)].append(i)
        return choices.values()

    def _let_go(self) -> None:
        """Forget the operators of a block where blocks only visit the device."""
        if self.stream.place.rest is not None:
            self._operators.clear()

    def _split(self, block: int, group: Group, plans: Plans, ids: list[Tensor]) -> Iterator[Group]:
        """Yield the block's output for each distinct choice of levels among plans so far equal."""
        (hidden, together), units = group, self._units[block]
        for members in self._choices(together, plans, units):
            with self._installed(plans[members[0]], units):
                yield self._run(block, hidden, ids), members

    def _run(
        self, block: int, hidden: list[Tensor], ids: list[Tensor], stream: Any = None
    ) -> list[Tensor]:
        """Return the block's output for each batch."""
        stream = stream or self.stream
        rest, run = stream.place.let_rest, stream.run_block
        return [rest(run(block, h, batch)) for h, batch in zip(hidden, ids, strict=True)]

    def _loss(self, number: int, ids: Tensor, hidden: Tensor, weight: Tensor | None) -> Loss:
        targets = self._targets[number]
        ids, hidden = only_text(self.model, ids, hidden)
        return sum(
            self._share(ids, hidden, targets, part, weight) for part in self._parts(ids.shape[1])
        )

    def _parts(self, n_tokens: int) -> list[slice]:
        """Return the slices of positions that the head is run on; pooled outputs need them all."""
        return [slice(0, n_tokens)] if self.is_pooled else self.fitness.parts(n_tokens)

    def _share(
        self, ids: Tensor, hidden: Tensor, targets: Targets, part: slice, weight: Tensor | None
    ) -> Loss:
        if self.is_pooled:
            rows = self._head(ids, hidden, part)
            return self.fitness.share(rows, ids[0, : len(rows)], targets, slice(0, len(rows)))
        if self._some is None:
            return self.fitness.share(self._head(ids, hidden, part), ids[0], targets, part)
        x = self._some.inputs(ids[:, part], hidden[:, part])
        kept = self._some.at(x, targets["ids"][part].long(), weight)
        sample = self.fitness.sample(self._some.head.out_features).to(self.device)
        sampled = self._some.sampled(x, sample, weight)
        return self.fitness.share_at(kept, sampled, ids[0], targets, part)

    def _head_weight(self, plan: Mapping[str, Level]) -> Tensor | None:
        """Return the head's weight at its level where columns of it are looked at alone."""
        for unit in self._heads if self._some is not None else ():
            level = plan.get(unit)
            if level is not None and not level.is_dense:
                return self._operators.head_weight(unit, level)
        return None

    def _head(self, ids: Tensor, hidden: Tensor, part: slice) -> Tensor:
        """Return the logits (n, vocabulary) at the positions `part` of one sequence."""
        return self.stream.head(ids[:, part], hidden[:, part])[0]

    def _make_targets(self, numbers: Sequence[int]) -> None:
        """Run the teacher on the sequences that have no targets yet, side by side."""
        numbers = [number for number in dict.fromkeys(numbers) if number not in self._targets]
        if not numbers:
            return
        rest = self.teacher.place.let_rest
        ids = [self.tokens[number : number + 1].to(self.device) for number in numbers]
        with self.teacher if self.teacher is not self.stream else nullcontext():
            hidden = [rest(self.teacher.embed(one)) for one in ids]
            for block in range(self.teacher.n_blocks):
                hidden = self._run(block, hidden, ids, self.teacher)
        for number, one, states in zip(numbers, ids, hidden, strict=True):
            self._targets[number] = self._targets_of(one, self.stream.place.on_device(states))

    def _targets_of(self, ids: Tensor, hidden: Tensor) -> Targets:
        ids, hidden = only_text(self.model, ids, hidden)
        if self._some is not None and not self._targets:
            first = slice(0, 8)
            logits = self._head(ids, hidden, first)
            self._some.check(ids[:, first], hidden[:, first], logits)
        made = [
            self.fitness.targets(self._head(ids, hidden, part), ids[0, part])
            for part in self._parts(ids.shape[1])
        ]
        return {key: torch.cat([t[key] for t in made]) for key in made[0]}

    @property
    def _batch_size(self) -> int:
        """Sequences through a block at once."""
        return max(1, self.batch_tokens // self.tokens.shape[1])

    @property
    def _batch_bytes(self) -> int:
        """Bytes of the hidden states of one batch and plan."""
        width = self.model.get_input_embeddings().weight.shape[1]
        return self._batch_size * self.tokens.shape[1] * width * 4

    @contextmanager
    def _installed(self, plan: Mapping[str, Level], units: Sequence[str]) -> Iterator[None]:
        """Make the modules of `units` compute at their levels; absent ones stay dense."""
        changed = []
        try:
            for unit in units:
                level = plan.get(unit)
                if level is None or level.is_dense:
                    continue
                dropped = self._dropped.get(unit) if level.is_drop else None
                if unit.endswith(CACHE):
                    path = unit.removesuffix(CACHE)
                    forwards = {path: cached_forward(self.model, unit, level)}
                else:
                    forwards = {unit: dropped} if dropped else self._operators.get(unit, level)
                for path, forward in forwards.items():
                    module = self.model.get_submodule(path)
                    module.forward = forward
                    changed.append(module)
            yield
        finally:
            for module in changed:
                del module.forward


def _fill(table: Tensor, found: Sequence[tuple[int, list[int], list[Loss]]]) -> None:
    """Put losses (row, columns, values) into a table; those on a device are read all at once."""
    waiting = [value for _, _, values in found for value in values if isinstance(value, Tensor)]
    read = iter(torch.stack(waiting).tolist() if waiting else ())
    for row, columns, values in found:
        known = [next(read) if isinstance(value, Tensor) else value for value in values]
        table[row, columns] = torch.tensor(known, dtype=torch.float64)


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
