"""Walks through a trellis come back from their bytes, and take no bit more than they say."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.methods.maths.walks import (
    BITS,
    LENGTH,
    own_bits,
    pack_starts,
    pack_walks,
    start_bytes,
    unpack_walks,
    up_to,
    walk_bytes,
)

CASES = [(k, L) for k in BITS for L in (4, 5, 8, 11, 12, 16) if own_bits(k)[1] <= L]


def walks(n, bits, state_bits, *, tail_biting):
    """Return n random walks, bit by bit as the trellis is defined."""
    g = torch.Generator().manual_seed(int(bits * 100) + state_bits)
    own = own_bits(bits)
    new = torch.randint(2 ** own[1], (n, LENGTH), generator=g)
    new[:, ::2] %= 2 ** own[0]
    state = torch.randint(2**state_bits, (n,), generator=g)
    if tail_biting:  # what comes before is the end
        state = torch.zeros(n, dtype=torch.int64)
        for t in range(LENGTH):
            state = (state << own[t % 2] | new[:, t]) % 2**state_bits
    states = torch.empty(n, LENGTH, dtype=torch.int32)
    for t in range(LENGTH):
        state = (state << own[t % 2] | new[:, t]) % 2**state_bits
        states[:, t] = state
    return states


@pytest.mark.parametrize("bits, state_bits", CASES)
def test_walks_that_bite_their_tails_come_back(bits, state_bits):
    states = walks(5, bits, state_bits, tail_biting=True)
    codes = pack_walks(states, bits)
    assert codes.shape == (5, 32 * bits) == (5, walk_bytes(bits)) and codes.dtype == torch.uint8
    assert torch.equal(unpack_walks(codes, bits, state_bits), states)


@pytest.mark.parametrize("bits, state_bits", CASES)
def test_free_walks_come_back_with_their_starts(bits, state_bits):
    states = walks(7, bits, state_bits, tail_biting=False)
    codes, starts = pack_walks(states, bits), pack_starts(states, bits, state_bits)
    assert starts.shape == (start_bytes(7, bits, state_bits),)
    assert start_bytes(7, bits, state_bits) == -(-7 * (state_bits - int(bits)) // 8)
    assert torch.equal(unpack_walks(codes, bits, state_bits, starts), states)


def test_bits_lie_as_documented():
    states = walks(1, 3, 8, tail_biting=True)
    codes = pack_walks(states, 3)[0].tolist()
    string = "".join(f"{byte:08b}" for byte in codes)
    assert string == "".join(f"{int(s) % 8:03b}" for s in states[0])
    assert int(string[-5:] + string[:3], 2) == int(states[0, 0])


def test_half_bits_are_two_and_three_in_turn():
    states = walks(1, 2.5, 8, tail_biting=True)
    string = "".join(f"{byte:08b}" for byte in pack_walks(states, 2.5)[0].tolist())
    pairs = zip(states[0, ::2].tolist(), states[0, 1::2].tolist(), strict=True)
    assert string == "".join(f"{even % 4:02b}{odd % 8:03b}" for even, odd in pairs)
    assert [up_to(n, 2.5) for n in range(5)] == [0, 2, 5, 7, 10]
    assert int(string[-6:] + string[:2], 2) == int(states[0, 0])
