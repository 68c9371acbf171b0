"""Tables that are made once for a device and kept: not in the memory of whoever asks first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from .devices import wait_for

_P = ParamSpec("_P")
_Made = TypeVar("_Made")


def lasting(make: Callable[_P, _Made]) -> Callable[_P, _Made]:
    """Decorate what makes a tensor that a cache keeps: `@lru_cache` above `@lasting`.

    Where the first call is made in inference mode, the tensor is an ordinary one, of use for
    gradients later. While something is traced (torch.export) it has its numbers all the same.
    torch.compile with CUDA graphs runs a model first with the thread's memory in the graph's
    pool, and takes a tensor that stays there for a fault. In the latter two cases `make` is
    called in a thread of its own, which knows nothing of the caller's.
    """

    @wraps(make)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> _Made:
        given = (*args, *kwargs.values())
        is_for_gpu = any(isinstance(a, torch.device) and a.type == "cuda" for a in given)
        if not is_for_gpu and not torch._C._len_torch_dispatch_stack():
            with torch.inference_mode(False):
                return make(*args, **kwargs)
        with ThreadPoolExecutor(1) as other:
            return other.submit(lambda: _done(make(*args, **kwargs))).result()

    return made


def _done(made: _Made) -> _Made:
    """Return what was made, when it is: others do not know of this thread's stream."""
    if isinstance(made, torch.Tensor) and made.is_cuda:
        wait_for(made.device)
    return made
