"""Flips count paired answers, question by question."""

import math
import statistics

import pytest

from hf_evopress.scoring.flips import (
    Answer,
    Flips,
    accuracy,
    count_flips,
    difference_error,
    standard_error,
)


def answers(words: str, right: str) -> list[Answer]:
    return [Answer(a, a == b) for a, b in zip(words, right, strict=True)]


def test_an_equal_accuracy_can_hide_flips() -> None:
    dense, compressed = answers("abcx", "abcd"), answers("xbcd", "abcd")
    assert accuracy(dense) == accuracy(compressed) == 0.75
    assert count_flips(dense, compressed) == Flips(4, 0.5, 0.25, 0.25)


def test_a_wrong_answer_that_becomes_another_wrong_one_has_changed_only() -> None:
    assert count_flips(answers("x", "a"), answers("y", "a")) == Flips(1, 1.0, 0.0, 0.0)


def test_without_right_answers_only_changes_are_counted() -> None:
    flips = count_flips([Answer("a"), Answer("b")], [Answer("a"), Answer("c")])
    assert flips.to_dict() == {"n_answers": 2, "changed": 0.5}


@pytest.mark.parametrize("n", [0, 2])
def test_answers_to_other_questions_cannot_be_paired(n: int) -> None:
    with pytest.raises(ValueError, match=f"got {n} and"):
        count_flips([Answer("a")] * n, [Answer("a")] * (n // 2))


def test_standard_errors_are_those_of_means_over_questions() -> None:
    dense, compressed = answers("abcxef", "abcdef"), answers("xbcdxf", "abcdef")
    right = [[float(answer.is_correct or 0) for answer in said] for said in (dense, compressed)]
    gained = [b - a for a, b in zip(*right, strict=True)]
    root = math.sqrt(6)
    assert standard_error(dense) == pytest.approx(statistics.pstdev(right[0]) / root)
    paired = difference_error(count_flips(dense, compressed))
    assert paired == pytest.approx(statistics.pstdev(gained) / root)
    assert difference_error(count_flips([Answer("a")], [Answer("b")])) is None
