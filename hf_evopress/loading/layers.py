"""The layer of a compressed model: an nn.Linear that owns packed tensors and no dense weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..methods import compose
from ..methods.base import Shape, State
from ..models.ends import ends_of, input_embedding, output_head
from ..models.units import check_weights_stay
from ..plans.level import Level
from ..plans.plan import Plan
from .experts import group_experts
from .kernels.direct import Direct, direct
from .kernels.layer import Kernel
from .kernels.operators import linear
from .kernels.tracing import is_compiled_into_one
from .packed import PackedWeight, tensors_of
from .runtime import Runtime
from .runtimes import AUTO, BY_KERNELS, RUNTIMES, log_choices

_STACKS = ("encoder", "decoder")


class CompressedLinear(PackedWeight, nn.Linear):  # type: ignore[override]
    """x (..., in_features) -> (..., out_features) with a weight stored at a level.

    It is an nn.Linear so that PEFT wraps it and tools count it, yet it calls only
    nn.Module.__init__: the packed tensors of the level and the bias are its only parameters,
    and `weight` is computed when its values are first used and cannot be changed.

    After `prepare()` it also holds what a runtime computes with, and calls are faster.
    """

    is_tied = False  # its packed tensors are those of another module
    _runtime: Runtime | None = None
    _direct: Direct | None = None
    _made: tuple[str, ...] = ()  # names of the tensors that the runtime made
    _made_of: tuple[tuple[int, int], ...] = ()  # places and versions of those it made them of

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
        self.out_features, self.in_features = shape
        default = torch.get_default_dtype() if bias is None else bias.dtype
        self.register_parameter("bias", bias)  # first: see `hold`
        self.hold(level, shape, state, dtype or default)

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

    def forward(self, input: Tensor) -> Tensor:
        if self._runtime is not None:
            made = self._prepared()
            if made and self._runtime.takes(input, made):
                return self._runtime.run(input, made, self.level, self.state, self.shape, self.bias)
        if self._kernel is not None:
            y = self._by_kernel(self._kernel, input)
            if y is not None:
                return y
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in self.state.values())
        if trains and not torch.compiler.is_compiling():
            # the graph from scales to the dense weight would take twice a dense layer's memory
            kept: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            return checkpoint(self._run, input, **kept)
        return self._run(input)

    @property
    def computes_by_kernel(self) -> bool:
        return self._kernel is not None and self._runtime is None

    def _by_kernel(self, kernel: Kernel, x: Tensor) -> Tensor | None:
        tensors = tensors_of(self)
        if torch.compiler.is_compiling():
            return linear(kernel, self._state_names, tensors, x)
        if self._direct is not None and (y := self._direct(tensors, x)) is not None:
            return y
        y = linear(kernel, self._state_names, tensors, x)
        if y is not None and (self._direct is None or not self._direct.stands(tensors)):
            self._direct = direct(kernel, tensors, x)  # once kernels are known to work
        return y

    def _run(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():  # the weight would be rounded to integers
            raise RuntimeError(f"an input in {x.dtype} for a layer that computes in floating point")
        if is_compiled_into_one() and not any(t.requires_grad for t in self.state.values()):
            tensors = list(self.state.values())
            own = self.level_text, self.shape[0], AUTO
            if torch.is_autocast_enabled(kind := x.device.type):
                x = x.to(torch.get_autocast_dtype(kind))
            return torch.ops.evopress.linear(x, tensors, self.bias, *own)
        return compose.operator(self.level, self.state, self.bias, self.shape, x.dtype)(x)

    def prepare(self, runtime: str) -> str:
        """Make and keep what `runtime` computes with, beside the packed tensors.

        The latter alone are saved. It is made anew after a change of the packed tensors; while
        those have a gradient, and for inputs that the runtime does not take, the weight is
        computed at each call as before. Returns what this layer computes with.
        """
        choice = super().prepare(runtime)
        self._direct = None
        self._forget()
        self._runtime = RUNTIMES[runtime]
        if self._runtime is None:
            return choice
        self.check_loaded(f"prepare runtime {runtime!r} of")
        return runtime if self._prepared() else choice

    def _prepared(self) -> State | None:
        """Return what the runtime made of the packed tensors as they are now, if it can."""
        tensors = list(self.state.values())
        if self._runtime is None or any(t.requires_grad or t.is_meta for t in tensors):
            return None
        # a change in place, such as load_state_dict, counts a version up
        made_of = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
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
        if self._made_of:
            self._made, self._made_of = (), ()

    def dequantize(self, *, dtype: torch.dtype | None = None) -> nn.Linear:
        """Return a stock nn.Linear with this weight and bias, in `dtype` or `weight_dtype`."""
        dtype = dtype or self.weight_dtype
        self.check_loaded("dequantize")
        with torch.no_grad():
            W = compose.decompress(self.level, self.state, self.shape, dtype)
        linear, fix = self.stock(W), compose.bias_fix(self.level, self.state)
        if fix is not None and self.bias is None:
            raise ValueError(
                f"level '{self.level}' corrects the bias, and a stock model of this architecture "
                "has none here; use a level without centred=true"
            )
        if self.bias is not None:
            bias = self.bias.detach() if fix is None else self.bias.detach() + fix
            linear.bias = nn.Parameter(bias.to(dtype))
        return linear

    def stock(self, W: Tensor) -> nn.Linear:
        """Return a stock nn.Linear with weight W and the bias of this layer."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = nn.Parameter(W), self.bias
        return linear.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        self._forget()  # a cast copy is not the packed weight in the new dtype
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {self.level_repr}"
        )


def resolve_units(model: nn.Module, plan: Plan) -> dict[str, str]:
    """Return unit -> module path in `model` for every unit of `plan` that is not dropped.

    A plan made for the whole model also names the modules of its base model, and the other way
    round; the head of a plan has no place in a base model, and one of the stacks of an
    encoder-decoder none where the other is loaded alone. Raises ValueError that lists units
    the model does not have, that have another shape or cannot take their level, and TypeError
    for a unit that is no linear layer and not the input embedding.
    """
    modules = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    shapes = _shapes(model, modules)
    absent = _absent_stacks(plan, modules, prefix)
    is_base = any(unit.startswith(prefix) for unit in plan)
    headless = output_head(model) is None and (is_base or bool(absent))
    left_out = set()
    for unit, level in plan.items():
        names = () if level.is_drop else (unit, unit.removeprefix(prefix), prefix + unit)
        name = next((name for name in names if name in modules), None)
        if name is None:
            in_stack = _stack_of(unit)
            is_other_head = headless and in_stack is None and not unit.startswith(prefix)
            if not level.is_drop and (is_other_head or in_stack in absent):
                left_out.add(unit)
            continue
        found[unit] = name
        if name not in shapes:
            raise TypeError(
                f"{unit} is a {type(modules[name]).__name__}; level '{level}' "
                "is for nn.Linear layers and the input embedding"
            )
        shapes[unit] = shapes[name]
    plan.check({**shapes, **{unit: plan.shapes.get(unit, (0, 0)) for unit in left_out}})
    _check_levels(model, {name: plan[unit] for unit, name in found.items()}, shapes)
    return found


def _stack_of(unit: str) -> str | None:
    """Return the path of the encoder or decoder that a unit is in, None where it is in neither."""
    parts = unit.split(".")[:-1]
    place = next((i for i, part in enumerate(parts) if part in _STACKS), None)
    return None if place is None else ".".join(parts[: place + 1])


def _absent_stacks(plan: Plan, modules: Mapping[str, nn.Module], prefix: str) -> set[str]:
    """Return the paths of stacks that a plan for an encoder-decoder names and a model lacks.

    Of the encoder or the decoder alone: none where it has both, or where it has neither.
    """
    named = {stack for unit in plan if (stack := _stack_of(unit)) is not None}
    if {stack.rpartition(".")[2] for stack in named} != set(_STACKS):
        return set()
    there = {s for s in named if {s, s.removeprefix(prefix), prefix + s} & modules.keys()}
    return named - there if there else set()


def _shapes(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, Shape]:
    """Return path -> (out, in) of what can take a level: linear layers, the input embedding."""
    shapes: dict[str, Shape] = {
        name: (m.out_features, m.in_features)
        for name, m in modules.items()
        if isinstance(m, nn.Linear)
    }
    if (embedding := input_embedding(model)) is not None:
        name, module = embedding
        shapes[name] = (module.num_embeddings, module.embedding_dim)
    return shapes


def planned_levels(model: nn.Module, plan: Plan) -> dict[str, Level]:
    """Return module path -> canonical level for the layers of `model` that `plan` compresses.

    Those it leaves dense and sub-blocks that it drops are not among them.
    """
    check_weights_stay(model)
    names = resolve_units(model, plan)
    levels = compose.normalize_each({name: plan[unit] for unit, name in names.items()})
    return {name: level for name, level in levels.items() if not level.is_dense}


def _check_levels(
    model: nn.Module, levels: Mapping[str, Level], shapes: Mapping[str, Shape]
) -> None:
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    dense = [pair for pair in tied.items() if pair[0].endswith(".weight")]  # others are ours
    pairs = {tuple(key.rpartition(".")[0] for key in pair) for pair in dense}
    ends = {end.name for end in ends_of(model)}
    wrong = []
    for name, level in levels.items():
        if level.is_dense:
            continue
        if name not in ends and (source := [pair for pair in pairs if name in pair]):
            other = next(end for end in source[0] if end != name)
            wrong.append(f"{name}: its weight is tied to that of {other}; give {other} the level")
            continue
        try:
            compose.check_shape(compose.normalize(level), shapes[name])
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        more = f"\n  and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError("the plan cannot be applied:\n  " + "\n  ".join(wrong[:8]) + more)


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
    """Return module path -> compressed linear layer, in module order.

    A head whose packed tensors are those of the embedding is not among them.
    """
    linears = ((n, m) for n, m in model.named_modules() if isinstance(m, CompressedLinear))
    return {name: layer for name, layer in linears if not layer.is_tied}


def zero_missing_biases(model: nn.Module) -> None:
    """Zero the biases of packed linear layers that were in no checkpoint.

    A new head is tied to a packed embedding and has a bias of its own: transformers draws no
    weights for a packed layer, and leaves that bias in memory that was never written.
    """
    for module in model.modules():
        if not isinstance(module, CompressedLinear) or module.bias is None or module.bias.is_meta:
            continue
        if not getattr(module.bias, "_is_hf_initialized", False):  # set on what is loaded or tied
            with torch.no_grad():
                module.bias.zero_()


def compressed_layers(model: nn.Module) -> dict[str, PackedWeight]:
    """Return module path -> what owns packed tensors, linear layers and the embedding."""
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, PackedWeight))
    return {n: m for n, m in found if not getattr(m, "is_tied", False)}


def packed_names(model: nn.Module) -> list[str]:
    """Return the names of all packed tensors of a model, biases not among them."""
    layers = compressed_layers(model).items()
    return [f"{path}.{name}" for path, layer in layers for name in layer.state]


def prepare_layers(model: nn.Module, runtime: str) -> dict[str, str]:
    """Let every packed module of `model` compute as `runtime` says.

    Returns module path -> what it computes with; the log says it in one line.
    """
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    choices = {name: module.prepare(runtime) for name, module in packed.items()}
    group_experts(model, by_kernels=runtime in BY_KERNELS)
    linears = [choices[name] for name, m in packed.items() if isinstance(m, CompressedLinear)]
    log_choices(runtime, choices.values(), linears)
    return choices
