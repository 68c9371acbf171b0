"""What a runtime is that prepares something: tensors made once, and an input's way through them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods import compose
from ..methods.base import Shape, State
from ..plans.level import Level


class Runtime(ABC):
    """Tensors made once from the packed ones of a layer, and an input's way through them."""

    @abstractmethod
    def make(self, level: Level, state: State, shape: Shape, dtype: torch.dtype) -> State:
        """Return the tensors to keep; none where the packed layer is as fast."""

    @abstractmethod
    def takes(self, x: Tensor, made: State) -> bool:
        """Return whether run() can do this x; if not, it goes through the packed tensors."""

    @abstractmethod
    def run(
        self, x: Tensor, made: State, level: Level, state: State, shape: Shape, bias: Tensor | None
    ) -> Tensor:
        """Return what the packed layer returns for x (..., in_features)."""


class Expanded(Runtime):
    """The dense weight in the dtype of the model."""

    def make(self, level: Level, state: State, shape: Shape, dtype: torch.dtype) -> State:
        return {"weight": compose.decompress(level, state, shape, dtype)}

    def takes(self, x: Tensor, made: State) -> bool:
        return x.dtype == made["weight"].dtype

    def run(
        self, x: Tensor, made: State, level: Level, state: State, shape: Shape, bias: Tensor | None
    ) -> Tensor:
        W, fix = made["weight"], compose.bias_fix(level, state)
        if fix is not None:
            bias = fix.to(W.dtype) if bias is None else bias + fix.to(W.dtype)
        return F.linear(x, W, bias)
