"""Triton's interpreter in a fraction of the time: it does not do again what it has done.

Each call of a function in a kernel replaced all of triton.language once more, and each sum of
whole numbers was made a second time for an assertion that only debugging looks at.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton.language as tl
from triton.runtime import interpreter

_EVERYTHING = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
_replace_language = interpreter._patch_lang
_find_dtype = interpreter._get_np_dtype
_dtypes: dict[str, Any] = {}


def _replace_all(kernel: Any) -> Any:
    """Replace the language for a kernel, and for Triton's own functions that it may call."""
    return _replace_language(_EVERYTHING)


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function of a kernel, for which the language has been replaced."""
    return self.rewrite()(*args, **kwargs)


def _dtype_of(kind: Any) -> Any:
    """Return NumPy's dtype of one of Triton's, which was looked up in a table made for it."""
    name = kind.scalar.name
    if name not in _dtypes:
        _dtypes[name] = _find_dtype(kind.scalar)
    return _dtypes[name]


def be_quick() -> None:
    """Let kernels be interpreted so from now on."""
    interpreter._get_np_dtype = _dtype_of
    interpreter._patch_lang = _replace_all
    interpreter.InterpretedFunction.__call__ = _call
    object.__setattr__(interpreter.interpreter_builder.options, "sanitize_overflow", False)
