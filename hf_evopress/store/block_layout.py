"""The file of a model of many sizes: what all sizes need first, then blocks in their order.

The first bytes of such a file are then all that a smaller model needs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..plans.block_order import order_of
from ..plans.plan import Plan
from .header import Entry, entries_of
from .tensor_bytes import in_step, write_tensors

_BLOCK = re.compile(r"block(\d+)_\w+")
NAME = "model.safetensors"


def owners(tensors: Iterable[Entry]) -> set[str]:
    """Return the names of the layers that have blocks, as the files call them."""
    split = (entry.name.rpartition(".") for entry in tensors)
    return {owner for owner, _, name in split if _BLOCK.fullmatch(name)}


def arranged(tensors: Iterable[Entry], plan: Plan, n: int, units: Mapping[str, str]) -> list[Entry]:
    """Return the tensors of the model with the first n blocks of the plan's order, in order.

    units: the name of a layer in the files -> that of its unit, where they differ. ValueError
    where the file lacks blocks that the plan has.
    """
    counts: Counter[str] = Counter()
    places: dict[tuple[str, int], int] = {}
    for place, unit in enumerate(order_of(plan)):
        places[unit, counts[unit]] = place
        counts[unit] += 1
    found, others = [], []
    for entry in tensors:
        layer, _, name = entry.name.rpartition(".")
        owner = units.get(layer, layer)
        block = _BLOCK.fullmatch(name)
        if owner not in counts or block is None:
            others.append(entry)
        elif (at := places.get((owner, int(block[1])))) is None:
            raise ValueError(f"{entry.file} has {entry.name}, which is no block of its plan")
        else:
            found.append((at, entry))
    lacking = set(range(len(places))) - {place for place, _ in found}
    if lacking:
        unit, number = next(key for key, place in places.items() if place in lacking)
        raise ValueError(f"the checkpoint lacks block {number} of {unit}; export it again")
    blocks = [entry for place, entry in sorted(found, key=lambda pair: pair[0]) if place < n]
    return in_step([*others, *blocks])


def arrange(folder: Path, plan: Plan, units: Mapping[str, str]) -> Path:
    """Write the safetensors files of `folder` anew as one, in the plan's order; return it.

    units: as for `arranged`.
    """
    files = sorted(folder.glob("*.safetensors"))
    tensors = [e for file in files for e in entries_of(file)]
    made = folder / f"arranged.{NAME}"
    write_tensors(made, arranged(tensors, plan, len(order_of(plan)), units))
    for file in files:
        file.unlink()
    (folder / f"{NAME}.index.json").unlink(missing_ok=True)
    made.rename(folder / NAME)
    return folder / NAME


def file_bytes(tensors: Sequence[Entry]) -> int:
    """Return an upper bound of the bytes of a safetensors file of these tensors."""
    return 128 + sum(len(entry.name) + 100 + entry.n_bytes for entry in tensors)
