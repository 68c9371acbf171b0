"""Learned structured pruning under Trainer: fewer KV groups and intermediate channels, then sliced.

    model = get_peft_model(dense, LoraConfig(target_modules="all-linear"))
    pruning = StructuredPruning(kv_groups=2, channels=1152)
    Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()
    small = slice_model(model.merge_and_unload(), pruning)
    small.save_pretrained("small")                # an ordinary checkpoint of a smaller config

Compresso (Guo et al. 2023, arXiv:2310.05015): each KV group (its query heads with it) and each
channel of an MLP has a hard-concrete gate,

    z = clip(sigma((log u - log(1 - u) + log alpha) / tau) (b - a) + a, 0, 1)

a = -0.1, b = 1.1, tau = 2/3, u uniform, which multiplies the input of o_proj or down_proj while the
weights, or adapters over frozen ones, are trained. The penalty lambda_1 (s' - s) + lambda_2
(s' - s)^2 brings the expected sparsity s' of each block to the target s, which grows cubically;
the lambdas ascend. From step `end` on the gates are 0 and 1, the largest alphas win, and what is
left of the run heals. Stock configs have one width for all blocks: so has the target.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..base.ranks import mean_over_group, wait_for_group
from ..models.narrow import narrowed, widths
from ..models.units import find_blocks
from .callback_state import read_best, read_tensors, write_tensors

logger = logging.getLogger(__name__)

A, B, TAU = -0.1, 1.1, 2 / 3
_START = 2.5  # log alpha: nearly open
_PARTS = {"kv": ("self_attn", "o_proj"), "channels": ("mlp", "down_proj")}


class Gates:
    """The gates of one kind, (blocks, n), their Lagrange multipliers and, in the end, the mask."""

    def __init__(self, n_blocks: int, n: int, keep: int, rate: float, device: Any) -> None:
        self.keep, self.n = keep, n
        self.log_alpha = torch.full((n_blocks, n), _START, device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.log_alpha], lr=rate)
        self.multipliers = torch.zeros(2, n_blocks, device=device)
        self.noise = torch.zeros(n_blocks, n, device=device)  # log u - log(1 - u)
        self.mask: Tensor | None = None

    @property
    def target(self) -> float:
        return 1 - self.keep / self.n

    def expected_sparsity(self) -> Tensor:
        """Return 1 - P(z > 0), mean per block."""
        return 1 - torch.sigmoid(self.log_alpha - TAU * math.log(-A / B)).mean(1)

    def values(self, block: int, training: bool) -> Tensor:
        """Return z (n,) of a block with its graph: drawn in training, else the middle."""
        if self.mask is not None:
            return self.mask[block]
        x = self.log_alpha[block]
        x = (x + self.noise[block]) / TAU if training else x
        return (torch.sigmoid(x) * (B - A) + A).clamp(0.0, 1.0)

    def draw(self, generator: torch.Generator) -> None:
        u = torch.rand(self.noise.shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        self.noise = (u.log() - (1 - u).log()).to(self.log_alpha.device)

    def learn(self, share: float, ascent: float) -> None:
        """Step on the loss's gradient plus the penalty's; `share` of the target counts now."""
        if self.log_alpha.grad is not None:  # nobody else averages it over processes
            mean_over_group(self.log_alpha.grad)
        away = self.expected_sparsity() - share * self.target
        one, two = self.multipliers
        (one * away + two * away.square()).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.optimizer.zero_grad()
        away = away.detach()
        self.multipliers += ascent * torch.stack([away, away.square()])

    def harden(self) -> None:
        """Set the gates to 1 for the `keep` largest alphas of each block, to 0 for the others."""
        alpha = self.log_alpha.detach()
        best = alpha.topk(self.keep, dim=1).indices
        self.mask = torch.zeros_like(alpha).scatter_(1, best, 1.0)

    def kept(self) -> list[Tensor]:
        """Return the numbers of what stays, one tensor (keep,) per block."""
        assert self.mask is not None  # slice_model has looked
        return [row.nonzero().flatten() for row in self.mask]

    def state(self) -> dict[str, Tensor]:
        """Return all that the next step depends on but the noise, which is drawn for each."""
        found = {"log_alpha": self.log_alpha.detach(), "multipliers": self.multipliers}
        if self.mask is not None:
            found["mask"] = self.mask
        adam = self.optimizer.state_dict()["state"].get(0, {})  # empty before the first step
        return found | {f"adam.{name}": tensor for name, tensor in adam.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, on any device."""
        device = self.log_alpha.device
        self.log_alpha.data.copy_(state["log_alpha"])
        self.multipliers = state["multipliers"].to(device)
        self.mask = state["mask"].to(device) if "mask" in state else None
        adam = {n.removeprefix("adam."): t for n, t in state.items() if n.startswith("adam.")}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": {0: adam} if adam else {}, "param_groups": groups})


class StructuredPruning(TrainerCallback):
    """Learn which KV groups and intermediate channels of each block stay, while Trainer trains.

    kv_groups, channels: how many stay in every block; None leaves that kind whole. end: the step
    from which the gates are fixed, by default three quarters of the run; warmup: the share of the
    steps before it in which the target grows. rate: Adam's, for log alpha; ascent: the
    multipliers'. For blocks of q, k, v, o and gate, up, down projections (Llama, Mistral, Qwen).
    Trainer's checkpoints hold the gates too: a resumed run equals a straight one.
    """

    def __init__(
        self,
        *,
        kv_groups: int | None = None,
        channels: int | None = None,
        end: int | None = None,
        warmup: float = 0.5,
        rate: float = 0.1,
        ascent: float = 1.0,
        seed: int = 0,
    ) -> None:
        wanted = {"kv": kv_groups, "channels": channels}
        self.wanted = {kind: n for kind, n in wanted.items() if n is not None}
        if not self.wanted or min(self.wanted.values()) < 1:
            raise ValueError(
                "say how many stay in every block, 1 or more: kv_groups=..., channels=...; got "
                f"kv_groups={kv_groups}, channels={channels}"
            )
        if not (0 < warmup <= 1 and rate > 0 and ascent > 0):
            raise ValueError(
                f"warmup is in (0, 1], rate and ascent above 0; got warmup={warmup}, rate={rate}, "
                f"ascent={ascent}"
            )
        self.end, self.warmup, self.rate, self.ascent = end, warmup, rate, ascent
        self.seed = seed
        self.gates: dict[str, Gates] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end = state.max_steps * 3 // 4 if self.end is None else self.end
        self._generator.manual_seed(self.seed)
        self.install(kwargs["model"])
        if state.global_step:  # resumed
            self._load(read_tensors(args, state, self._file, self.wanted))

    def _load(self, saved: Mapping[str, Tensor]) -> None:
        self._generator.set_state(saved["generator"])
        for kind, gates in self.gates.items():
            own = {n.removeprefix(f"{kind}/"): t for n, t in saved.items() if f"{kind}/" in n}
            gates.load(own)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        tensors = {"generator": self._generator.get_state()}
        for kind, gates in self.gates.items():
            tensors |= {f"{kind}/{name}": tensor for name, tensor in gates.state().items()}
        write_tensors(args, state, self._file, tensors, self.wanted)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for gates in self.gates.values():
            if state.global_step >= self._end and gates.mask is None:
                gates.harden()
            gates.draw(self._generator)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        done = min(1.0, (state.global_step + 1) / max(1.0, self.warmup * self._end))
        for gates in self.gates.values():
            if gates.mask is None:
                gates.learn(1 - (1 - done) ** 3, self.ascent)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loads = args.load_best_model_at_end and not state.is_hyper_param_search
        if loads and state.best_model_checkpoint:
            wait_for_group()  # the first process may still be writing it
            self._load(read_best(state, self._file))
            if (best := state.best_global_step) <= self._end:
                logger.warning(
                    "the best model is that of step %d, before its gates were fixed (after step "
                    "%d): it was evaluated with open ones. eval_delay counts later ones alone",
                    best, self._end,
                )  # fmt: skip
        for gates in self.gates.values():
            if gates.mask is None:
                gates.harden()

    @property
    def _end(self) -> int:
        assert self.end is not None  # training has begun
        return self.end

    @property
    def _file(self) -> str:
        # kinds in the name: one callback may prune groups, another channels
        return "_".join(["structured_pruning", *self.wanted])

    def install(self, model: Any) -> None:
        """Put new gates before the output projections of `model`; what Trainer's start does."""
        self.remove()  # of an earlier training with this callback
        base = _base(model)
        blocks = find_blocks(base)[1]
        found = widths(base)
        for kind, keep in self.wanted.items():
            if keep > found[kind]:
                raise ValueError(f"a block has {found[kind]} {kind}, fewer than the {keep} to keep")
            device = next(base.parameters()).device
            self.gates[kind] = Gates(len(blocks), found[kind], keep, self.rate, device)
            part, last = _PARTS[kind]
            for number, block in enumerate(blocks):
                projection = getattr(getattr(block, part), last)
                hook = projection.register_forward_pre_hook(self._gate(kind, number))
                self._hooks.append(hook)

    def remove(self) -> None:
        """Take the gates out of the model again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _gate(self, kind: str, block: int) -> Any:
        def gated(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = self.gates[kind].values(block, module.training)
            each = args[0].shape[-1] // len(z)  # numbers of a KV group: of all its query heads
            return (args[0] * z.repeat_interleave(each).to(args[0].dtype), *args[1:])

        return gated


def slice_model(model: Any, pruning: StructuredPruning) -> Any:
    """Return `model` with only what `pruning` kept, a stock model of a smaller config, in place.

    Adapters have to be merged before. It computes what the masked model does.
    """
    if not pruning.gates or any(gates.mask is None for gates in pruning.gates.values()):
        raise ValueError("nothing is pruned yet: train with the callback first")
    if hasattr(model, "peft_config"):
        raise ValueError("adapters stand over the weights: pass model.merge_and_unload()")
    pruning.remove()
    return narrowed(model, **{kind: gates.kept() for kind, gates in pruning.gates.items()})


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model
