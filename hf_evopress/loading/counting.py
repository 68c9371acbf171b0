"""Count weights, not packed bytes, where transformers and PEFT say how many parameters there are.

Both add up `numel` of the parameters, which here are codes, scales and masks. What a compressed
layer stands for is its weight, so num_parameters() of a compressed model is that of the dense one,
dropped blocks and zero layers apart, and PEFT's trainable share is of weights.
"""

from __future__ import annotations

import math
import sys
from functools import wraps
from typing import Any

from torch import nn

_KNOWS = "_counts_evopress"


def more_weights(model: nn.Module, *, exclude_embeddings: bool = False) -> int:
    """Return the weights of the compressed layers of `model`, less their packed numbers."""
    from .packed import PackedWeight

    more, seen = 0, set[int]()
    for module in model.modules():
        if not isinstance(module, PackedWeight):
            continue
        own = {id(t): t.numel() for t in module.state.values() if isinstance(t, nn.Parameter)}
        if own and own.keys() <= seen:  # a head that is tied: its weight is the embedding's
            continue
        is_left_out = exclude_embeddings and isinstance(module, nn.Embedding)
        more += 0 if is_left_out else math.prod(module.shape)
        more -= sum(n for key, n in own.items() if key not in seen)
        seen |= own.keys()
    return more


def count_in_transformers() -> None:
    """Have num_parameters() count weights; a second call does nothing."""
    from transformers import PreTrainedModel

    stock = PreTrainedModel.num_parameters
    if hasattr(stock, _KNOWS):
        return

    @wraps(stock)
    def num_parameters(
        self: Any, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        count: int = stock(self, only_trainable, exclude_embeddings)
        if only_trainable:  # packed floats that are trained are what is trained
            return count
        return count + more_weights(self, exclude_embeddings=exclude_embeddings)

    setattr(num_parameters, _KNOWS, True)
    PreTrainedModel.num_parameters = num_parameters


def count_in_peft(module: str) -> None:
    """Have get_nb_trainable_parameters() of the PEFT model that a module defines count weights."""
    kinds = vars(sys.modules[module])
    kind: Any = kinds["PeftModel" if module == "peft.peft_model" else "PeftMixedModel"]
    stock = kind.get_nb_trainable_parameters
    if hasattr(stock, _KNOWS):
        return

    @wraps(stock)
    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        trainable, everything = stock(self)
        return trainable, everything + more_weights(self)

    setattr(get_nb_trainable_parameters, _KNOWS, True)
    kind.get_nb_trainable_parameters = get_nb_trainable_parameters
