"""Compressed models as first-class citizens of the Hugging Face ecosystem.

    import hf_evopress  # teaches transformers the format; costs milliseconds
    model = AutoModelForCausalLM.from_pretrained("me/smol-3.3bit")

Importing the package imports neither torch nor transformers: public names load on first use,
and the format is registered as soon as transformers imports its quantizers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .after_import import after_import

if TYPE_CHECKING:
    from .config import EvoPressConfig as EvoPressConfig
    from .layers import CompressedLinear as CompressedLinear
    from .level import Level as Level
    from .plan import Plan as Plan
    from .quantizer import EvoPressQuantizer as EvoPressQuantizer

__version__ = "0.1.0"

_PUBLIC = {  # name -> module that defines it
    "CompressedLinear": "layers",
    "EvoPressConfig": "config",
    "EvoPressQuantizer": "quantizer",
    "Level": "level",
    "Plan": "plan",
}

__all__ = ["__version__", "register", *_PUBLIC]


def register() -> None:
    """Teach transformers to load and save compressed models; a second call does nothing.

    `import hf_evopress` does this by itself.
    """
    import_module(".quantizer", __name__)  # registers when it is first imported


def _teach_peft() -> None:
    import_module(".peft_layers", __name__).register_with_peft()


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


after_import("transformers.quantizers.auto", register)
after_import("peft.tuners.lora.model", _teach_peft)
