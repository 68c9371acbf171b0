"""PV-Tuning: an optimiser that changes codes, beside the scales and norms it trains.

    optimizer = PVTuning(model, lr=1e-4)
    DistillationTrainer(model, args, train_dataset=data, teacher=dense,
                        optimizers=(optimizer, None)).train()
    settle(model)
    model.save_pretrained("tuned")        # the same levels, the same bytes

Malinovskii et al. 2024 (arXiv:2405.14852), algorithm 1, for scalar grids W = s (q - z). A step is

    V   at every step: scales (norms, biases) by AdamW, codes fixed: s <- s - lr Adam(dL/ds)
    P   at every `every`th: of each layer some weights change their code by one against the sign of
        their gradient g = dL/dW, summed since the last P-step, where the range allows: at most a
        share `max_change` of them, those of the largest |g| / (v s) first, as long as |dW|_x <=
        trust |W|_x; all others keep theirs.

v is the mean square of a step's gradient, as in Adam, which stands for the curvature: g s is what a
change by s promises, v s^2 / 2 what it costs. |.|_x weighs each column with its mean squared
inputs, so it is what the layer's outputs change by. The paper takes the largest |u|, u Adam's
direction, at each step, and measures |dW|: with few tokens in a step those are weights whose
gradient is noise, and in columns of large inputs a few of them do much harm. No buffer of
unrounded weights is kept (`delta_decay=1`). dL/dW is taken at the layer's output and needs as
much memory as float32 weights, its sum and v twice as much again.

Of `trellis` levels the codes are walks through tiles of 256 rotated weights. There u is the summed
gradient over the mean squared inputs, and max_change a share of the tiles: those with the longest u
are coded again, towards Y - eta u in the rotated basis (`walk_steps.py`).

Of several processes (DDP) each moves the same codes: what they saw is averaged at every step.

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
from torch.autograd.function import once_differentiable

from ..base.ranks import is_in_group, mean_over_group
from ..loading.layers import CompressedLinear, compressed_linears
from ..methods import compose
from ..methods.maths.codes import CodedMethod, n_groups, unpack_grid
from ..methods.maths.packing import pack, unpack
from ..methods.trellis import Trellis
from ..plans.level import Level
from .tunable import make_tunable, rates
from .walk_steps import move_walks

Show = Callable[[Tensor, Tensor], None]  # what dL/dW and squared inputs are told
DAMPING = 1e-3  # of second moments, in their mean


class PVTuning(torch.optim.AdamW):
    """AdamW on the floats of a compressed model, and the P-step on its codes.

    kinds: the floats to train, as `make_tunable` takes them, which this calls. lr, betas, eps,
    weight_decay: AdamW's, for the floats. every: steps between two P-steps. max_change, trust: of
    each layer and P-step, see the module; both shrink as the schedule shrinks lr.

    >>> PVTuning(model, lr=1e-4)                                    # doctest: +SKIP
    """

    def __init__(
        self,
        model: Any,
        *,
        lr: float = 1e-4,
        kinds: Sequence[str] = ("scales", "norms"),
        max_change: float = 1e-2,
        trust: float = 2e-2,
        every: int = 8,
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
        codes = [layer.get_parameter("codes") for layer in self.layers.values()]
        groups: list[dict[str, Any]] = [
            *rates(model, lr),
            {"params": codes, "weight_decay": 0.0, "codes": True},
        ]
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.full_rate, self.trust = lr, trust
        self.max_change, self.every = max_change, every
        self.n_changed = 0  # codes changed, counted at every change
        self._seen: dict[str, tuple[Tensor, Tensor]] = {}  # of this step: dL/dW, squared inputs
        for name, layer in self.layers.items():
            layer.register_forward_hook(_Watch(self, name))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        """Do the V-step and, where it is due, the P-step."""
        loss = super().step(closure)  # codes have no .grad: they are left alone
        group = self.param_groups[-1]
        for name, layer in self.layers.items():
            seen = self._seen.pop(name, None)
            if seen is None and not is_in_group():
                continue
            gradient, inputs = map(mean_over_group, seen or _nothing(layer))
            if is_in_group() and not bool(inputs.any()):
                continue  # nobody's text came here
            state = self.state[layer.get_parameter("codes")]
            is_scalar = isinstance(_method(layer.level), CodedMethod)
            _note(state, gradient, inputs, group["betas"][1], by_weight=is_scalar)
            if state["step"] % self.every == 0:
                change = self._change if is_scalar else self._code_again
                change(layer, state, group["lr"] / self.full_rate)
                state["sum"].zero_()
        return loss

    def _change(self, layer: CompressedLinear, seen: dict[str, Any], pace: float) -> None:
        """Change the codes of the largest |u| / s by one, within `max_change` and `trust`."""
        _, params, state, _ = next(compose.terms(layer.level, layer.state))
        shape, u = layer.shape, _direction(seen)
        grouped = (shape[0], n_groups(shape, params["group_size"]), -1)
        scale, zero = unpack_grid(state, shape, **params)
        q = unpack(state["codes"], params["bits"], shape[1]).to(torch.int16)
        s = scale.expand((*grouped[:2], shape[1] // grouped[1])).reshape(shape)
        move = -(u * s).sign().to(torch.int16)  # a scale may have been trained across 0
        able = (q + move >= 0) & (q + move < 2 ** params["bits"]) & (move != 0)
        most = int(self.max_change * pace * q.numel())
        worth = torch.where(able, (u / s).abs(), 0.0).flatten()
        order = worth.topk(min(most, int(able.sum()))).indices
        W = ((q.view(grouped) - zero) * scale).view(shape)
        # |dW|^2 of the first k, which must stay within (trust |W|)^2
        within = (s.square() * seen["inputs"]).flatten()[order].double().cumsum(0)
        limit = (self.trust * pace) ** 2 * (W.double().square() * seen["inputs"]).sum()
        order = order[: int((within <= limit).sum())]
        if not len(order):
            return
        q.view(-1)[order] += move.view(-1)[order]
        packed = pack(q.to(torch.uint8), params["bits"])
        layer.get_parameter("codes").copy_(packed.view_as(state["codes"]))
        self.n_changed += len(order)

    def _code_again(self, layer: CompressedLinear, seen: dict[str, Any], pace: float) -> None:
        """Code the tiles of the longest u again, as far as `max_change` and `trust` allow."""
        _, params, state, _ = next(compose.terms(layer.level, layer.state))
        how = {"max_change": self.max_change * pace, "trust": self.trust * pace}
        _, n_changed = move_walks(state, seen["sum"], seen["inputs"], params, **how)
        self.n_changed += n_changed


class _Watch:
    """A forward hook that adds dL/dW of a layer to the optimiser's gradients in the backward."""

    def __init__(self, optimizer: PVTuning, name: str) -> None:
        self._optimizer, self.name = weakref.ref(optimizer), name

    def __call__(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._optimizer() is None or not (torch.is_grad_enabled() and output.requires_grad):
            return None
        trained = {n: t for n, t in (*layer.state.items(), ("bias", layer.bias)) if _is_trained(t)}
        if not trained.keys() - {"bias"} or compose.bias_fix(layer.level, layer.state) is not None:
            watched: Tensor = _Passed.apply(output, args[0].detach(), self.add)
            return watched
        own = self.add, layer, tuple(trained)
        watched = _TrainedLayer.apply(output.detach(), *own, args[0], *trained.values())
        return watched

    def add(self, gradient: Tensor, inputs: Tensor) -> None:
        """Add dL/dW (out, in) float32 and the sums of the squared inputs (in,) of a batch."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if (found := optimizer._seen.get(self.name)) is not None:
            gradient, inputs = found[0].add_(gradient), found[1].add_(inputs)
        optimizer._seen[self.name] = gradient, inputs


class _Passed(torch.autograd.Function):
    """y unchanged; its gradient, passed on unchanged, gives dL/dW with the layer's input x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, show: Show) -> Tensor:
        ctx.save_for_backward(x)
        ctx.show = show
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, g = ctx.saved_tensors[0].flatten(0, -2), gradients[0].flatten(0, -2)
        ctx.show(g.float().T @ x.float(), x.float().square().sum(0))
        return gradients[0], None, None


class _TrainedLayer(torch.autograd.Function):
    """A layer's output y, computed before; dL/dW is made once, for codes and floats alike.

    The layer's own graph would compute its output again, and a dL/dW that nobody else sees.
    names: the floats that are trained, which follow x.
    """

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, show: Show, layer: Any, names: tuple[str, ...], x: Tensor, *floats: Any
    ) -> Tensor:
        ctx.save_for_backward(x, *floats)
        ctx.show, ctx.layer, ctx.names = show, layer, names
        return y.view_as(y)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> Any:
        layer, (x, *floats) = ctx.layer, ctx.saved_tensors
        leaves = {n: t.detach().requires_grad_() for n, t in zip(ctx.names, floats, strict=True)}
        bias = leaves.pop("bias", None)
        with torch.enable_grad():
            state = {**layer.state, **leaves}
            W = compose.decompress(layer.level, state, layer.shape, x.dtype)
        g, inputs = gradient.flatten(0, -2), x.flatten(0, -2)
        dW = g.T @ inputs.to(g.dtype)  # of autocast's dtype, where there is one
        ctx.show(dW.float(), inputs.float().square().sum(0))
        gradients = torch.autograd.grad(W, [*leaves.values()], dW.to(W.dtype))
        found = dict(zip(leaves, gradients, strict=True))
        if bias is not None:
            found["bias"] = g.sum(0).to(bias.dtype)
        dx = (gradient @ W.detach().to(g.dtype)).to(x.dtype) if ctx.needs_input_grad[4] else None
        return None, None, None, None, dx, *(found[name] for name in ctx.names)


def _is_trained(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.requires_grad


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


def _note(seen: dict[str, Any], g: Tensor, inputs: Tensor, beta: float, *, by_weight: bool) -> None:
    """Add a batch's gradient and squared inputs to what has been seen of a layer.

    by_weight: each weight has its own second moment; walks need none.
    """
    if not seen:
        seen.update(step=0, sum=torch.zeros_like(g), inputs=torch.zeros_like(inputs))
        if by_weight:
            seen["v"] = torch.zeros_like(g)
    seen["step"] += 1
    seen["sum"].add_(g)
    if by_weight:
        seen["v"].mul_(beta).add_(g.square(), alpha=1 - beta)
    seen["inputs"].mul_(beta).add_(inputs, alpha=1 - beta)


def _nothing(layer: CompressedLinear) -> tuple[Tensor, Tensor]:
    """Return what a process adds whose text did not come to the layer, an expert perhaps."""
    device = layer.get_parameter("codes").device
    return torch.zeros(layer.shape, device=device), torch.zeros(layer.shape[1], device=device)


def _direction(seen: dict[str, Any]) -> Tensor:
    """Return the gradient since the last P-step over its second moment, which is its curvature."""
    damped = seen["v"] + DAMPING * seen["v"].mean()
    direction: Tensor = seen["sum"] / damped.clamp_min_(torch.finfo(torch.float32).tiny)
    return direction
