"""How many bytes an entropy coder would save: the entropy of the stored codes, level by level.

    python tests/benchmarks/entropy.py demo/smol-90MB.work/store

Of a level store, as every job leaves one in its work folder. Entropy is that of single codes with
one table per tensor, what a static ANS or Huffman coder can reach; the tables are not counted. A
trellis code's symbols are the bits that it adds per weight.
"""

from __future__ import annotations

import argparse
from collections import defaultdict

import torch
from torch import Tensor

from hf_evopress.methods import compose
from hf_evopress.methods.maths.codes import CodedMethod
from hf_evopress.methods.trellis import Trellis
from hf_evopress.plans.level import Level
from hf_evopress.store.level_store import LevelStore


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", help="folder of a level store")
    parser.add_argument("--every", type=int, default=1, help="look at every n-th layer only")
    words = parser.parse_args()
    store = LevelStore(words.store)
    found: dict[str, list[tuple[int, float, float]]] = defaultdict(list)
    for unit in list(store.units)[:: words.every]:
        for level in store.levels(unit):
            if (codes := symbols(store, unit, level)) is not None:
                weights = store.units[unit].shape[0] * store.units[unit].shape[1]
                stored = store.cost_bits(unit, level)
                saved = weights * int(
                    dict(level.terms[0].params)["bits"]
                ) - codes.numel() * entropy(codes)
                found[kind(level)].append((weights, stored, saved))
    print("| level | bits stored | saved by an entropy coder | of its bytes |\n|---|---|---|---|")
    for name, rows in sorted(found.items()):
        weights, stored, saved = (sum(row[i] for row in rows) for i in range(3))
        share = f"{saved / stored:.1%}"
        print(f"| `{name}` | {stored / weights:.3f} | {saved / weights:.3f} bits | {share} |")


def kind(level: Level) -> str:
    """Return the level without what does not change how codes are distributed much."""
    params = dict(level.terms[0].params)
    group = f",group_size={params['group_size']}" if "group_size" in params else ""
    return f"{level.terms[0].method}:bits={params['bits']}{group}"


def symbols(store: LevelStore, unit: str, level: Level) -> Tensor | None:
    """Return the codes of a level, None where it has none or more than one kind of them."""
    if level.is_dense or level.is_drop or len(level.terms) > 1:
        return None
    part, params, own, _ = next(compose.terms(level, store.state(unit, level)))
    if isinstance(part, CodedMethod):
        grid = part.codes(own, store.units[unit].shape, **params)
        return None if grid is None else grid[0].flatten()
    if isinstance(part, Trellis):
        bits = torch.stack([(own["codes"] >> i) & 1 for i in range(7, -1, -1)], dim=-1)
        places = 2 ** torch.arange(params["bits"] - 1, -1, -1)
        return (bits.reshape(-1, params["bits"]).long() * places).sum(-1)
    return None


def entropy(codes: Tensor) -> float:
    """Return the bits per code of an ideal coder that knows how often each comes."""
    counts = torch.bincount(codes.flatten().long()).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log2()).sum())


if __name__ == "__main__":
    main()
