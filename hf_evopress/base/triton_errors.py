"""What can go wrong in finding, compiling and launching a kernel in Triton."""

from __future__ import annotations

from functools import lru_cache
from importlib import import_module
from subprocess import SubprocessError


@lru_cache(maxsize=None)
def failures() -> tuple[type[BaseException], ...]:
    """Return the errors of finding, compiling and launching a kernel."""
    known: tuple[type[BaseException], ...] = (
        *(ImportError, OSError, RuntimeError, ValueError, TypeError, LookupError),
        *(AttributeError, ArithmeticError, AssertionError, SubprocessError),
    )
    try:
        return (*known, import_module("triton.errors").TritonError)
    except ImportError:
        return known
