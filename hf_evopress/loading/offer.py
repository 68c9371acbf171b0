"""Offer the format to transformers without importing it: registries that ask at first look-up.

transformers has no entry points for quantizers. Its two registries are module globals that its
functions read when they are called, so they can be replaced by dictionaries which import
`loading.quantizer` when "evopress" is looked up; a model of any other kind costs nothing.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)

REGISTRIES = ("AUTO_QUANTIZER_MAPPING", "AUTO_QUANTIZATION_CONFIG_MAPPING")
_METHOD = "evopress"


def offer() -> None:
    """Replace the registries of transformers.quantizers.auto, which has been imported."""
    auto = sys.modules["transformers.quantizers.auto"]
    for name in REGISTRIES:
        registry = getattr(auto, name, None)
        if not isinstance(registry, dict):
            logger.warning(
                "transformers.quantizers.auto has no %s: this version of transformers is not "
                "supported, and compressed models will not load",
                name,
            )
        elif not isinstance(registry, _Asking):
            setattr(auto, name, _Asking(registry))


class _Asking(dict[str, Any]):
    """A registry that knows the format, and imports what it is registered by when asked for it."""

    def __contains__(self, method: object) -> bool:
        return method == _METHOD or super().__contains__(method)

    def __missing__(self, method: str) -> Any:
        if method != _METHOD:
            raise KeyError(method)
        import_module("hf_evopress.loading.quantizer")  # fills in what is missing
        return super().__getitem__(method)

    def get(self, method: str, default: Any = None) -> Any:
        return self[method] if method in self else default  # noqa: SIM401  that would come back here
