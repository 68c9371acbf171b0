"""A narrower model: of each MLP the channels that it can spare least, down_proj refitted to them.

    python tests/benchmarks/widths.py MODEL OUT --share 0.875 --data calibration.txt --work w
    hf-evopress compress OUT --size 30MB ...            # a rival of the same file size
    hf-evopress evaluate SMALL --against MODEL

Channel c of down_proj goes first where |W[:, c]|^2 / (H^-1)[c, c], what leaving it out and
refitting the others costs, is least (optimal brain surgeon); then W[:, kept] is the least-squares
fit to the outputs of all. Statistics H of the inputs are those of the work folder, made if they
are not there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from methods import statistics
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_evopress.calibration.input_moments import load_stats
from hf_evopress.training.structured_masks import StructuredPruning, slice_model


@torch.no_grad()
def main(words: argparse.Namespace) -> None:
    statistics(words)
    model = AutoModelForCausalLM.from_pretrained(words.model)
    keep = 64 * round(words.share * model.config.intermediate_size / 64)
    pruning = StructuredPruning(channels=keep, end=0)
    pruning.install(model)
    gates = pruning.gates["channels"]
    for number, block in enumerate(model.model.layers):
        down = block.mlp.down_proj
        stats = load_stats(words.work, number)
        H = next(stats[name] for name in stats if name.endswith("down_proj")).hessian()
        kept, refitted = refit(down.weight.float(), H, keep)
        gates.log_alpha.data[number] = -1.0
        gates.log_alpha.data[number, kept] = 1.0
        down.weight[:, kept] = refitted.to(down.weight.dtype)
    gates.harden()
    slice_model(model, pruning)
    model.save_pretrained(words.out)
    AutoTokenizer.from_pretrained(words.model).save_pretrained(words.out)
    print(f"{keep} channels in {words.out}")


def refit(W: Tensor, H: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Return which `keep` columns of W (out, in) stay, and their values (out, keep)."""
    H = H.double()
    H = H + 1e-2 * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)
    cost = W.double().square().sum(0) / torch.linalg.inv(H).diagonal()
    kept = cost.topk(keep).indices.sort().values
    return kept, torch.linalg.solve(H[kept][:, kept], H[kept] @ W.double().T).T


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, required=True, help="of the channels that stay")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--work", required=True)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=24)
    parser.add_argument("--search", type=int, default=4)
    parser.add_argument("--sensitivity-tokens", type=int, default=4096)
    main(parser.parse_args())
