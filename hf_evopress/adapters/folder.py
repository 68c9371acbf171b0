"""Read and write PEFT adapter folders, in the form that stock PEFT reads.

An adapter here is one pair of factors per layer, y = W x + B (A x), at a scaling of exactly 1:
`alpha_pattern` repeats `rank_pattern`, and every key is a whole module path. What PEFT has no
field for (what made it, and for which packed weights) is metadata of the safetensors file.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..base import target
from ..base.fingerprint import tensor_fingerprint, text_fingerprint
from ..base.plugins import did_you_mean
from ..base.reading import read_object, reading
from ..loading.layers import compressed_linears
from ..loading.packed import fixed_dtype
from ..models.size import header_bytes

logger = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight\Z")

Factors = Mapping[str, tuple[Tensor, Tensor]]  # module path -> A (rank, in), B (out, rank)


@dataclass(frozen=True)
class Adapter:
    """The factors of an adapter, its PEFT config, and what is known of where it comes from.

    Factors are as stored; `scaling` (module path -> factor) is what PEFT multiplies B A by.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    config: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    scaling: Mapping[str, float] = field(default_factory=dict)

    @property
    def ranks(self) -> dict[str, int]:
        """Module path -> rank."""
        return {name: A.shape[0] for name, (A, _) in self.factors.items()}

    @property
    def size_bytes(self) -> int:
        """Bytes of the factors, without the header of their file."""
        return sum(A.nbytes + B.nbytes for A, B in self.factors.values())

    def delta(self, name: str) -> Tensor:
        """Return what the adapter adds to the weight of `name`, (out, in) float32."""
        A, B = self.factors[name]
        return self.scaling.get(name, 1.0) * (B.float() @ A.float())

    def sliced(self, rank: int) -> Adapter:
        """Return the adapter with the first `rank` components of each layer.

        The factors that this package computes are nested: a slice is the best adapter of that
        rank. PEFT's trained ones are not.
        """
        if rank < 1:
            raise ValueError(f"a rank is 1 or more, got {rank}")
        cut = {n: (A[:rank].clone(), B[:, :rank].clone()) for n, (A, B) in self.factors.items()}
        return Adapter(cut, self.config, self.about, self.scaling)


def write_adapter(
    folder: str | Path,
    factors: Factors,
    *,
    base_model: str | None = None,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Return `folder` after writing the factors as a LoRA adapter of scaling 1.

    Raises ValueError where there is nothing to write, or where the folder holds something else:
    loaders take a folder with a model and an adapter for an adapter.
    """
    folder = Path(folder)
    check_target(folder)
    if not factors:
        raise ValueError("the adapter has no factors: no layer was given a rank")
    from peft import LoraConfig

    ranks = {name: A.shape[0] for name, (A, _) in sorted(factors.items())}
    pattern = {f"^{re.escape(name)}$": rank for name, rank in ranks.items()}
    most = max(ranks.values())
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_model,
        r=most,
        lora_alpha=most,
        rank_pattern=pattern,
        alpha_pattern=pattern,
        target_modules=sorted(ranks),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
        inference_mode=True,
    )
    tensors = {
        f"{_PREFIX}{name}.lora_{letter}.weight": factor.detach().cpu().contiguous()
        for name, pair in factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    metadata = {"format": "pt", "hf_evopress": json.dumps(dict(about or {}))}
    with target.whole_folder(folder) as temporary:
        save_file(tensors, temporary / WEIGHTS, metadata=metadata)
        config.save_pretrained(str(temporary))
    return folder


def adapter_bytes(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> int:
    """Return the bytes at most of an adapter file of 16-bit factors: module -> shape, rank."""
    names = [f"{_PREFIX}{n}.lora_{x}.weight" for n, r in ranks.items() if r for x in "AB"]
    return sum(2 * rank * sum(shapes[n]) for n, rank in ranks.items()) + header_bytes(names) + 512


def read_adapter(folder: str | Path) -> Adapter:
    """Return the LoRA adapter in a folder, ours or any that PEFT wrote over linear layers."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no adapter folder: it has no {name}")
    config = read_object(folder / CONFIG)
    _check_kind(folder, config)
    found: dict[str, dict[str, Tensor]] = {}
    with (
        reading(folder / WEIGHTS, way_out="train, compute or download the adapter again"),
        safe_open(folder / WEIGHTS, framework="pt") as file,
    ):
        about = json.loads((file.metadata() or {}).get("hf_evopress", "{}"))
        if not isinstance(about, dict):
            raise TypeError(f"what it says of itself is no object: {about!r:.200}")
        for key in sorted(file.keys()):
            match = _KEY.fullmatch(key)
            if match is None:
                raise ValueError(
                    f"{folder} holds {key!r:.200}, which is no factor of a linear layer; only "
                    "plain LoRA adapters can be read here: use PeftModel.from_pretrained"
                )
            found.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
    factors = {}
    for name, pair in found.items():
        if set(pair) != {"A", "B"} or not _fit(pair["A"], pair["B"]):
            raise ValueError(f"the factors of {name} in {folder} do not belong together")
        factors[name] = (pair["A"], pair["B"])
    with reading(folder / CONFIG):
        scaling = {name: _scaling(config, name, A.shape[0]) for name, (A, _) in factors.items()}
    return Adapter(factors, config, about, scaling)


def _fit(A: Tensor, B: Tensor) -> bool:
    are_floats = A.is_floating_point() and B.is_floating_point()
    return are_floats and A.ndim == B.ndim == 2 and A.shape[0] == B.shape[1] > 0


def check_fits(model: nn.Module, adapter: Adapter, *, what: str = "the adapter") -> None:
    """Raise ValueError where `adapter` was made for another model or for other packed weights."""
    modules = dict(model.named_modules())
    wrong = []
    for name, (A, B) in adapter.factors.items():
        module = modules.get(name)
        if module is None:
            wrong.append(f"{name} is not in the model{did_you_mean(name, list(modules))}")
            continue
        shape = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if shape != (B.shape[0], A.shape[1]):
            wrong.append(f"{name} is {shape}, the factors are for {(B.shape[0], A.shape[1])}")
    if wrong:
        more = f"\n  and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(
            f"{what} does not fit this model; load the model it was made for "
            f"({adapter.config.get('base_model_name_or_path') or 'it does not say which'}):\n  "
            + "\n  ".join(wrong[:6])
            + more
        )
    made_for, here = adapter.about.get("base"), base_fingerprint(model)
    if made_for and here and made_for != here:
        raise ValueError(
            f"{what} repairs other packed weights than this model has: compute it again "
            "(hf-evopress adapt), or load the checkpoint it was computed for "
            f"({adapter.config.get('base_model_name_or_path') or 'it does not say which'})"
        )


def load_adapter(
    model: Any, folder: str | Path, *, name: str = "default", is_trainable: bool = False
) -> Any:
    """Return the PeftModel of `model` and the adapter in `folder`, after checking that they fit.

    model: a transformers model, or a PeftModel to which the adapter is added as `name`. The
    adapter is then active beside those already there; it alone is trained if `is_trainable`.
    """
    from peft import PeftModel

    adapter = read_adapter(folder)
    if not isinstance(model, PeftModel):
        check_fits(model, adapter, what=str(folder))
        return PeftModel.from_pretrained(
            model, str(folder), adapter_name=name, is_trainable=is_trainable
        )
    if name in model.peft_config:
        raise ValueError(
            f"the model already has an adapter called {name!r}: give this one another name, "
            f"such as name='{name}2', or call delete_adapter({name!r}) first"
        )
    others = list(model.active_adapters)
    model.load_adapter(str(folder), adapter_name=name, is_trainable=is_trainable)
    activate(model, [*others, name], train=[name] if is_trainable else [])
    return model


def activate(model: Any, names: list[str], *, train: list[str]) -> None:
    """Make several adapters of a PeftModel active at once, and only those in `train` trainable.

    PeftModel.set_adapter takes one name; the tuner's takes several but makes all trainable.
    """
    model.base_model.set_adapter(names)
    for name in names:
        model.set_requires_grad(name, name in train)


def check_target(folder: str | Path) -> None:
    """Raise ValueError where an adapter cannot be written to `folder`."""
    folder = Path(folder)
    if (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds a model; loaders would take the two together for an adapter: write "
            f"the adapter to a folder of its own, such as {folder / 'adapter'}"
        )
    target.check_target(folder)


def base_fingerprint(model: nn.Module) -> str | None:
    """Return 16 hex digits over some of every layer's packed values, None for a dense model."""
    layers = compressed_linears(model)
    parts = [
        f"{path}.{name} {tensor_fingerprint(_sample(layer.state[name]))}"
        for path, layer in sorted(layers.items())
        for name in sorted(fixed_dtype(layer.level, layer.shape))  # a cast changes the others
        if not layer.state[name].is_meta
    ]
    return text_fingerprint(*parts) if parts else None


def _sample(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, flat.numel() // 1024)]


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder} is a {kind} adapter; only LoRA adapters can be used here")
    for key in (
        "use_dora",
        "modules_to_save",
        "lora_bias",
        "use_bdlora",
        "alora_invocation_tokens",
    ):
        if config.get(key):
            raise ValueError(
                f"{folder} is a LoRA adapter with {key}={config[key]!r}, which is more than two "
                "factors per layer: load it with PeftModel.from_pretrained and use "
                "merge_and_unload()"
            )


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha, patterns = config.get("lora_alpha", rank), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise TypeError(f"alpha_pattern is an object, got {patterns!r:.200}")
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    if type(alpha) not in (int, float) or not abs(alpha) < 1e6:
        raise TypeError(f"lora_alpha is a number, got {alpha!r:.200}")
    return alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
