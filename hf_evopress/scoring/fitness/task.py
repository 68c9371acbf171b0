"""A user-defined fitness: a function of dense logits, compressed logits and next tokens.

For a task of your own, or for costs that are not symmetric, such as losing the dense model's
right answers weighing more than gaining others. From Python:

    def lost_answers(dense, compressed, labels):
        was_right, is_right = dense.argmax(-1) == labels, compressed.argmax(-1) == labels
        return (was_right & ~is_right).float().mean()

    compress(recipe, fitness=Task(lost_answers))

A package offers it by name through an entry point in the group hf_evopress.fitness; recipes name
no files, so that running one never runs code that is not installed.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from torch import Tensor

from .base import Fitness, Loss, Targets, total

Cost = Callable[[Tensor, Tensor, Tensor], "float | Tensor"]


class Task(Fitness):
    """The mean of a function over sequences; lower is better.

    function(dense, compressed, labels): logits (T - 1, V) twice and the next tokens (T - 1,),
    to one number. It sees whole sequences, and the dense logits are made anew for each round, as
    they are too large to keep: about the cost of one more candidate.
    """

    name = "task"
    needs_whole = True
    keeps_targets = False

    def __init__(self, function: Cost | None = None) -> None:
        if not callable(function):
            raise ValueError(
                "task needs a function of (dense logits, compressed logits, labels): give "
                "fitness=Task(function) in Python, or name an entry point in the group "
                "hf_evopress.fitness of an installed package"
            )
        self.function = function

    def __repr__(self) -> str:
        code = getattr(self.function, "__code__", None)
        if code is None:
            return f"task {self.function!r}"
        return f"task {self.function.__qualname__} {zlib.crc32(code.co_code)}"

    def targets(self, logits: Tensor, tokens: Tensor) -> Targets:
        """Return {logits (T, V)} of the dense model."""
        return {"logits": logits}

    def share(self, logits: Tensor, tokens: Tensor, targets: Targets, part: slice) -> Loss:
        """Return what the function says of the whole sequence; ValueError if no number."""
        value = self.function(targets["logits"][:-1], logits[:-1], tokens[1:])
        if isinstance(value, Tensor) and value.numel() == 1:
            return total(value.detach())
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"a task's function returns one number per sequence, got {type(value).__name__}"
            ) from error
