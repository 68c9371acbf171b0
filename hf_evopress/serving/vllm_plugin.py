"""What vLLM calls where hf_evopress is installed (entry point group vllm.general_plugins).

It registers the quantization "evopress", so that `LLM(folder)` and `vllm serve folder` load packed
checkpoints. Nothing of ours but this and `vllm_config` is imported until such a checkpoint comes.
"""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)


def register() -> None:
    """Teach vLLM to load compressed models; a second call does nothing new."""
    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .vllm_config import QUANT_METHOD, PackedConfig
    except ImportError as error:
        logger.warning(
            "hf_evopress does not know this version of vLLM (%s): compressed models will not load; "
            "it was tried with 0.32. VLLM_PLUGINS, a list of names, leaves the plugin out",
            error,
        )
        return
    register_quantization_config(QUANT_METHOD)(PackedConfig)
