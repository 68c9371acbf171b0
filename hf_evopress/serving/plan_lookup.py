"""Which units of a plan a layer of a server is made of, by the names that the server gives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..methods import compose
from ..methods.base import Shape
from ..plans.level import DENSE, Level
from ..plans.plan import Plan

HEADS = ("lm_head", "embed_out", "output", "head")  # last names of output heads


@dataclass(frozen=True)
class Member:
    """One unit of a layer: its name in the plan, its level, and its shape (out, in)."""

    unit: str
    level: Level
    shape: Shape


class PlanLookup:
    """A plan whose units go by the names of a server's modules."""

    def __init__(self, plan: Plan) -> None:
        self._units = {unit: unit for unit in plan}  # name there -> name in the plan
        self._levels = compose.normalize_each(plan)
        self._shapes = dict(plan.shapes)

    def rename(self, new_name: Callable[[str], str | None]) -> None:
        """Let units go by other names; those without one keep theirs."""
        self._units = {new_name(name) or name: unit for name, unit in self._units.items()}

    def by_unit(
        self, values: Mapping[str, str], new_name: Callable[[str], str | None]
    ) -> dict[str, str]:
        """Return values by names of tensors in a checkpoint by the names that the plan gives them.

        new_name: as for `rename`, which was called before.
        """
        found = {}
        for name, value in values.items():
            owner, _, tensor = name.rpartition(".")
            path = new_name(owner) or owner
            found[f"{self._units.get(path, path)}.{tensor}"] = value
        return found

    def members(
        self, name: str, sizes: Sequence[int], columns: int, fused: Mapping[str, Sequence[str]]
    ) -> list[Member]:
        """Return what the linear layer `name` is made of, in the order of its outputs.

        sizes: the outputs of each part. fused: last name of a fused layer -> last names of its
        parts. Where none of them is compressed, an empty list. ValueError where a packed weight
        is not what the layer holds.
        """
        parent, _, last = name.rpartition(".")
        parts = fused.get(last, [last])
        paths = [f"{parent}.{part}" if parent else part for part in parts]
        levels = [self._level(path) for path in paths]
        if all(level.is_dense for level in levels):
            return []
        if len(parts) == 1 and last in fused:
            sizes = [sum(sizes)]  # one in the checkpoint as well
        if len(parts) != len(sizes):
            raise ValueError(
                f"{name} has {len(sizes)} parts here and {len(parts)} in the checkpoint, where "
                f"{', '.join(paths)} is compressed: its rows may stand in another order; serve an "
                "export (`hf-evopress export --format dense`) of this model"
            )
        return [
            self._member(path, level, (rows, columns))
            for path, level, rows in zip(paths, levels, sizes, strict=True)
        ]

    def end(self, name: str, shape: Shape) -> Member | None:
        """Return what the input embedding or the output head `name` is, None where it is dense.

        Without a name, which some models do not give it, it is the embedding.
        """
        if name:
            level = self._level(name)
            return None if level.is_dense else self._member(name, level, shape)
        found = [
            path
            for path in self._units
            if not self._level(path).is_dense
            and self._shapes.get(self._units[path]) == shape
            and path.rpartition(".")[2] not in HEADS
            and not _is_inside_a_block(path)
        ]
        if len(found) > 1:
            raise ValueError(f"the plan has several embeddings: {', '.join(found)}")
        return self._member(found[0], self._level(found[0]), shape) if found else None

    def is_dropped(self, name: str) -> bool:
        """Return whether the module `name` is in a sub-block that the plan drops."""
        path = name
        while path:
            if self._level(path).is_drop:
                return True
            path = path.rpartition(".")[0]
        return False

    def packed_inside(self, name: str) -> list[str]:
        """Return the compressed units inside the module `name`, as the plan calls them."""
        return [
            unit
            for path, unit in self._units.items()
            if path.startswith(f"{name}.") and not self._level(path).is_dense
        ]

    def _level(self, path: str) -> Level:
        unit = self._units.get(path)
        return DENSE if unit is None else self._levels[unit]

    def _member(self, path: str, level: Level, shape: Shape) -> Member:
        unit = self._units.get(path, path)
        known = self._shapes.get(unit, shape)
        if known != shape:
            raise ValueError(
                f"{unit} is {known[0]} x {known[1]} in the plan and {shape[0]} x {shape[1]} here: "
                "packed tensors cannot be cut or padded, so that tensor parallelism is not for "
                "them (tensor_parallel_size=1)"
            )
        return Member(unit, level, shape)


def _is_inside_a_block(path: str) -> bool:
    return any(part.isdigit() for part in path.split("."))
