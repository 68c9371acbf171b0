"""What a compressed model is for: the levels it is offered, and the layers that share one.

cpu           codes of 2 to 8 bits: kernels unpack them faster than dense weights are read
gpu           the same, and trellis codes, which lose less per byte
vllm          codes of 4 and 8 bits without zero points, which vLLM reads from an export
              to compressed_tensors; layers that vLLM computes as one share a level; ends stay dense
exl3          trellis codes of 2^16 states, which exllamav3 reads from an export to exl3; weights
              of other sizes than multiples of 128, and the embedding, stay dense
gguf          tensor types of GGUF files; one is written as well
transformers  all levels that this package loads, fast or not
evopress      what the machine that compresses is: gpu where there is one of ours, else cpu

Levels and families that the user gives are taken instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DEFAULT = "evopress"
# The families offered where the user gives none; none here: the default menu.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    DEFAULT: (),
    "cpu": (),
    "gpu": ("quant", "trellis"),
    "vllm": ("vllm",),
    "exl3": ("exl3",),
    "gguf": ("gguf",),
    "transformers": ("all",),
}
EXPORTS = tuple(FAMILIES)
APART = ("exl3", "gguf", "vllm")  # which hold their own levels only, for every weight
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # one layer in vLLM
ACCELERATORS = ("cuda", "xpu")  # with kernels of ours
# What the groups and tiles of a target's levels divide, of the channels of a narrower MLP.
_STEPS = {"gguf": 256, "exl3": 128, "vllm": 128, "gpu": 128}


def default_target(device_type: str) -> str:
    """Return the target of a machine that computes on such a device."""
    if device_type in ACCELERATORS:
        return "gpu"
    return "cpu" if device_type == "cpu" else DEFAULT


def families_for(target: str, *, removes_weights: bool = False) -> tuple[str, ...]:
    """Return the families of a target; under a budget of sparsity or drops not those of codes."""
    return () if removes_weights and target == "gpu" else FAMILIES[target]


def fused_for(target: str) -> tuple[tuple[str, ...], ...]:
    """Return last name parts of layers that a target computes as one."""
    return _FUSED if target == "vllm" else ()


def channel_step(target: str) -> int:
    """Return what the number of channels of a narrower MLP should be a multiple of."""
    return _STEPS.get(target, 64)


def without_for(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a recipe's values with `for`, a word of Python's own, under its other name."""
    if not isinstance(recipe, Mapping) or "for" not in recipe:
        return recipe
    if "export" in recipe:
        raise ValueError("a recipe says for or export, which mean the same, not both")
    return {"export" if key == "for" else key: value for key, value in recipe.items()}
