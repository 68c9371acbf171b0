"""Values shared at random places: a weight is a shorter vector, unfolded with random signs.

RANDOMFOLD of STABLE-RPS (Desai and Shrivastava 2023, arXiv:2310.11611, after ROAST): W.flat[p] =
g(p) psi[f(p)], with f and g from a formula of the shape and `seed` (`maths/folding.py`), so that
only psi is stored. Each value is the signed mean of the weights that use it, which is best in
squares. What training by `make_folded` exports.

Stores 16 bits per value: 16 * share bits per weight. Runs as the weight that it unfolds to.

When to use it: for a model that is trained with it, from the start or for long. Made of trained
weights that are not trained again it loses to all other methods: values that have nothing to do
with each other share one, and with c uses each the error is 1 - 1 / c of the weight's square.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import Method, Param, Shape, State
from .maths.factors import FLOATS, pack_factor
from .maths.folding import Unfolded, n_values, signed_mean
from .maths.linalg import Stats


class Folded(Method):
    """`folded:share=0.5`: half as many values as weights, each used twice."""

    name = "folded"
    can_follow = True
    is_trainable = True
    params: ClassVar[Mapping[str, Param]] = {
        "share": Param(float, "values per weight", at_least=0.001, at_most=1.0),
        "seed": Param(int, "of places and signs", default=0, at_least=0),
        "values": Param(str, "dtype of the values", default="float16", choices=tuple(FLOATS)),
    }
    examples = (
        "folded:share=0.5",
        "folded:share=0.3,seed=1,values=bfloat16",
        "folded:share=1.0",
    )

    def cost_bits(self, shape: Shape, **params: Any) -> int:
        return 16 * self.kept_values(shape, **params)

    def kept_values(self, shape: Shape, **params: Any) -> int:
        return n_values(shape[0] * shape[1], params["share"])

    def compress(self, W: Tensor, stats: Stats | None, **params: Any) -> State:
        m = n_values(W.numel(), params["share"])
        return pack_factor("psi", signed_mean(W.flatten(), m, params["seed"]), params["values"])

    def decompress(self, state: State, shape: Shape, dtype: torch.dtype, **params: Any) -> Tensor:
        n = shape[0] * shape[1]
        flat: Tensor = Unfolded.apply(state["psi"].float(), n, params["seed"], 1.0, False)
        return flat.view(shape).to(dtype)

    def empty(self, shape: Shape, dtype: torch.dtype, **params: Any) -> State:
        m = n_values(shape[0] * shape[1], params["share"])
        return {"psi": torch.empty(m, dtype=FLOATS[params["values"]], device="meta")}
