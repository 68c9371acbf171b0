"""Tables that are made once for a device and kept: not in the memory of whoever asks first."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

_P = ParamSpec("_P")
_Made = TypeVar("_Made")


def lasting(make: Callable[_P, _Made]) -> Callable[_P, _Made]:
    """Decorate what makes a tensor that a cache keeps: `@lru_cache` above `@lasting`.

    Where the first call is made in inference mode, the tensor is an ordinary one, of use for
    gradients later. torch.compile with CUDA graphs runs a model first with the thread's memory in
    the graph's pool, and takes a tensor that stays there for a fault: for a GPU, `make` is called
    in a thread of its own.
    """

    @wraps(make)
    def made(*args: _P.args, **kwargs: _P.kwargs) -> _Made:
        given = (*args, *kwargs.values())
        with torch.inference_mode(False):
            if not any(isinstance(a, torch.device) and a.type == "cuda" for a in given):
                return make(*args, **kwargs)
            with ThreadPoolExecutor(1) as other:
                return other.submit(make, *args, **kwargs).result()

    return made
