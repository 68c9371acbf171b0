"""Measure how fast a compressed model loads, reads prompts and generates, against the dense one.

All models are in memory at once and take turns, so that other load on the machine hits them alike;
each figure is the best of its repeats.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.devices import find_device, name_of, on_device, peak_bytes, reset_peak, wait_for
from ..base.own_code import trusts_code
from ..base.progress import Progress
from ..loading.config import QUANT_METHOD, EvoPressConfig
from ..loading.layers import prepare_layers
from ..loading.packed import PackedWeight
from ..loading.runtimes import AUTO, PACKED, RUNTIMES, check_device, check_runtime
from ..models.causal_only import check_causal
from ..models.source import check_context, load_checked, read_config

DENSE = "dense"
START = 16  # tokens before the first that is timed
BANDWIDTH_BYTES = 2**28  # more than any cache holds


@dataclass(frozen=True)
class Speed:
    """What one model does: bytes, seconds to load, tokens per second.

    held_bytes: of all tensors; peak_bytes: the most while it was loaded, None where unknown;
    prompt_bytes: the most that a prompt takes beside the model, logits included.
    read_bytes: weights that one token needs, as they are stored. decode: by batch size.
    """

    name: str
    load_seconds: float
    held_bytes: int
    peak_bytes: int | None
    prompt_bytes: int | None
    read_bytes: int
    prefill: float
    decode: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """All models on one machine; `bandwidth` is what it reads from memory, in bytes/s."""

    machine: str
    bandwidth: float
    prompt: int
    speeds: tuple[Speed, ...]


@trusts_code
@on_device
@torch.inference_mode()
def bench(
    model: str,
    *,
    against: str | None = None,
    runtimes: Sequence[str] = (AUTO,),
    batches: Sequence[int] = (1, 4, 16),
    prompt: int = 512,
    repeats: int = 5,
    dtype: str = "bfloat16",
    progress: Progress | None = None,
) -> Bench:
    """Return what the compressed `model` does in each runtime, and the dense one `against` it."""
    for name, value in (("prompt", prompt), ("repeats", repeats), *(("batch", b) for b in batches)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name in runtimes:
        if name not in RUNTIMES:
            raise ValueError(f"no runtime {name!r}; known: {', '.join(RUNTIMES)}")
        check_runtime(name, getattr(torch, dtype))
        check_device(name, find_device())
    config = read_config(model)
    check_causal(config, model, "bench measures")
    if not _is_compressed(config):
        raise ValueError(f"{model} is no compressed model; name one with compressed layers")
    if against and _is_compressed(read_config(against)):
        raise ValueError(f"{against} is compressed itself; --against takes the dense model")
    check_context(config, prompt, "prompt")
    check_context(config, START + 4 * repeats + 1, "what so many repeats generate,")
    places = {DENSE: against} if against else {}
    places |= dict.fromkeys(runtimes, model)
    made: dict[str, tuple[Any, float, int | None, int | None]] = {}
    for name, place in places.items():
        made[name] = _load(str(place), name, getattr(torch, dtype), prompt)
        if progress:
            progress("load", len(made), len(places))
    models = {name: one for name, (one, *_) in made.items()}
    prefill, decode = timed(models, batches, prompt, repeats, progress=progress)
    speeds = tuple(
        Speed(
            name,
            seconds,
            held_bytes(one),
            peak,
            more,
            read_bytes(one),
            prompt / prefill[name],
            {batch: batch / times[name] for batch, times in decode.items()},
        )
        for name, (one, seconds, peak, more) in made.items()
    )
    return Bench(machine(), read_bandwidth(), prompt, speeds)


def timed(
    models: Mapping[str, Any],
    batches: Sequence[int],
    prompt: int,
    repeats: int,
    *,
    progress: Progress | None = None,
) -> tuple[dict[str, float], dict[int, dict[str, float]]]:
    """Return the seconds of a prompt, and by batch size those of one more token, per model."""
    ids = _prompts(next(iter(models.values())), max(batches), max(prompt, START))
    prefill = best({n: partial(m, ids[:1, :prompt]) for n, m in models.items()}, repeats)
    decode: dict[int, dict[str, float]] = {}
    for batch in batches:
        steps = {name: decoder(one, ids[:batch]) for name, one in models.items()}
        decode[batch] = best(steps, 4 * repeats)
        if progress:
            progress("decode", len(decode), len(batches))
    return prefill, decode


def _prompts(model: Any, n: int, length: int) -> Tensor:
    """Return (n, length) token ids."""
    vocabulary = model.get_input_embeddings().num_embeddings
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (n, length), generator=drawn).to(model.device)


@torch.inference_mode()
def best(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the least seconds of each function; they take turns, so that load hits all alike."""
    seconds = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            wait_for(find_device())
            start = time.perf_counter()
            function()
            wait_for(find_device())
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def decoder(model: Any, ids: Tensor) -> Callable[[], object]:
    """Return a function that computes one more token of each sequence after START of them."""
    # transformers 5.24 renamed it; older ones know the other name only
    body = model.base_model if hasattr(model, "base_model") else model
    name = "cache" if "cache" in signature(body.forward).parameters else "past_key_values"
    with torch.inference_mode():
        cache = getattr(model(ids[:, :START], use_cache=True), name)

    def step() -> None:
        model(ids[:, :1], **{name: cache}, use_cache=True)

    return step


def _load(
    place: str, runtime: str, dtype: torch.dtype, prompt: int
) -> tuple[Any, float, int | None, int | None]:
    """Return the model on the device in use, the seconds that takes, its peak of memory, and that
    of a prompt."""
    device = find_device()
    gc.collect()
    before = _reset(device)
    start = time.perf_counter()
    options: dict[str, Any] = {"dtype": dtype}
    if runtime != DENSE:  # whatever the environment says: `runtime` is for where the model goes
        options["quantization_config"] = EvoPressConfig(runtime=PACKED)
    with warnings.catch_warnings():  # transformers', of any config that is passed
        warnings.filterwarnings("ignore", "You passed `quantization_config`")
        model = load_checked(place, **options)
    model = model.eval().requires_grad_(False).to(device)
    if runtime != DENSE:
        prepare_layers(model, runtime)
    seconds = time.perf_counter() - start
    peak = _above(before, device)
    ids = _prompts(model, 1, prompt)
    model(ids)  # what the first call compiles and checks is not the prompt's
    before = _reset(device)
    model(ids)
    return model, seconds, peak, _above(before, device)


def _is_compressed(config: Any) -> bool:
    quantized = getattr(config, "quantization_config", None)
    return isinstance(quantized, dict) and quantized.get("quant_method") == QUANT_METHOD


def _above(before: int | None, device: torch.device) -> int | None:
    """Return the peak of memory since `before` was in use."""
    peak = peak_bytes(device) if device.type != "cpu" else _status("VmHWM")
    return None if peak is None or before is None else peak - before


def held_bytes(model: nn.Module) -> int:
    """Return the bytes of all tensors of a model, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def read_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that a token is multiplied with: linear layers and the head."""
    found: dict[int, int] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            own = module.state.values() if isinstance(module, PackedWeight) else [module.weight]
            found |= {t.data_ptr(): t.nbytes for t in own}
    return sum(found.values())


def read_bandwidth() -> float:
    """Return the bytes/s that a sum over a large tensor reads on the device in use."""
    x = torch.ones(BANDWIDTH_BYTES // 4, device=find_device())
    return BANDWIDTH_BYTES / best({"": x.sum}, 5)[""]


def machine() -> str:
    """Return processor or card, threads and version of PyTorch."""
    device = find_device()
    name = name_of(device)
    if device.type == "cpu":
        name = f"{_processor()}, {torch.get_num_threads()} threads"
    return f"{name}, PyTorch {torch.__version__}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return platform.processor() or platform.machine()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "CPU")


def _reset(device: torch.device) -> int | None:
    """Forget the peak of memory, and return what is in use."""
    if device.type != "cpu":
        reset_peak(device)
        return peak_bytes(device)  # now what is in use
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is what is in use
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(key)), None)
