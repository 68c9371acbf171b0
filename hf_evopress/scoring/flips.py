"""Flips: the answers that a compressed model changes, which an equal accuracy hides.

A model can lose as many right answers as it gains and keep its accuracy, while every tenth answer
is another one. Dutta et al. 2024 (arXiv:2407.09141) count these, LLM-KICK (arXiv:2310.01382) asks
for agreement with the dense model; both are comparisons of paired answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    """One answer: what was said, in any form that can be compared, and whether it is right.

    is_correct is None where the question has no right answer, as in summaries.
    """

    said: str
    is_correct: bool | None = None


@dataclass(frozen=True)
class Flips:
    """Paired answers of two models: shares of all n_answers, between 0 and 1."""

    n_answers: int
    changed: float
    correct_to_wrong: float | None = None
    wrong_to_correct: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return what is known as JSON values."""
        return {key: value for key, value in vars(self).items() if value is not None}


def count_flips(dense: Sequence[Answer], compressed: Sequence[Answer]) -> Flips:
    """Return how the answers of `compressed` differ from those of `dense`, question by question.

    >>> a, b = [Answer("x", True), Answer("y", False)], [Answer("z", False), Answer("y", False)]
    >>> count_flips(a, b)
    Flips(n_answers=2, changed=0.5, correct_to_wrong=0.5, wrong_to_correct=0.0)
    """
    if len(dense) != len(compressed) or not dense:
        raise ValueError(
            f"flips pair the answers to the same questions, got {len(dense)} and {len(compressed)}"
        )
    pairs = list(zip(dense, compressed, strict=True))
    n = len(pairs)
    changed = sum(a.said != b.said for a, b in pairs) / n
    if any(answer.is_correct is None for pair in pairs for answer in pair):
        return Flips(n, changed)
    return Flips(
        n,
        changed,
        sum(bool(a.is_correct) and not b.is_correct for a, b in pairs) / n,
        sum(not a.is_correct and bool(b.is_correct) for a, b in pairs) / n,
    )


def accuracy(answers: Sequence[Answer]) -> float:
    """Return the share of right answers."""
    return sum(bool(answer.is_correct) for answer in answers) / len(answers)


def standard_error(answers: Sequence[Answer]) -> float:
    """Return the standard error of `accuracy`, were the questions drawn at random: binomial.

    >>> standard_error([Answer("x", True)] * 2 + [Answer("y", False)] * 2)
    0.25
    """
    p = accuracy(answers)
    return math.sqrt(p * (1 - p) / len(answers))


def difference_error(flips: Flips) -> float | None:
    """Return the standard error of the difference in accuracy, paired question by question.

    Only answers that changed sides count: of n, a share b from right to wrong and c back, the
    difference c - b has variance (b + c - (c - b)^2) / n, smaller than of two lists unpaired.
    """
    b, c = flips.correct_to_wrong, flips.wrong_to_correct
    if b is None or c is None:
        return None
    return math.sqrt((b + c - (c - b) ** 2) / flips.n_answers)
