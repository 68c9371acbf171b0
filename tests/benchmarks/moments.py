"""Which second moments to round with: the KL of one block whose layers were rounded with each.

    python tests/benchmarks/moments.py .cache/SmolLM2-135M-Instruct --data calibration.txt \
        --work w --block 20 --level trellis:bits=2,state_bits=8,codebook=weyl

--work is the folder that `trellis.py model` left with the same data and counts. H (inputs) and G
(outputs) stand for the curvature E[(g x^T) (x) (g x^T)] of a layer as G (x) H. Made of all but
the last 8 sequences, KL measured on those, in the whole model with that block alone rounded:

as they are         H and G, each by itself, with the first position in H as the package has it
one-sided           H alone
G of twice as much  G, and one from labels drawn anew, averaged
weighted            H from inputs that count as |g|^2, G from gradients that count as |x|^2; YAQA's
                    first sketch (Tseng, Sun and De Sa 2025, arXiv:2505.22988)
sequences           of gradients of the weight that are summed over a sequence; its second sketch
between             the mean of that and of H and G as they are, each over its mean diagonal
no first position   H of all tokens alike
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from hf_evopress.calibration.input_moments import load_stats
from hf_evopress.calibration.output_moments import _Backward, load_moments
from hf_evopress.jobs.job import Job
from hf_evopress.methods.compose import compress_stacked, decompress, normalize
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.models.units import find_units
from hf_evopress.recipes.recipe import Recipe

TEST = 8  # sequences


def main() -> None:
    words = arguments()
    job = Job(recipe(words))
    model, tokens = job.model, job.tokens["calibration"]
    names = [unit.name for unit in find_units(model) if unit.block == words.block]
    stats, moments = load_stats(words.work, words.block), load_moments(words.work, words.block)
    pairs = pairs_of(model, tokens, words, names)
    dense = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    known: dict[str, dict[str, Stats]] = {}
    for name in names:
        for kind, found in variants(stats[name], moments[name], *pairs.pop(name)):
            known.setdefault(kind, {})[name] = found
    test = tokens[-TEST:]
    with torch.no_grad():
        wanted = [log_probabilities(model, ids).bfloat16() for ids in test]
    first: Tensor | None = None
    print("| moments | KL (nats) | to the first | CPU s |\n|---|---|---|---|")
    levels = {f"as they are, {text}": ("as they are", text) for text in words.options}
    for row, (kind, text) in ({kind: (kind, "") for kind in known} | levels).items():
        start = time.process_time()
        level = normalize(f"{words.level},{text}" if text else words.level)
        for name, W in dense.items():
            (state,) = compress_stacked(level, [W], known[kind][name])
            made = decompress(level, state, (W.shape[0], W.shape[1]), torch.float32)
            model.get_submodule(name).weight.data.copy_(made)
        nats = divergence(model, test, wanted)
        first = nats if first is None else first
        ratio = (nats / first).log()
        error = float(ratio.std()) / TEST**0.5
        print(
            f"| {row} | {nats.mean():.5f} | {ratio.mean().exp() - 1:+.1%} ± {error:.1%} "
            f"| {time.process_time() - start:.0f} |",
            flush=True,
        )


def variants(stats: Stats, G: Tensor, x: Tensor, g: Tensor) -> Iterator[tuple[str, Stats]]:
    """Yield names, and statistics of inputs x (sequences, tokens, in) and gradients g."""
    H = stats.hessian()
    yield "as they are", stats.with_outputs([G])
    yield "one-sided", stats.with_outputs([None])
    flat, back = x.flatten(0, 1), g.flatten(0, 1)
    n = len(flat)
    yield "G of twice as much", stats.with_outputs([(G + back.T @ back / n) / 2])
    yield "no first position", of(flat.T @ flat / n, G, n)
    by_g, by_x = (share(y.square().sum(1)) for y in (back, flat))
    weighted = (flat * by_g).T @ flat / n, (back * by_x).T @ back / n
    yield "weighted, H alone", of(weighted[0], G, n)
    yield "weighted, G alone", of(H, weighted[1], n)
    yield "weighted", of(*weighted, n)
    sums = torch.bmm(g.transpose(1, 2), x)  # (sequences, out, in)
    inner, outer = torch.zeros_like(H), torch.zeros_like(G)
    for one in sums:
        inner, outer = inner + one.T @ one, outer + one @ one.T
    yield "sequences", of(inner, outer, n)
    mixed = [unit(a) + unit(b) for a, b in ((H, inner), (G, outer))]
    yield "between", of(mixed[0], mixed[1], n)


def of(H: Tensor, G: Tensor, n: int) -> Stats:
    return Stats(H, None, None, n, outputs=(G,))


def share(sizes: Tensor) -> Tensor:
    return (sizes / sizes.mean()).unsqueeze(1)


def unit(H: Tensor) -> Tensor:
    return H / H.diagonal().mean()


def pairs_of(
    model: nn.Module, tokens: Tensor, words: argparse.Namespace, names: list[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the inputs (sequences, tokens, in) of each layer, and gradients at its outputs."""
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    with _Backward(
        model, tokens[:-TEST], Path(words.work), seed=11, batch_tokens=words.seq_len
    ) as backward:
        for block in reversed(range(words.block, backward.stream.n_blocks)):
            for pairs in backward.step(block, names if block == words.block else []):
                for name, (x, g) in pairs.items():
                    kept[name].append((x.flatten(0, -2), g.flatten(0, -2)))
    return {
        name: (torch.stack([x for x, _ in found]), torch.stack([g for _, g in found]))
        for name, found in kept.items()
    }


def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    found: Tensor = model(ids[None]).logits[0].float().log_softmax(-1)
    return found


@torch.no_grad()
def divergence(model: nn.Module, tokens: Tensor, wanted: list[Tensor]) -> Tensor:
    """Return the KL divergence of each sequence, nats per token."""
    found = []
    for ids, logs in zip(tokens, wanted, strict=True):
        p = logs.float()
        found.append((p.exp() * (p - log_probabilities(model, ids))).sum(-1).mean())
    return torch.stack(found)


def recipe(words: argparse.Namespace) -> Recipe:
    counts = {"calibration": words.calibration, "search": 4, "heldout": 2, "test": 0}
    return Recipe.from_dict(
        {
            "model": words.model,
            "work": words.work,
            "budget": {"ratio": 1.0},
            "ends": "dense",
            "levels": [words.level],
            "data": {"sources": [words.data], "seq_len": words.seq_len, **counts},
        }
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--work", default="demo/trellis.work")
    parser.add_argument("--block", type=int, default=20)
    parser.add_argument("--level", default="trellis:bits=2,state_bits=8,codebook=weyl")
    parser.add_argument(
        "--options",
        nargs="*",
        default=["damp_outputs=0.2", "damp_outputs=1.0", "damp=0.01", "damp=0.1"],
        help="of the level, each a row with the moments as they are",
    )
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=56)
    return parser.parse_args()


if __name__ == "__main__":
    main()
