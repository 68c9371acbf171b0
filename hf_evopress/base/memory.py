"""Out of memory on a device: smaller batches first, then an error that says what lowers it."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from .devices import let_cache_go, peak_bytes

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

WAY_OUT = (
    "let blocks come one at a time (--offload cpu), or take shorter sequences (--seq-len); what "
    "was finished is kept, and the same command goes on from there"
)


def within_memory(
    step: str,
    run: Callable[[int], Made],
    device: torch.device,
    *,
    batch_tokens: int = 0,
    least: int = 0,
    way_out: str = WAY_OUT,
) -> Made:
    """Return run(batch_tokens), with half as many tokens each time that memory runs out.

    least: tokens of the smallest batch, a sequence. Where that is too large as well, or a step
    has no batches (0), RuntimeError names the step, the peak and what lowers it.
    """
    while True:
        error = _tried(run, batch_tokens)
        if not isinstance(error, torch.OutOfMemoryError):
            return error
        peak = peak_bytes(device)
        gc.collect()  # a model and its trainer know each other
        let_cache_go(device)
        if batch_tokens // 2 < max(least, 1):
            held = "" if peak is None else f" (at most {peak / 1e9:.3g} GB were in use)"
            raise RuntimeError(
                f"{step} does not fit in the memory of {device}{held}: {way_out}"
            ) from error.with_traceback(None)
        batch_tokens //= 2
        logger.warning("%s: out of memory on %s, now %d tokens at once", step, device, batch_tokens)


def whole_within_memory(
    step: str, run: Callable[[], Made], device: torch.device, *, way_out: str = WAY_OUT
) -> Made:
    """Return run(), a step without batches; RuntimeError, as of `within_memory`, if it is too
    large."""
    return within_memory(step, lambda _: run(), device, way_out=way_out)


def _tried(run: Callable[[int], Made], batch_tokens: int) -> Made | torch.OutOfMemoryError:
    """Return what run makes, or the error; its traceback would keep tensors alive."""
    try:
        return run(batch_tokens)
    except torch.OutOfMemoryError as error:
        return error.with_traceback(None)
