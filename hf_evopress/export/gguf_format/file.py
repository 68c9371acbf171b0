"""One GGUF file: a header, then tensors one after another, each aligned to 32 bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...methods.maths.ggml.types import KINDS, Kind
from .architecture import add_figures, architecture_of, rope_divisors
from .tokenizer import add_tokenizer

EXTRA = 'pip install "hf-evopress[gguf]"'
ROPE = "rope_freqs.weight"
ALIGNMENT = 32


@dataclass(frozen=True)
class Entry:
    """A tensor of the file. kind: a quantised type, or None for the floats of `dtype`."""

    name: str
    shape: tuple[int, ...]
    kind: Kind | None = None
    dtype: torch.dtype = torch.float32

    @property
    def size_bytes(self) -> int:
        if self.kind is not None:
            return self.shape[0] * self.kind.row_bytes(self.shape[1])
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def writer_of(config: Any, tokenizer: Any, *, name: str, source: str | None) -> Any:
    """Return a GGUFWriter that holds everything but tensors."""
    try:
        from gguf import GGML_QUANT_VERSION, GGUFWriter
    except ImportError as error:
        raise ImportError(f"GGUF files are written by the gguf package: {EXTRA}") from error
    if tokenizer is None:
        raise ValueError("a GGUF file holds the tokenizer, and there is none beside the model")
    writer = GGUFWriter(None, architecture_of(config))
    writer.add_type("model")
    writer.add_name(name)
    writer.add_quantized_by("hf-evopress")
    if source is not None:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, source)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_figures(writer, config)
    add_tokenizer(writer, tokenizer, config.vocab_size)
    return writer


def write_file(
    path: Path, writer: Any, entries: Sequence[Entry], data: Callable[[Entry], Tensor]
) -> None:
    """Write the tensors `entries`, whose contents `data` returns, one in memory at a time."""
    _announce(writer, entries)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        tensor = data(entry).contiguous()
        if tensor.nbytes != entry.size_bytes:
            raise RuntimeError(f"{entry.name} has {tensor.nbytes} bytes, not {entry.size_bytes}")
        writer.write_tensor_data(tensor.view(torch.uint8).numpy())
    writer.close()


def overhead_bytes(
    config: Any, tokenizer: Any, entries: Sequence[Entry], *, name: str, source: str | None
) -> int:
    """Return the most bytes that a file takes besides the contents of its tensors."""
    import os
    import tempfile

    writer = writer_of(config, tokenizer, name=name, source=source)
    _announce(writer, entries)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "header.gguf")
        writer.write_header_to_file(Path(path))
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        header = os.path.getsize(path)
    return header + ALIGNMENT * (len(entries) + 1)


def extra_entries(config: Any) -> dict[str, Tensor]:
    """Return tensors by name that a file has and the model has not."""
    divisors = rope_divisors(config)
    return {} if divisors is None else {ROPE: divisors}


def names_of(config: Any, ours: Sequence[str]) -> Mapping[str, str]:
    """Return the names of tensors in the file; ValueError names those that llama.cpp lacks."""
    import gguf

    architecture = architecture_of(config)
    number = next(n for n, text in gguf.MODEL_ARCH_NAMES.items() if text == architecture)
    table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    found = {name: table.get_name(name, try_suffixes=(".weight", ".bias")) for name in ours}
    if unknown := [name for name, theirs in found.items() if theirs is None]:
        raise ValueError(
            f"gguf: llama.cpp's {architecture} has no tensor like {', '.join(unknown[:4])}"
        )
    return found


def kind_of(name: str) -> Kind:
    return KINDS[name]


def _announce(writer: Any, entries: Sequence[Entry]) -> None:
    import numpy as np
    from gguf import GGMLQuantizationType as Types

    floats = {
        torch.float32: Types.F32,
        torch.float16: Types.F16,
        torch.bfloat16: Types.BF16,
    }
    for entry in entries:
        number = floats[entry.dtype] if entry.kind is None else Types(entry.kind.number)
        shape = entry.shape
        # the writer takes anything but uint8 at its word where a type is given
        writer.add_tensor_info(entry.name, shape, np.dtype(np.int8), entry.size_bytes, number)
