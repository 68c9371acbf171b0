"""Which models exllamav3 has by the names of ours, and what config.json says of their levels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from ...base.plugins import did_you_mean

# Decoders whose layers have the same names in transformers and in exllamav3, none of them fused.
ARCHITECTURES = (
    "ArceeForCausalLM",
    "Exaone4ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Olmo3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
)
VERSION = "1.4.1"  # of exllamav3, whose files these are like
DENSE_BITS = 16


def check_architecture(model: Any) -> None:
    """Raise ValueError for a model whose layers exllamav3 does not have by these names."""
    kind = type(model).__name__
    if kind not in ARCHITECTURES:
        hint = did_you_mean(kind, list(ARCHITECTURES))
        raise ValueError(
            f"exl3: no {kind} can be written{hint}; those that can: {', '.join(ARCHITECTURES)}. "
            "Use the evopress export"
        )


def quantization(bits: Mapping[str, tuple[int, int]], codebook: str, head: str) -> dict[str, Any]:
    """Return the quantization_config of config.json, as exllamav3 writes it.

    bits: of each layer, with the number of its weights. head: the name of the output head.
    """
    n = sum(size for name, (_, size) in bits.items() if name != head)
    inside = sum(b * size for name, (b, size) in bits.items() if name != head)
    return {
        "quant_method": "exl3",
        "version": VERSION,
        "bits": round(inside / max(1, n), 4),
        "head_bits": bits[head][0] if head in bits else DENSE_BITS,
        "codebook": codebook,
    }


def storage(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Return quantization_config.json's table of the tensors of each module."""
    table: dict[str, Any] = {}
    for name, tensor in tensors:
        module, _, last = name.rpartition(".")
        entry = table.setdefault(module, {"stored_tensors": {}})
        entry["stored_tensors"][name] = {
            "shape": list(tensor.shape),
            "n_bytes": tensor.nbytes,
            "dtype": str(tensor.dtype),
        }
        if last == "trellis":
            entry |= {"quant_format": "exl3", "bits_per_weight": tensor.shape[-1] // 16}
        if last in ("mul1", "mcg"):
            entry[f"{last}_multiplier"] = int(tensor) % 2**32
    return table
