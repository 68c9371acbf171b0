from __future__ import annotations

from random import Random

import pytest

from hf_evopress.search.paired import compare, student_t_cdf


@pytest.mark.parametrize(
    ("t", "degrees", "p"),
    [(-2, 10, 0.036694), (0, 5, 0.5), (-12, 1, 0.026465), (2.015048, 5, 0.95),
     (-2.462021, 29, 0.01)],
)  # fmt: skip
def test_student_t_agrees_with_tables(t: float, degrees: int, p: float) -> None:
    assert student_t_cdf(t, degrees) == pytest.approx(p, abs=1e-6)


def test_a_common_offset_of_sequences_does_not_hide_a_difference() -> None:
    rng = Random(0)
    hardness = [rng.gauss(3, 1) for _ in range(16)]
    better = [h - 0.01 + rng.gauss(0, 0.005) for h in hardness]
    paired = compare(better, hardness)
    assert paired.is_better(0.999) and paired.stderr < 0.002


def test_a_single_value_is_exact() -> None:
    assert compare([0.9], [1.0]).is_better(0.99)
    assert not compare([1.0], [1.0]).is_better(0.5)


def test_equal_plans_are_called_better_as_rarely_as_stated() -> None:
    rng = Random(1)
    draws = 4000
    hits = sum(
        compare([rng.gauss(0, 1) for _ in range(8)], [0.0] * 8).is_better(0.95)
        for _ in range(draws)
    )
    assert 0.035 < hits / draws < 0.065
