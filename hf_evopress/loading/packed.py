"""What modules with a packed weight share: tensors of a level, a weight made for one look."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..methods import compose
from ..methods.base import Shape, State
from ..plans.level import Level
from .computed_weight import READ_ONLY, ComputedWeight, traced_weight
from .kernels.gpu.layer import triton_kernel_of
from .kernels.layer import Kernel, kernel_of
from .runtimes import BY_KERNELS, PACKED, RUNTIMES, TRITON, check_device, chosen


def tensors_of(module: nn.Module) -> Mapping[str, Any]:
    """Return the tensors of a module itself by name; those of nn.DataParallel's replicas, too."""
    if "_former_parameters" in module.__dict__:  # theirs are no parameters
        return {**module._parameters, **module.__dict__["_former_parameters"]}
    return module._parameters


class PackedWeight(nn.Module):
    """A module whose packed tensors are its parameters and whose `weight` is computed.

    Subclasses are also an nn.Linear or an nn.Embedding, of which they call nn.Module.__init__
    only. The packed tensors come without gradient.

    A cast of the model (`.to(torch.bfloat16)`) changes `weight_dtype`, the bias and tensors
    that are stored in the dtype of the model (low-rank factors). Tensors whose dtype is part
    of the level, such as scales, keep it: a cast scale would be another weight.
    """

    level: Level
    shape: Shape  # (out_features, in_features), of an embedding (tokens, features)
    weight_dtype: torch.dtype
    hidden: frozenset[str] = frozenset()  # tensors that are not in state_dict() now (ahead.py)
    _kernel: Kernel | None = None

    def hold(self, level: Level | str, shape: Shape, state: State, dtype: torch.dtype) -> None:
        """Become what stores `state`, a weight at `level` that is computed in `dtype`."""
        self.level, self.shape = compose.normalize(level), shape
        self.weight_dtype = dtype
        self._is_hf_initialized = True  # transformers must not draw a new random weight
        self._state_names = tuple(sorted(state))
        self._kernel = None
        self.level_text = str(self.level)
        # models cast to the dtype of a module's first parameter (Swin v2), which of codes is none
        for name in sorted(state, key=lambda name: (not state[name].is_floating_point(), name)):
            tensor = state[name]
            if not isinstance(tensor, nn.Parameter):  # of a module that it is tied to
                tensor = nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, tensor)

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
    def state(self) -> State:
        """The packed tensors by name, as they stand in a checkpoint."""
        tensors = tensors_of(self)  # an attribute of a module takes 2 us
        return {name: tensors[name] for name in self._state_names}

    @state.setter
    def state(self, value: State) -> None:
        # PEFT hands each base layer's `state`, which is of bitsandbytes to it, to the layer again
        own = self.state
        if value.keys() != own.keys() or any(value[name] is not own[name] for name in own):
            raise AttributeError("the packed tensors are parameters of the layer: change those")

    def own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the packed tensors and the bias, if there is one, by name."""
        yield from ((n, t) for n, t in self._parameters.items() if t is not None)

    def prepare(self, runtime: str) -> str:
        """Compute as `runtime` says from now on; return what that is for this layer."""
        if runtime not in RUNTIMES:
            raise ValueError(f"no runtime {runtime!r}; known: {', '.join(RUNTIMES)}")
        self._kernel = None
        if runtime == PACKED:
            return PACKED
        device = self.state[self._state_names[0]].device
        check_device(runtime, device)
        if runtime not in BY_KERNELS:
            return PACKED
        # also where it has none for the device: it may be moved
        find = triton_kernel_of if runtime == TRITON else kernel_of
        self._kernel = find(self.level, self.shape)
        return chosen(self.level, self.shape, device, self.weight_dtype, runtime)

    @property
    def computes_by_kernel(self) -> bool:
        """Whether products go to kernels, where there is one for the device."""
        return self._kernel is not None

    @property
    def kernels(self) -> str:
        """What operators find the kernel again by."""
        return Kernel.runtime if self._kernel is None else self._kernel.runtime

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in) in `weight_dtype`; changes to it raise.

        It is computed when its values are first used, and not for its dtype or shape.
        """
        state, shape, dtype = self.state, self.shape, self.weight_dtype
        if len({tensor.is_meta for tensor in state.values()}) > 1:
            # transformers ties a head tensor by tensor, and looks at its shape if it has a bias
            return torch.empty(shape, dtype=dtype, device="meta")
        trains = torch.is_grad_enabled() and any(t.requires_grad for t in state.values())
        if torch.compiler.is_dynamo_compiling():
            if trains:
                return compose.decompress(self.level, state, shape, dtype)
            return traced_weight(list(state.values()), self.level_text, shape, dtype)
        if not trains:  # what layer.to() does next does not change this weight
            state = {name: tensor.detach() for name, tensor in state.items()}
        level, is_inference = self.level, torch.is_inference_mode_enabled()

        def compute() -> Tensor:
            with torch.inference_mode(is_inference), torch.set_grad_enabled(trains):
                return compose.decompress(level, state, shape, dtype)

        device = next(iter(state.values())).device
        return ComputedWeight(compute, shape, dtype, device, trains)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(READ_ONLY)
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.hidden:
            del destination[f"{prefix}{name}"]

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        sentinel = state_dict.get(f"{prefix}weight")
        if sentinel is not None and not sentinel.numel():
            del state_dict[f"{prefix}weight"]  # for those without this package: not unexpected
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def check_loaded(self, action: str) -> None:
        """Raise ValueError where there are no numbers to do `action` with."""
        if any(tensor.is_meta for tensor in self.state.values()):
            raise ValueError(
                f"the packed tensors of {self} are offloaded or not loaded; load the model "
                f"with device_map=None or 'cpu' to {action} it"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        fixed = fixed_dtype(self.level, self.shape)
        kept = {id(tensor) for name, tensor in self.state.items() if name in fixed}

        def move(tensor: Tensor) -> Tensor:
            out = fn(tensor)
            if id(tensor) not in kept or out.dtype == tensor.dtype:
                return out
            return tensor.to(out.device)

        super()._apply(move, recurse)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self

    @property
    def level_repr(self) -> str:
        """The level and the bits per weight that it stores, for extra_repr."""
        bits = compose.cost_bits(self.level, self.shape) / (self.shape[0] * self.shape[1])
        return f"level='{self.level}', bits_per_weight={bits:.2f}"


@lru_cache(maxsize=4096)
def fixed_dtype(level: Level, shape: Shape) -> frozenset[str]:
    """Return the names of the state's tensors whose dtype does not follow the model's."""
    a, b = (compose.empty(level, shape, dtype) for dtype in (torch.float32, torch.bfloat16))
    return frozenset(name for name in a if a[name].dtype == b[name].dtype)
