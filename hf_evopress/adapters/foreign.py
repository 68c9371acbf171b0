"""Read the dense weight of any quantized linear layer: ours, bitsandbytes, GPTQ, AWQ, ...

A weight stored as plain floats is read where it is. Libraries that say what they store are asked
(`READERS`, by the library that a layer's parts come from). All else, such as bitsandbytes, GPTQ
and AWQ, is known by what it computes: the answers to the unit vectors are the weight. Kernels
that repack in memory make that the surer way, too.

    library             on a CPU
    bitsandbytes        4 and 8 bits, by their answers
    GPTQ, AWQ           gptqmodel, by their answers
    compressed-tensors  packed integers, int8 with rounded inputs, FP8: read
    torchao, quanto     read
    GGUF                transformers dequantises as it loads; blocks kept packed on a GPU: read
    fine-grained FP8    transformers dequantises as it loads

Refused by transformers: HQQ (5.23 has no loader for it) and what needs a GPU (EETQ, FBGEMM, ...).
An adapter cannot mend what a library adds as it runs, such as rounded inputs; and the weights of
bitsandbytes 0.50 in 4 bits do not survive being saved after a forward on a CPU: load them anew.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..loading.layers import CompressedLinear
from ..models.units import find_blocks

_PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # 8-bit floats have scales
_AT_ONCE = 1024  # unit vectors
_PROBES = 16
_TOLERANCE = 0.2  # layers that round their inputs to 4 bits are 0.1 off
# What a kernel raises that is not for this machine.
_CANNOT = (RuntimeError, ValueError, TypeError, AttributeError, AssertionError, ImportError)


def _of_tensor(module: Any) -> Tensor:
    return module.weight.dequantize()


def _of_gguf(module: Any) -> Tensor:
    from transformers.integrations.gguf.kernels import dequantize_blocks

    shape = (module.out_features, module.in_features)
    W = dequantize_blocks(module.weight, module.ggml_type, *shape, torch.float32)
    if module.input_permutation is None:
        return W
    back = torch.empty_like(W)
    back[:, module.input_permutation] = W  # the layer gathers its inputs, not its columns
    return back


def _of_compressed_tensors(module: Any) -> Tensor:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    scheme = module.quantization_scheme
    if module.quantization_status == QuantizationStatus.COMPRESSED:  # until the first forward
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        compressor = BaseCompressor.get_value_from_registry(scheme.format.value)
        return compressor.decompress(state, scheme)["weight"]
    if scheme.weights is None:
        return module.weight
    return forward_quantize(module, module.weight, "weight", scheme.weights)


# Root of the module that a layer's class, its weight's or its scheme's comes from -> its weight.
READERS: Mapping[str, Callable[[Any], Tensor]] = {
    "torchao": _of_tensor,
    "optimum.quanto": _of_tensor,
    "transformers.integrations.gguf": _of_gguf,
    "compressed_tensors": _of_compressed_tensors,
}


# quant_method of a config -> the package that transformers loads it with, and its name to install.
PACKAGES: Mapping[str, tuple[str, str]] = {
    "awq": ("gptqmodel", "gptqmodel"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "gptq": ("gptqmodel", "gptqmodel"),
    "torchao": ("torchao", "torchao"),
}


def check_package(model: str) -> None:
    """Raise ImportError where the package that loads the model called `model` is missing.

    Transformers does so for some formats; for others a name is not defined, deep inside.
    """
    config = PreTrainedConfig.get_config_dict(model)[0].get("quantization_config") or {}
    method = str(config.get("quant_method"))
    needed, name = PACKAGES.get(method, ("", ""))
    if needed and importlib.util.find_spec(needed) is None:
        raise ImportError(f"{model} is quantised with {method}, which needs: pip install {name}")


@torch.no_grad()
def dense_weight(module: nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return the weight (out, in) float32 that a linear layer of any make multiplies by.

    dtype: of the inputs that the layer is asked with, where its weight cannot be read. Raises
    ValueError, which names the layer's class, where it cannot be asked either.
    """
    try:
        reader = next((READERS[root] for root in _roots(module) if root in READERS), None)
        if reader is not None:
            W = reader(module)
        elif _is_plain(module):
            W = module.weight  # type: ignore[assignment]
        else:
            W = _answers(module, shape, dtype)
    except _CANNOT as error:
        raise ValueError(_refusal(module, f"{type(error).__name__}: {error}")) from error
    if tuple(W.shape) != shape:
        raise ValueError(_refusal(module, f"it is no linear layer of shape {shape}"))
    return W.detach().float()


def check_readable(model: nn.Module) -> None:
    """Raise ValueError if a kind of linear layer in the decoder blocks hides its weight.

    Reads the smallest layer of each kind, so that a long job fails before it starts.
    """
    found: dict[tuple[type, ...], tuple[nn.Module, tuple[int, int]]] = {}
    for module in find_blocks(model)[1].modules():
        shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if not all(isinstance(n, int) for n in shape):
            continue
        kind = (type(module), type(getattr(module, "weight", None)))
        known = found.get(kind)
        if known is None or shape[0] * shape[1] < known[1][0] * known[1][1]:  # type: ignore[operator]
            found[kind] = (module, shape)  # type: ignore[assignment]
    dtype: Any = getattr(model, "dtype", torch.float32)
    for module, shape in found.values():
        dense_weight(module, shape, dtype)


def _roots(module: nn.Module) -> Iterator[str]:
    """Yield the packages, and packages in them, that the parts of a layer come from."""
    for part in (
        module,
        getattr(module, "weight", None),
        getattr(module, "quantization_scheme", 0),
    ):
        words = type(part).__module__.split(".")
        yield from (".".join(words[:n]) for n in range(1, len(words) + 1))


def _is_plain(module: nn.Module) -> bool:
    """Return whether what the layer stores as `weight` is what it multiplies by."""
    if isinstance(module, CompressedLinear):
        return True
    weight = getattr(module, "weight", None)
    is_float = type(weight) in (Tensor, nn.Parameter) and weight.dtype in _PLAIN  # type: ignore[union-attr]
    return is_float and type(module).forward is nn.Linear.forward


def _answers(module: nn.Module, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Return what the layer makes of each unit vector, less its bias: the columns of its weight."""
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    columns = []
    for start in range(0, shape[1], _AT_ONCE):
        n = min(_AT_ONCE, shape[1] - start)
        units = torch.zeros(n + 1, shape[1], dtype=dtype, device=device)  # and the zero vector
        units[torch.arange(n), torch.arange(start, start + n)] = 1
        answer = module(units).float()
        columns.append(answer[:-1] - answer[-1:])
    W = torch.cat(columns).T
    if tuple(W.shape) == shape:
        _check_linear(module, W, answer[-1], dtype)
    return W


def _check_linear(module: nn.Module, W: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBES, W.shape[1], generator=generator).to(W.device, dtype)
    expected = x.float() @ W.T
    wrong = module(x).float() - bias - expected
    share = float(wrong.norm() / expected.norm().clamp(min=1e-30))
    if not share < _TOLERANCE:  # not a number counts as wrong
        raise ValueError(f"its outputs are not those of one weight: {share:.0%} off")


def _refusal(module: nn.Module, why: str) -> str:
    kind = f"{type(module).__module__}.{type(module).__name__}"
    return (
        f"cannot find out the weight of a {kind} ({why}); load the model so that its layers are "
        "dense (many quantization configs of transformers take dequantize=True) and save it, run "
        "this on a machine that its kernels are for, or compress the dense model with hf_evopress"
    )
