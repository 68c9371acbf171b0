"""Training arguments for the device in use."""

from __future__ import annotations

import os
from dataclasses import fields
from functools import cached_property
from typing import Any

import torch
from transformers import TrainingArguments

from ..base.devices import KINDS, find_device
from ..loading.versions import training_words


def training_arguments(**settings: Any) -> TrainingArguments:
    """Return transformers' arguments for training on the device in use.

    Of several GPUs transformers takes the first, or all at once in threads; here it is one, and
    the one asked for. Under a launcher each process keeps the one that it was given.
    """
    device = find_device()
    return _OnOneDevice(
        **training_words(settings, {f.name for f in fields(TrainingArguments)}),
        use_cpu=device.type not in KINDS,  # else bf16 is refused on a CPU
        dataloader_pin_memory=device.type == "cuda",
    )


class _OnOneDevice(TrainingArguments):
    @cached_property
    def _setup_devices(self) -> torch.device:
        found = TrainingArguments.__dict__["_setup_devices"].func(self)
        if "LOCAL_RANK" in os.environ:
            return found
        self._n_gpu = min(getattr(self, "_n_gpu", 0), 1)
        self.distributed_state.device = find_device()
        return find_device()
