"""Check a model's config.json and its index of shards before transformers reads them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..base.reading import read_object, reading

_OURS = "evopress"
_COUNT = re.compile(r"(num|n)_\w*(layer|head|expert)")
MOST = 2**20  # layers, heads or experts; building more would take hours before the first error


def check_config(file: Path) -> None:
    """Raise an error that names `file` where transformers would trip over what it says."""
    config = read_object(file)
    said, saved = config.get("quantization_config"), config.get("architectures")
    with reading(file):
        if saved is not None and not _are_names(saved):
            raise TypeError(f"architectures is a list of names, got {saved!r:.200}")
        for key, value in config.items():
            if _COUNT.match(key) and type(value) is int and abs(value) > MOST:
                raise ValueError(f"{key} is {value:.3g}, more than any model has")
        if said is None:
            return
        if not isinstance(said, dict):
            raise TypeError(f"quantization_config is an object, got {said!r:.200}")
        method = said.get("quant_method")
        if method is not None and not isinstance(method, str):
            raise TypeError(
                f"quantization_config has a quant_method, a name such as {_OURS!r}, got "
                f"{method!r:.200}"
            )


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def check_index(file: Path) -> None:
    """Raise an error that names a shard index which is not what transformers takes for one."""
    if not file.is_file():
        return
    index = read_object(file, way_out="export or download the model again")
    with reading(file, way_out="export or download the model again"):
        if not isinstance(index.get("metadata", {}), dict) or "metadata" not in index:
            raise TypeError(f"metadata is an object, got {index.get('metadata')!r:.200}")
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise TypeError(f"weight_map is an object of names and files, got {shards!r:.200}")
        for name, shard in shards.items():
            if not isinstance(shard, str) or Path(shard).name != shard or not shard:
                raise ValueError(f"weight_map gives {name} no plain file name but {shard!r:.200}")
            if not shard.endswith(".safetensors") or not (file.parent / shard).is_file():
                raise ValueError(f"weight_map gives {name} the file {shard!r:.200}, not there")
