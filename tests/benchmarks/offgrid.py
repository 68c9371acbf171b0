"""Make a model of the same function whose weights lie on no quantisation grid.

    python tests/benchmarks/offgrid.py .cache/SmolLM2-135M-Instruct .cache/SmolLM2-135M-offgrid

A checkpoint that was stored as 4-bit codes gives its weights back to any code with as many levels
per group, so figures from 4 bits up mean nothing on it. Scaling a channel in one weight and
undoing that in the next leaves the function as it was and moves every group off its grid:

    norm gain g, weights W after it           g / s, W diag(s)      q, k, v; gate, up
    v rows, o columns (of one KV head)        diag(1/s) V, O diag(s)
    up rows, down columns                     diag(1/s) U, D diag(s)

An embedding that is tied to the head cannot be scaled: it gets uniform noise of one step of an
8-bit grid per 32. Weights are rounded to bfloat16, so that the result is a model of its own:
measure against it, not against the source. For models built as Llama is.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK = 32  # weights per scale of the grids that the source may lie on


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("source")
    options.add_argument("out")
    options.add_argument("--sigma", type=float, default=0.1, help="spread of the log scales")
    options.add_argument("--seed", type=int, default=20)
    given = options.parse_args()
    model = AutoModelForCausalLM.from_pretrained(given.source, dtype=torch.float32)
    print(f"4 bits per {BLOCK} leave of the squares: {leftover(model):.4f} before,", end=" ")
    move_off_grid(model, given.sigma, torch.Generator().manual_seed(given.seed))
    model.to(torch.bfloat16)
    print(f"{leftover(model):.4f} after (0.0061 of Gaussian weights)")
    model.save_pretrained(given.out)
    AutoTokenizer.from_pretrained(given.source).save_pretrained(given.out)


@torch.no_grad()
def move_off_grid(model: torch.nn.Module, sigma: float, generator: torch.Generator) -> None:
    """Scale the channels of `model`, in place."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, shared = config.num_key_value_heads, config.num_attention_heads
    shared //= heads

    def scales(n: int) -> Tensor:
        return torch.exp(sigma * torch.randn(n, generator=generator).clamp(-2.5, 2.5))

    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, after in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            s = scales(config.hidden_size)
            norm.weight /= s
            for linear in after:
                linear.weight *= s
        s = scales(heads * width)
        attention.v_proj.weight /= s[:, None]
        per_head = s.view(heads, 1, width).expand(-1, shared, -1)
        attention.o_proj.weight *= per_head.reshape(-1)
        s = scales(config.intermediate_size)
        mlp.up_proj.weight /= s[:, None]
        mlp.down_proj.weight *= s
    W = model.get_input_embeddings().weight
    groups = W.view(len(W), -1, BLOCK)
    step = groups.abs().amax(-1, keepdim=True) / 127
    groups += (torch.rand(groups.shape, generator=generator) - 0.5) * step


@torch.no_grad()
def leftover(model: torch.nn.Module) -> float:
    """Return the relative squared error of 4 bits with scale and minimum per block, linears."""
    lost = total = 0.0
    for name, weight in model.named_parameters():
        if name.endswith("_proj.weight"):
            W = weight.float().view(-1, BLOCK)
            low, high = W.amin(-1, keepdim=True), W.amax(-1, keepdim=True)
            step = ((high - low) / 15).clamp(min=1e-12)
            lost += float((((W - low) / step).round() * step + low - W).square().sum())
            total += float(W.square().sum())
    return lost / total


if __name__ == "__main__":
    main()
