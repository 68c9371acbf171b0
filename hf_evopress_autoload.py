"""What `import torch` calls (entry point group torch.backends) where hf_evopress is installed.

It imports hf_evopress, which teaches transformers the format at its first use and imports nothing
heavy before. HF_EVOPRESS_AUTOLOAD=0 switches it off. A file of its own beside the package: torch
fails with an entry point that cannot be found, and this one is there even when the checkout
behind an editable install has been moved away.
"""

from __future__ import annotations

import os


def start() -> None:
    """Have transformers know the format; whatever goes wrong, `import torch` goes on."""
    if os.environ.get("HF_EVOPRESS_AUTOLOAD") == "0":
        return
    try:
        import hf_evopress  # noqa: F401
    except Exception as error:
        import logging

        logging.getLogger(__name__).warning(
            "hf_evopress is installed and cannot be imported (%s): compressed models will not "
            'load; "pip uninstall hf-evopress" or HF_EVOPRESS_AUTOLOAD=0 ends this warning',
            error,
        )
