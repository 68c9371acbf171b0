"""Who else wants to know what is computed: compilers, exports, derivatives."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

in_functorch = torch._C._functorch.peek_interpreter_stack  # None outside of torch.func


def is_exporting() -> bool:
    """Return whether the graph is for others, who have no kernels: it gets plain operations."""
    # what torch.compiler.is_exporting() returns; to torch.compile that is always true in torch 2.11
    return torch.compiler._is_exporting_flag or torch.jit.is_tracing()


def is_traced() -> bool:
    """Return whether something besides this process' memory wants to know what is computed."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or in_functorch() is not None


def is_compiled_into_one() -> bool:
    """Return whether torch.compile is tracing: a layer is one operator of its graph."""
    return torch.compiler.is_compiling() and not is_exporting()


def has_tangents() -> bool:
    """Return whether inputs may carry tangents (torch.autograd.forward_ad), which kernels drop."""
    return forward_ad._current_level >= 0
