"""Tensors whose bytes lie in a file instead of memory, for what waits long and is read once."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .resources import format_size


def on_disk(tensor: Tensor, folder: str | Path) -> Tensor:
    """Return a tensor on the CPU whose bytes are in a file of `folder`, memory-mapped.

    The file has no name any more when this returns, so that nothing is left of it when the
    tensor is gone, however the process ends. Raises OSError that says what is missing where the
    disk is full.
    """
    if not tensor.numel():
        return tensor.cpu()
    folder, size = Path(folder), tensor.numel() * tensor.element_size()
    folder.mkdir(parents=True, exist_ok=True)
    number, name = tempfile.mkstemp(prefix=".hidden-", suffix=".tmp", dir=folder)
    try:
        _reserve(number, size)
        made = torch.from_file(name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        free = os.statvfs(folder)
        raise OSError(
            error.errno,
            f"hidden states need {format_size(size)} more in {folder}, where "
            f"{format_size(free.f_bavail * free.f_frsize)} are free: make room, or put the work "
            "folder elsewhere (--work); what was finished is kept",
        ) from error
    finally:
        os.close(number)
        os.unlink(name)
    return made.view(tensor.shape).copy_(tensor)


def _reserve(number: int, size: int) -> None:
    """Have the disk give a file its bytes now: a write into a map of a full one would kill us."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(number, 0, size)
        return
    os.truncate(number, size)
