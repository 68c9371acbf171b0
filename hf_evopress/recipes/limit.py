"""The budget of a recipe: one limit, and the context whose key-value cache it includes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ..base.resources import parse_size
from .targets import APART

WITH_CACHE = ("evolve", "knapsack")  # strategies that choose settings of the cache
LEAST_TOKENS = 128  # two buffers of a cache


@dataclass(frozen=True)
class Limit:
    """The limit, said in one way."""

    bits: float | None = None  # stored bits per compressed weight, scales and zero points included
    size: str | None = None  # of the whole checkpoint: 90MB, 1.5GiB
    ratio: float | None = None  # of the dense checkpoint's size
    sparsity: float | None = None  # share of the compressed weights that is removed
    drop: float | None = None  # share of the attention and of the MLP sub-blocks, each dropped
    context: int | None = None  # tokens whose key-value cache `size` includes; settings are chosen

    @property
    def counts_file(self) -> bool:
        """Whether the limit is of the whole file."""
        return self.size is not None or self.ratio is not None

    def __post_init__(self) -> None:
        said = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        context = said.pop("context", None)
        if len(said) > 1:
            raise ValueError(f"say the budget in one way, got {said}")
        if context is not None and (context < 1 or self.size is None):
            raise ValueError(
                f"context={context} counts the cache of so many tokens beside the file: it is 1 or "
                "more, with a budget of size, such as 120MB"
            )
        if self.size is not None:
            parse_size(self.size)
        if self.bits is not None and not 0 < self.bits <= 32:
            raise ValueError(f"bits is per compressed weight, in (0, 32]; got {self.bits}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is of the dense size, in (0, 1]; got {self.ratio}")
        for name in ("sparsity", "drop"):
            if (share := getattr(self, name)) is not None and not 0 < share < 1:
                raise ValueError(f"{name} is a share, in (0, 1); got {share}")


def check_context(
    budget: Limit,
    *,
    cache: Sequence[str],
    strategies: Sequence[str],
    has_sensitivities: bool,
    seq_len: int,
    export: str,
) -> None:
    """Raise ValueError where the rest of a recipe does not go with its budget's context."""
    if budget.context is None:
        if cache:
            raise ValueError(
                "cache offers settings of the key-value cache: it needs budget.context "
                "(--context), such as 8192"
            )
        return
    if wrong := [name for name in strategies if name not in WITH_CACHE]:
        raise ValueError(
            f"strategy {wrong[0]} does not choose settings of the cache; with a context take "
            f"{' or '.join(WITH_CACHE)}"
        )
    if not has_sensitivities:
        raise ValueError("a budget with a context needs search.sensitivity_tokens > 0, got 0")
    if seq_len < LEAST_TOKENS:
        raise ValueError(
            f"data.seq_len (--seq-len) is {seq_len}: a token sees the cache as it is stored from "
            f"the 65th on; with a context take {LEAST_TOKENS} or more"
        )
    if export in APART:
        raise ValueError(
            f"what is for {export} has a cache of its own, which no plan can set: leave "
            "budget.context (--context) out"
        )
