"""PV-Tuning: an optimiser that changes codes, beside the scales and norms it trains.

    optimizer = PVTuning(model, lr=1e-4)
    DistillationTrainer(model, args, train_dataset=data, teacher=dense,
                        optimizers=(optimizer, None)).train()
    settle(model)
    model.save_pretrained("tuned")        # the same levels, the same bytes

Malinovskii et al. 2024 (arXiv:2405.14852), algorithm 1, for scalar grids W = s (q - z). A step is

    V   scales (norms, biases) by AdamW, codes fixed: s <- s - lr Adam(dL/ds)
    P   u = Adam(dL/dW); of each layer the weights with the largest |u| change their code by one
        against the sign of u, where the range allows: at most a share `max_change` of them, and
        as long as |dW| <= trust |W|; all others keep theirs.

The paper's proposal is W - eta u, rounded, with at least one code of change (`force_update`); eta
then falls out, since only the order of |u| is left. No buffer of unrounded weights is kept
(`delta_decay=1`), and a weight that moved starts its momentum anew. dL/dW is taken at the layer's
output and needs as much memory as float32 weights, Adam's moments twice as much again.

Of `trellis` levels the codes are walks through tiles of 256 rotated weights. There u is the mean
gradient in the rotated basis over the layer's root mean square one, and max_change a share of the
tiles: those with the longest u are coded again, towards Y - eta u (`walk_steps.py`).

Codes that are kept are those of the last step; `load_best_model_at_end` of Trainer, with an
evaluation set, keeps those of the best held-out loss instead. Layers whose first term is `rtn`,
`gptq` or `trellis` take part; others, and later terms, are trained by the V-step alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..loading.layers import CompressedLinear, compressed_linears
from ..methods import compose
from ..methods.maths.codes import CodedMethod, n_groups, unpack_grid
from ..methods.maths.packing import pack, unpack
from ..methods.trellis import Trellis
from ..plans.level import Level
from .tunable import make_tunable
from .walk_steps import move_walks, rotated_gradient, spread_tiles


class PVTuning(torch.optim.AdamW):
    """AdamW on the floats of a compressed model, and the P-step on its codes.

    kinds: the floats to train, as `make_tunable` takes them, which this calls. lr, betas, eps,
    weight_decay: AdamW's, for the floats. max_change, trust: of each layer and step, see the
    module; both shrink as the schedule shrinks lr. every: steps between two P-steps.

    >>> PVTuning(model, lr=1e-4)                                    # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        *,
        lr: float = 1e-4,
        kinds: Sequence[str] = ("scales", "norms"),
        max_change: float = 1e-2,
        trust: float = 1e-2,
        every: int = 1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not (0 < max_change <= 1 and trust > 0 and every >= 1 and lr > 0):
            raise ValueError(
                "max_change is in (0, 1], trust and lr above 0, every 1 or more; got "
                f"max_change={max_change}, trust={trust}, lr={lr}, every={every}"
            )
        linears = compressed_linears(model)
        check_codes([layer.level for layer in linears.values()])
        self.layers = {n: m for n, m in linears.items() if has_p_step(m.level)}
        make_tunable(model, kinds)
        floats = [p for p in model.parameters() if p.requires_grad]
        codes = [layer.get_parameter("codes") for layer in self.layers.values()]
        groups: list[dict[str, Any]] = [
            {"params": floats},
            {"params": codes, "weight_decay": 0.0, "codes": True},
        ]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.full_rate, self.trust = lr, trust
        self.max_change, self.every = max_change, every
        self.n_changed = 0  # codes changed, counted at every change
        self._gradients: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.register_forward_hook(_Watch(self, name))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """Do the V-step and, where it is due, the P-step."""
        loss = super().step(closure)  # codes have no .grad: they are left alone
        group = self.param_groups[1]
        for name, layer in self.layers.items():
            gradient = self._gradients.pop(name, None)
            if gradient is None:
                continue
            state = self.state[layer.get_parameter("codes")]
            is_scalar = isinstance(_method(layer.level), CodedMethod)
            if not is_scalar:
                _, params, own, _ = next(compose.terms(layer.level, layer.state))
                gradient = rotated_gradient(gradient, params, own)
            u = _adam(state, gradient, group["betas"], group["eps"], by_weight=is_scalar)
            if state["step"] % self.every == 0:
                change = self._change if is_scalar else self._code_again
                change(layer, u, state["m"], group["lr"] / self.full_rate)
        return loss

    def _change(self, layer: CompressedLinear, u: Tensor, momentum: Tensor, pace: float) -> None:
        """Change the codes of the largest |u| by one, as far as `max_change` and `trust` allow."""
        _, params, state, _ = next(compose.terms(layer.level, layer.state))
        shape = layer.shape
        grouped = (shape[0], n_groups(shape, params["group_size"]), -1)
        scale, zero = unpack_grid(state, shape, **params)
        q = unpack(state["codes"], params["bits"], shape[1]).to(torch.int16)
        move = -u.sign().to(torch.int16)
        able = (q + move >= 0) & (q + move < 2 ** params["bits"]) & (move != 0)
        most = int(self.max_change * pace * q.numel())
        order = torch.where(able, u.abs(), 0.0).flatten().topk(min(most, int(able.sum()))).indices
        W = (q.view(grouped) - zero) * scale
        sizes = scale.expand(grouped[:2] + W.shape[2:]).flatten()
        # |dW|^2 of the first k, which must stay within (trust |W|)^2
        within = sizes[order].double().square().cumsum(0)
        limit = (self.trust * pace * W.double().norm()).square()
        order = order[: int((within <= limit).sum())]
        if not len(order):
            return
        q.view(-1)[order] += move.view(-1)[order]
        momentum.view(-1)[order] = 0.0
        packed = pack(q.to(torch.uint8), params["bits"])
        layer.get_parameter("codes").copy_(packed.view_as(state["codes"]))
        self.n_changed += len(order)

    def _code_again(
        self, layer: CompressedLinear, u: Tensor, momentum: Tensor, pace: float
    ) -> None:
        """Code the tiles of the longest u again, as far as `max_change` and `trust` allow."""
        _, params, state, _ = next(compose.terms(layer.level, layer.state))
        moved, n_changed = move_walks(
            state, u, params, max_change=self.max_change * pace, trust=self.trust * pace
        )
        momentum[spread_tiles(moved, layer.shape)] = 0.0
        self.n_changed += n_changed


class _Watch:
    """A forward hook that adds dL/dW of a layer to the optimiser's gradients in the backward."""

    def __init__(self, optimizer: PVTuning, name: str) -> None:
        self._optimizer, self.name = weakref.ref(optimizer), name

    def __call__(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._optimizer() is None or not (torch.is_grad_enabled() and output.requires_grad):
            return None
        watched: Tensor = _Passed.apply(output, args[0].detach(), self.add)
        return watched

    def add(self, x: Tensor, gradient: Tensor) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        G = gradient.flatten(0, -2).float().T @ x.flatten(0, -2).float()
        found = optimizer._gradients.get(self.name)
        optimizer._gradients[self.name] = G if found is None else found.add_(G)


class _Passed(torch.autograd.Function):
    """y unchanged; its gradient, passed on unchanged, is shown with the layer's input x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, show: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.show = show
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.show(ctx.saved_tensors[0], gradients[0])
        return gradients[0], None, None


def has_p_step(level: Level) -> bool:
    """Return whether the codes of a level can be changed: those of its first term."""
    return not (level.is_dense or level.is_drop) and isinstance(
        _method(level), (CodedMethod, Trellis)
    )


def check_codes(levels: Sequence[Level]) -> None:
    """Raise ValueError where none of a model's levels has codes that can be changed."""
    if not any(has_p_step(level) for level in levels):
        names = sorted({str(level) for level in levels})
        raise ValueError(
            "PV-Tuning changes codes of rtn, gptq and trellis levels, and the model has none; its "
            f"levels are {', '.join(names) or 'all dense'}"
        )


def check_judged(levels: Sequence[Level], teacher: str | None) -> None:
    """Raise ValueError where codes would move with no teacher to judge what comes of it."""
    moving = sorted({str(level) for level in levels if has_p_step(level)})
    if moving and teacher is None:
        raise ValueError(
            f"moving the codes of {moving[0]} can make a model much worse, and without a teacher "
            "nothing would tell: give --teacher DENSE, with which only what is closer on held-out "
            "text is kept"
        )


def _method(level: Level) -> Any:
    return compose.method(level.terms[0].method)


def _adam(
    state: Any, g: Tensor, betas: tuple[float, float], eps: float, *, by_weight: bool
) -> Tensor:
    """Return Adam's direction for gradient g, and advance its moments.

    by_weight: each weight has its own second moment, else all have their mean.
    """
    if not state:
        v = torch.zeros_like(g) if by_weight else g.new_zeros(())
        state.update(step=0, m=torch.zeros_like(g), v=v)
    state["step"] += 1
    state["m"].lerp_(g, 1 - betas[0])
    square = g.square() if by_weight else g.square().mean()
    state["v"].mul_(betas[1]).add_(square, alpha=1 - betas[1])
    m = state["m"] / (1 - betas[0] ** state["step"])
    root = (state["v"] / (1 - betas[1] ** state["step"])).sqrt_()
    return m.div_(root.add_(eps))
