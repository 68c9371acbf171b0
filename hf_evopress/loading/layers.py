"""The layer of a compressed model: an nn.Linear that owns packed tensors and no dense weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..methods import compose
from ..methods.base import Shape, State
from ..plans.level import Level
from ..plans.plan import Plan
from .computed_weight import READ_ONLY, ComputedWeight
from .runtimes import PACKED, RUNTIMES, Runtime


class CompressedLinear(nn.Linear):
    """x (..., in_features) -> (..., out_features) with a weight stored at a level.

    It is an nn.Linear so that PEFT wraps it and tools count it, yet it calls only
    nn.Module.__init__: the packed tensors of the level and the bias are its only parameters,
    and `weight` is computed at every look and cannot be changed. The packed tensors come
    without gradient.

    A cast of the model (`.to(torch.bfloat16)`) changes `weight_dtype`, the bias and tensors
    that are stored in the dtype of the model (low-rank factors). Tensors whose dtype is part
    of the level, such as scales, keep it: a cast scale would be another weight.

    After `prepare()` it also holds what a runtime computes with, and calls are faster.
    """

    def __init__(
        self,
        level: Level | str,
        shape: Shape,
        state: State,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.level = compose.normalize(level)
        self.out_features, self.in_features = shape
        self.weight_dtype = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        self._is_hf_initialized = True  # transformers must not draw a new random weight
        self._state_names = tuple(sorted(state))
        self._runtime: Runtime | None = None
        self._made: tuple[str, ...] = ()
        self._made_of: list[tuple[int, int]] = []
        for name in self._state_names:
            self.register_parameter(name, nn.Parameter(state[name], requires_grad=False))
        self.register_parameter("bias", bias)

    @classmethod
    def from_state(
        cls,
        level: Level | str,
        state: State,
        bias: Tensor | None,
        shape: Shape,
        *,
        dtype: torch.dtype | None = None,
    ) -> CompressedLinear:
        """Return the layer that holds `state`; raises ValueError unless it is one of `level`.

        `dtype` is the dtype that `weight` has and that low-rank factors are cast to; it
        defaults to that of the bias, or to torch's default.
        """
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        layer = cls.empty(level, shape, bias, dtype=dtype)
        layer._take(state)
        return layer

    @classmethod
    def empty(
        cls,
        level: Level | str,
        shape: Shape,
        bias: nn.Parameter | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> CompressedLinear:
        """Return a layer whose packed tensors are on the meta device, ready to be loaded."""
        level = compose.normalize(level)
        dtype = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        return cls(level, shape, compose.empty(level, shape, dtype), bias, dtype=dtype)

    def _take(self, state: State) -> None:
        if sorted(state) != list(self._state_names):
            raise ValueError(
                f"level '{self.level}' stores {', '.join(self._state_names)}; "
                f"got {', '.join(sorted(state)) or 'nothing'}"
            )
        for name, tensor in state.items():
            expected = self._parameters[name]
            assert expected is not None  # the state has a tensor for every name
            if name not in fixed_dtype(self.level, self.shape):
                tensor = tensor.to(expected.dtype)
            if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
                raise ValueError(
                    f"{name} of level '{self.level}' for a weight of shape {self.shape} is "
                    f"{expected.dtype} {tuple(expected.shape)}; "
                    f"got {tensor.dtype} {tuple(tensor.shape)}"
                )
            self._parameters[name] = nn.Parameter(tensor.detach(), requires_grad=False)
            self._parameters[name]._is_hf_initialized = True  # type: ignore[union-attr]

    @property
    def shape(self) -> Shape:
        """(out_features, in_features)."""
        return (self.out_features, self.in_features)

    @property
    def state(self) -> State:
        """The packed tensors by name, as they stand in a checkpoint."""
        return {name: getattr(self, name) for name in self._state_names}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight (out, in) in `weight_dtype`, computed now; changes to it raise."""
        W = compose.decompress(self.level, self.state, self.shape, self.weight_dtype)
        W = W.as_subclass(ComputedWeight)
        W._is_hf_initialized = True  # type: ignore[attr-defined]
        return W

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(READ_ONLY)
        super().__setattr__(name, value)

    def forward(self, input: Tensor) -> Tensor:
        if self._runtime is not None:
            made = self._prepared()
            if made is not None and self._runtime.takes(input, made):
                return self._runtime.run(input, made, self.level, self.state, self.shape, self.bias)
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in self.state.values())
        if trains and not torch.compiler.is_compiling():
            # the graph from scales to the dense weight would take twice a dense layer's memory
            kept: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(self._run, input, **kept)
        return self._run(input)

    def _run(self, x: Tensor) -> Tensor:
        return compose.operator(self.level, self.state, self.bias, self.shape, x.dtype)(x)

    def prepare(self, runtime: str) -> None:
        """Make and keep what `runtime` computes with, beside the packed tensors.

        The latter alone are saved. It is made anew after a change of the packed tensors; while
        those have a gradient, and for inputs that the runtime does not take, the weight is
        computed at each call as before.
        """
        if runtime not in RUNTIMES:
            raise ValueError(f"no runtime {runtime!r}; known: {', '.join(RUNTIMES)}")
        self._check_loaded(f"prepare runtime {runtime!r} of")
        self._forget()
        self._runtime = RUNTIMES[runtime]
        self._prepared()

    def _prepared(self) -> State | None:
        """Return what the runtime made of the packed tensors as they are now, if it can."""
        tensors = list(self.state.values())
        if self._runtime is None or any(t.requires_grad or t.is_meta for t in tensors):
            return None
        # a change in place, such as load_state_dict, counts a version up
        made_of = [(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors]
        if made_of != self._made_of:
            self._forget()
            with torch.no_grad():
                made = self._runtime.make(self.level, self.state, self.shape, self.weight_dtype)
            for name, tensor in made.items():
                self.register_buffer(f"made_{name}", tensor, persistent=False)
            self._made, self._made_of = tuple(made), made_of
        return {name: getattr(self, f"made_{name}") for name in self._made}

    def _forget(self) -> None:
        for name in self._made:
            delattr(self, f"made_{name}")
        self._made, self._made_of = (), []

    def _check_loaded(self, action: str) -> None:
        if any(tensor.is_meta for tensor in self.state.values()):
            raise ValueError(
                f"the packed tensors of {self} are offloaded or not loaded; load the model "
                f"with device_map=None or 'cpu' to {action} it"
            )

    def dequantize(self, *, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a stock nn.Linear with this weight and bias, in `dtype` or `weight_dtype`."""
        dtype = dtype or self.weight_dtype
        self._check_loaded("dequantize")
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        with torch.no_grad():
            W = compose.decompress(self.level, self.state, self.shape, dtype)
        linear.weight = nn.Parameter(W)
        fix = compose.bias_fix(self.level, self.state)
        if fix is not None and self.bias is None:
            raise ValueError(
                f"level '{self.level}' corrects the bias, and a stock model of this architecture "
                "has none here; use a level without centred=true"
            )
        if self.bias is not None:
            bias = self.bias.detach() if fix is None else self.bias.detach() + fix
            linear.bias = nn.Parameter(bias.to(dtype))
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        fixed = fixed_dtype(self.level, self.shape)
        kept = {id(tensor) for name, tensor in self.state.items() if name in fixed}

        def move(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if id(tensor) not in kept or out.dtype == tensor.dtype:
                return out
            return tensor.to(out.device)

        self._forget()  # a cast copy is not the packed weight in the new dtype
        super()._apply(move, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    def extra_repr(self) -> str:
        bits = compose.cost_bits(self.level, self.shape) / (self.out_features * self.in_features)
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, level='{self.level}', bits_per_weight={bits:.2f}"
        )


@lru_cache(maxsize=4096)
def fixed_dtype(level: Level, shape: Shape) -> frozenset[str]:
    """Return the names of the state's tensors whose dtype does not follow the model's."""
    a, b = (compose.empty(level, shape, dtype) for dtype in (torch.float32, torch.bfloat16))
    return frozenset(name for name in a if a[name].dtype == b[name].dtype)


def resolve_units(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Return unit -> module path in `model` for every unit of `plan` that is not dropped.

    A plan made for the whole model also names the modules of its base model, and the other way
    round. Raises ValueError that lists units the model does not have, that have another shape
    or cannot take their level, and TypeError for a unit that is not a linear layer.
    """
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    shapes: dict[str, Shape] = {
        name: (m.out_features, m.in_features)
        for name, m in modules.items()
        if isinstance(m, nn.Linear)
    }
    for unit, level in plan.items():
        for name in () if level.is_drop else (unit, unit.removeprefix(prefix), prefix + unit):
            if name in modules:
                found[unit] = name
                if name not in shapes:
                    raise TypeError(
                        f"{unit} is a {type(modules[name]).__name__}; level '{level}' "
                        "is for nn.Linear layers"
                    )
                shapes[unit] = shapes[name]
                break
    plan.check(shapes)
    _check_levels(model, {name: plan[unit] for unit, name in found.items()}, shapes)
    return found


def planned_levels(model: nn.Module, plan: Plan) -> dict[str, Level]:
    """Return module path -> canonical level for the layers of `model` that `plan` compresses.

    Those it leaves dense and sub-blocks that it drops are not among them.
    """
    names = resolve_units(model, plan)
    levels = {name: compose.normalize(plan[unit]) for unit, name in names.items()}
    return {name: level for name, level in levels.items() if not level.is_dense}


def _check_levels(
    model: nn.Module, levels: Mapping[str, Level], shapes: Mapping[str, Shape]
) -> None:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tied_names = {key.removesuffix(".weight") for pair in tied.items() for key in pair}
    wrong = []
    for name, level in levels.items():
        if level.is_dense:
            continue
        if name in tied_names:
            wrong.append(f"{name}: its weight is tied to another module's, it can only be dense")
            continue
        try:
            compose.check_shape(compose.normalize(level), shapes[name])
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError("the plan cannot be applied:\n  " + "\n  ".join(wrong[:8]) + more)


def replace_linears(
    model: nn.Module, plan: Plan, states: Callable[[str, Level], State]
) -> list[str]:
    """Put a CompressedLinear in the place of every linear layer that `plan` does not leave dense.

    `states(unit, level)` returns the packed tensors; it is called unit by unit, so that one
    dense weight at a time need exist beside the packed ones. Returns the module paths replaced.
    """
    names = resolve_units(model, plan)
    replaced = []
    for unit, level in plan.items():
        if level.is_dense or level.is_drop:
            continue
        linear = model.get_submodule(names[unit])
        assert isinstance(linear, nn.Linear)  # resolve_units returns linear layers only
        model.set_submodule(names[unit], compress_linear(linear, level, states(unit, level)))
        replaced.append(names[unit])
    return replaced


def compress_linear(linear: nn.Linear, level: Level | str, state: State) -> CompressedLinear:
    """Return the CompressedLinear that stands in for `linear`, with its bias, dtype and mode."""
    shape = (linear.out_features, linear.in_features)
    layer = CompressedLinear.from_state(level, state, linear.bias, shape, dtype=_dtype(linear))
    layer.train(linear.training)
    return layer


def _dtype(linear: nn.Linear) -> torch.dtype:
    # a CompressedLinear says so without computing its weight
    return linear.weight_dtype if isinstance(linear, CompressedLinear) else linear.weight.dtype


def compressed_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    """Return module path -> compressed layer, in module order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, CompressedLinear)}


def prepare_linears(model: nn.Module, runtime: str) -> None:
    """Let every CompressedLinear of `model` make what `runtime` computes with."""
    if runtime == PACKED:
        return
    for layer in compressed_linears(model).values():
        layer.prepare(runtime)


def restore_linears(model: nn.Module) -> None:
    """Put a stock nn.Linear with the same weight in the place of every CompressedLinear."""
    for name, layer in compressed_linears(model).items():
        model.set_submodule(name, layer.dequantize())


def blank_linears(model: nn.Module) -> dict[str, CompressedLinear]:
    """Put stock nn.Linears, whose weights are for others to fill, in the place of compressed ones.

    Returns what was there, by name.
    """
    taken = compressed_linears(model)
    for name, layer in taken.items():
        shape = (layer.in_features, layer.out_features)
        device = next(iter(layer.state.values())).device
        linear = nn.utils.skip_init(nn.Linear, *shape, bias=False, device=device, dtype=model.dtype)
        linear.bias = layer.bias
        model.set_submodule(name, linear.train(layer.training))
    return taken
