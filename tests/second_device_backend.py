"""The rest of the "sim" device: generators, torch.sim, factories, autocast."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration

N_CARDS = 2
aten = torch.ops.aten


def indexed(device: Any) -> torch.device:
    """Return a device with its index."""
    device = torch.device(device)
    if device.type != "sim" or device.index is not None:
        return device
    return torch.device("sim", backend.current)


# -- random numbers ----------------------------------------------------------------------------

_CpuGenerator = torch.Generator
_sim_generators: set[int] = set()


class _EitherGenerator(type(_CpuGenerator)):  # type: ignore[misc]
    def __instancecheck__(cls, it: Any) -> bool:
        return isinstance(it, _CpuGenerator)


class Generator(_CpuGenerator, metaclass=_EitherGenerator):
    """torch.Generator, which makes sim ones too."""

    device: torch.device = None  # type: ignore[assignment]

    def __new__(cls, device: Any = "cpu") -> Any:
        place = torch.device(device)
        if place.type != "sim":
            return _CpuGenerator(device=place)
        made = super().__new__(cls)
        made.device = indexed(place)
        _sim_generators.add(made._cdata)
        weakref.finalize(made, _sim_generators.discard, made._cdata)
        return made

    def __init__(self, device: Any = "cpu") -> None:
        super().__init__()


def generator_of(given: Any, device: torch.device) -> Any:
    """Return the generator to draw with on a card, which is not the CPU's."""
    if given is None:
        return backend.generators[device.index]
    if given._cdata not in _sim_generators:
        raise RuntimeError("Expected a 'sim' device type for generator but found 'cpu'")
    return given


# -- torch.sim ---------------------------------------------------------------------------------


class Backend:
    """torch.sim, with the functions of torch.cuda that libraries call."""

    def __init__(self) -> None:
        self.current = 0
        self.cards: Sequence[Any] = ()
        self.generators: Sequence[Any] = ()

    def card(self, device: Any = None) -> Any:
        """Return the memory of a card."""
        if isinstance(device, int):
            return self.cards[device]
        return self.cards[indexed("sim" if device is None else device).index]

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return N_CARDS

    def current_device(self) -> int:
        return self.current

    def set_device(self, device: Any) -> None:
        self.current = device if isinstance(device, int) else indexed(device).index

    def manual_seed_all(self, seed: int) -> None:
        for generator in self.generators:
            generator.manual_seed(seed)

    manual_seed = manual_seed_all

    def get_rng_state(self, device: Any = "sim") -> Tensor:
        return self.generators[indexed(device).index].get_state()

    def set_rng_state(self, state: Tensor, device: Any = "sim") -> None:
        self.generators[indexed(device).index].set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self, including_emulation: bool = True) -> bool:
        return True

    def synchronize(self, device: Any = None) -> None:
        self.card(device).n_syncs += 1

    def empty_cache(self) -> None:
        pass

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        card = self.card(device)
        total = card.limit if card.limit is not None else 1 << 34
        return total - card.live, total

    def memory_allocated(self, device: Any = None) -> int:
        return self.card(device).live

    def max_memory_allocated(self, device: Any = None) -> int:
        return self.card(device).peak

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        card = self.card(device)
        card.peak = card.live


backend = Backend()

# -- registration ------------------------------------------------------------------------------

_FACTORIES = """
    empty.memory_format empty_strided zeros ones full arange arange.start arange.start_step
    eye eye.m linspace logspace rand.generator randn.generator randint.generator
    randint.low_generator randperm.generator
    scalar_tensor tril_indices triu_indices normal.float_float _efficientzerotensor
    hann_window hann_window.periodic
"""

_RANDOM = {
    "rand": "rand.generator",
    "randn": "randn.generator",
    "randint": "randint.generator",
    "randint.low": "randint.low_generator",
    "randperm": "randperm.generator",
}

# as CUDA's autocast: these in the lower precision, those in float32
_LOWER = """
    mm addmm bmm baddbmm matmul linear addmv mv addbmm scaled_dot_product_attention
    convolution einsum chain_matmul linalg_multi_dot prelu
"""
_FLOAT32 = """
    softmax.int log_softmax.int exp log log10 log2 log1p expm1 rsqrt reciprocal pow.Tensor_Scalar
    pow.Tensor_Tensor pow.Scalar layer_norm nll_loss nll_loss_nd cross_entropy_loss kl_div
    mse_loss l1_loss smooth_l1_loss sum sum.dim_IntList prod cumsum cumprod norm.Scalar dist cosh
    sinh tan acos asin softplus group_norm binary_cross_entropy_with_logits cdist renorm
"""


def register(run: Callable[..., Any], copy: Callable[..., Any], cards: Sequence[Any]) -> None:
    """Make "sim" a device: run(operator, args, kwargs) runs an operator, copy is _copy_from."""
    backend_registration._setup_privateuseone_for_python_backend("sim", backend)
    backend.cards = cards
    backend.generators = [Generator(torch.device("sim", i)) for i in range(N_CARDS)]
    torch.Generator = Generator  # type: ignore[misc]
    for name in _FACTORIES.split():
        _library.impl(name, _through(run, _overload(name)), "PrivateUse1")
    for name, drawing in _RANDOM.items():  # those without a generator would draw with the CPU's
        _library.impl(name, _through(run, _overload(drawing)), "PrivateUse1")
    _library.impl("_copy_from", copy, "PrivateUse1")
    _everything.fallback(lambda op, *args, **kwargs: run(op, args, kwargs), "PrivateUse1")
    _everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    for names, to in ((_LOWER, None), (_FLOAT32, torch.float32)):
        for name in names.split():
            _library.impl(name, _cast_first(_overload(name), to), "AutocastPrivateUse1")


def _overload(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _through(run: Callable[..., Any], func: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(func, args, kwargs)


def _cast_first(func: Any, to: torch.dtype | None) -> Callable[..., Any]:
    """Return an operator that casts its floating-point arguments first, as under autocast."""

    def cast(a: Any, dtype: torch.dtype) -> Any:
        if isinstance(a, Tensor) and a.is_floating_point() and a.device.type == "sim":
            return a.to(dtype)
        return type(a)([cast(x, dtype) for x in a]) if isinstance(a, (list, tuple)) else a

    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = to or torch.get_autocast_dtype("sim")
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return func(
                *[cast(a, dtype) for a in args], **{k: cast(v, dtype) for k, v in kwargs.items()}
            )

    return call


_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
_library = torch.library.Library("aten", "IMPL")
_everything = torch.library.Library("_", "IMPL")
