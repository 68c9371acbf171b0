"""The order of blocks: every prefix of it is the best of its size where gains fall."""

from __future__ import annotations

import itertools
import random
from collections import Counter

from hf_evopress.search.block_order import order_blocks


def test_first_blocks_come_first_and_each_units_blocks_are_all_there() -> None:
    losses = {"a": [9.0, 3.0, 1.0], "b": [5.0, 4.0], "c": [2.0]}
    order = order_blocks(losses, {"a": 10, "b": 10, "c": 10})
    assert order[:3] == ["a", "b", "c"]
    assert Counter(order) == {"a": 3, "b": 2, "c": 1}


def test_what_gains_more_per_byte_comes_earlier() -> None:
    losses = {"a": [9.0, 5.0], "b": [9.0, 6.0]}
    assert order_blocks(losses, {"a": 10, "b": 10})[2:] == ["a", "b"]
    assert order_blocks(losses, {"a": 10, "b": 5})[2:] == ["b", "a"]


def test_a_poor_block_before_a_good_one_is_taken_together_with_it() -> None:
    losses = {"a": [9.0, 8.9, 1.0], "b": [9.0, 7.0, 6.0]}
    assert order_blocks(losses, {"a": 1, "b": 1})[2:] == ["a", "a", "b", "b"]


def test_equal_gains_keep_the_order_of_the_names() -> None:
    losses = {"a": [2.0, 1.0], "b": [2.0, 1.0]}
    assert order_blocks(losses, {"a": 1, "b": 1})[2:] == ["a", "b"]


def test_a_loss_that_rises_again_comes_last() -> None:
    losses = {"a": [2.0, 1.0, 1.5], "b": [2.0, 1.9]}
    assert order_blocks(losses, {"a": 1, "b": 1})[2:] == ["a", "b", "a"]


def test_prefixes_are_optimal_where_gains_fall() -> None:
    rng = random.Random(0)
    losses = {}
    for unit in "abc":
        gains = sorted((rng.random() for _ in range(3)), reverse=True)
        losses[unit] = list(itertools.accumulate(gains, lambda a, b: a - b, initial=4.0))
    order = order_blocks(losses, dict.fromkeys("abc", 7))
    for n in range(3, len(order) + 1):
        counts = Counter(order[:n])
        got = sum(losses[u][counts[u] - 1] for u in "abc")
        every = (
            sum(losses[u][k] for u, k in zip("abc", ks, strict=True))
            for ks in itertools.product(range(4), repeat=3)
            if sum(ks) + 3 == n
        )
        assert abs(got - min(every)) < 1e-12
