"""What `import torch` calls (entry point group torch.backends) where hf_evopress is installed.

It waits for transformers to import its quantizers, and imports hf_evopress then, which teaches
them the format. HF_EVOPRESS_AUTOLOAD=0 switches it off. A file of its own beside the package:
torch fails with an entry point that cannot be found, and this one is there even when the checkout
behind an editable install has been moved away.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def start() -> None:
    """Have transformers know the format, once it is imported."""
    if os.environ.get("HF_EVOPRESS_AUTOLOAD") != "0" and "hf_evopress" not in sys.modules:
        sys.meta_path.insert(0, _Waiting())  # type: ignore[arg-type]


class _Waiting:
    """Finds no module, but sees which one is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "transformers.quantizers.auto":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        try:
            import hf_evopress  # noqa: F401  adds a finder that acts after this import
        except Exception as error:
            import logging

            logging.getLogger(__name__).warning(
                "hf_evopress is installed and cannot be imported (%s): compressed models will "
                'not load; "pip uninstall hf-evopress" or HF_EVOPRESS_AUTOLOAD=0 ends this warning',
                error,
            )
        from importlib.util import find_spec

        return find_spec(name)
