"""A surrogate of the loss: predicted losses, corrected by measured ones.

The prediction of a plan is the sum of its entries. Measured differences between plans give the
scale of the table, then correct it by a Bayesian linear regression (ridge) on relative errors
shared by entries of a level, by those of a kind of unit, and on errors of single entries, in
which interactions around the incumbent show.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import sqrt

from .paired import Paired
from .space import Genome, SearchSpace, Table

Features = dict[Hashable, float]

# Standard deviations of relative errors. KFAC predictions of single units sum to 1.13 of the
# truth and correlate at 0.91 in logarithms, which leaves about a half for single entries.
LEVEL, KIND, ENTRY = 0.3, 0.3, 0.5
FLOOR = 0.05  # of the mean entry: an entry of no predicted loss can be wrong too
MISFIT = 0.2  # of a difference: no sum of entries explains more than the rest
MEMORY = 96  # measurements kept; the regression costs their cube


@dataclass(frozen=True)
class _Seen:
    """A measured difference between two plans, and what the table as given said about it."""

    features: Features
    predicted: float
    measured: float
    variance: float


class Surrogate:
    """Predicted losses per gene and option that learn from measured differences."""

    def __init__(self, space: SearchSpace, table: Table) -> None:
        self.space, self.prior = space, table
        entries = [abs(value) for row in table for value in row]
        self._floor = FLOOR * sum(entries) / len(entries) or 1e-12
        self._seen: list[_Seen] = []
        self._kernel: list[list[float]] = []  # lower triangle of F F', one row per measurement

    def learn(self, challenger: Genome, incumbent: Genome, measured: Paired) -> None:
        """Take in one measured difference challenger - incumbent."""
        features: Features = {}
        predicted = 0.0
        for i, n, sign in self._changes(challenger, incumbent):
            predicted += sign * self.prior[i][n]
            for key, value in self._entry(i, n).items():
                features[key] = features.get(key, 0.0) + sign * value
        variance = measured.stderr**2 + (MISFIT * measured.mean) ** 2
        self._seen.append(_Seen(features, predicted, measured.mean, variance))
        self._kernel.append([_dot(features, seen.features) for seen in self._seen])
        if len(self._seen) > MEMORY:
            del self._seen[0], self._kernel[0]
            for row in self._kernel:
                del row[0]

    def table(self) -> list[list[float]]:
        """Return the corrected table: w = F' (F F' + N)^-1 (measured - scale * predicted)."""
        scale = self._scale()
        error: Features = {}
        if self._seen:
            A = [[scale**2 * value for value in row] for row in self._kernel]
            for row, seen in zip(A, self._seen, strict=True):
                least = (scale * self._floor) ** 2 * 1e-6
                row[-1] += seen.variance + (MISFIT * scale * seen.predicted) ** 2 + least
            residuals = [seen.measured - scale * seen.predicted for seen in self._seen]
            for seen, weight in zip(self._seen, _solve_positive(A, residuals), strict=True):
                for key, value in seen.features.items():
                    error[key] = error.get(key, 0.0) + scale**2 * weight * value
        return [
            [
                scale * value + sum(error.get(k, 0.0) * x for k, x in self._entry(i, n).items())
                for n, value in enumerate(row)
            ]
            for i, row in enumerate(self.prior)
        ]

    def _scale(self) -> float:
        """Return measured / predicted over all that was seen; 1 where they do not agree."""
        both = sum(s.measured * s.predicted / (s.variance or 1e-30) for s in self._seen)
        square = sum(s.predicted**2 / (s.variance or 1e-30) for s in self._seen)
        return both / square if both > 0 else 1.0

    def _changes(self, new: Genome, old: Genome) -> Iterator[tuple[int, int, int]]:
        """Return (gene, option, sign) of the entries by which the sums of two plans differ."""
        for i in range(len(new)):
            is_new, is_old = self.space.is_active(new, i), self.space.is_active(old, i)
            if is_new and not (is_old and new[i] == old[i]):
                yield i, new[i], 1
            if is_old and not (is_new and new[i] == old[i]):
                yield i, old[i], -1

    def _entry(self, i: int, n: int) -> Features:
        """Return the features of one entry, each times its prior standard deviation."""
        gene, value = self.space.genes[i], self.prior[i][n]
        return {
            ("level", gene.options[n].level): LEVEL * value,
            ("kind", gene.kind): KIND * value,
            (i, n): ENTRY * (abs(value) + self._floor),
        }


def rate_table(space: SearchSpace) -> list[list[float]]:
    """Return a guess of all losses from bits alone, where nothing better is known.

    Rate-distortion theory: the error of a weight falls fourfold per bit. A dropped sub-block
    loses what its weights would at 0 bits.
    """
    table = []
    for i, gene in enumerate(space.genes):
        inner = sum(space.genes[k].n_weights for k in space.inner.get(i, ()))
        row = []
        for option in gene.options:
            if option.is_drop:
                loss = float(inner + gene.n_weights)
            else:
                bits = option.cost_bits / gene.n_weights if gene.n_weights else 0.0
                loss = gene.n_weights * 4.0**-bits
            row.append(loss / space.n_weights)
        table.append(row)
    return table


def _dot(a: Features, b: Features) -> float:
    if len(b) < len(a):
        a, b = b, a
    return sum(value * b[key] for key, value in a.items() if key in b)


def _solve_positive(lower: Sequence[Sequence[float]], y: Sequence[float]) -> list[float]:
    """Return x with A x = y for positive definite A, given by its lower triangle (Cholesky)."""
    L: list[list[float]] = []
    for i, row in enumerate(lower):
        done: list[float] = []
        for j, value in enumerate(row):
            other = done if i == j else L[j]
            rest = value - sum(a * b for a, b in zip(done, other, strict=False))
            done.append(sqrt(max(rest, 1e-300)) if i == j else rest / other[j])
        L.append(done)
    n, x = len(L), list(y)
    for i in range(n):
        x[i] = (x[i] - sum(L[i][j] * x[j] for j in range(i))) / L[i][i]
    for i in reversed(range(n)):
        x[i] = (x[i] - sum(L[j][i] * x[j] for j in range(i + 1, n))) / L[i][i]
    return x
