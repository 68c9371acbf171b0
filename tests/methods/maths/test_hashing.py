"""Numbers with a formula: what they are is fixed for ever."""

from __future__ import annotations

import torch

from hf_evopress.methods.maths.hashing import hash32, permutation, signs


def by_hand(x):
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def test_the_hash_is_its_formula():
    numbers = [0, 1, 2, 255, 65536, 2**31, 2**32 - 1, 2**32 + 7]
    assert hash32(torch.tensor(numbers)).tolist() == [by_hand(x) for x in numbers]


def test_signs_are_those_of_the_formula_and_balanced():
    expected = [1 - 2 * (by_hand(i + 0x9E3779B9 * 4) >> 31) for i in range(50)]
    assert signs(50, seed=3).tolist() == expected
    assert abs(float(signs(4096, 0).mean())) < 0.05
    assert not torch.equal(signs(64, 0), signs(64, 1))


def test_a_permutation_takes_every_place_once():
    assert permutation(257).sort().values.tolist() == list(range(257))
