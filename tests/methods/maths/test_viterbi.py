"""Viterbi's algorithm: the best walk there is, and the same one on every device."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from hf_evopress.methods.maths import viterbi, viterbi_gpu
from hf_evopress.methods.maths.codebook import codebook
from hf_evopress.methods.maths.trellis_rounding import GAIN
from hf_evopress.methods.maths.viterbi import encode, nearest_walks, nearest_walks_torch
from hf_evopress.methods.maths.walks import own_bits

CASES = [(1, 8), (2, 8), (3, 10), (4, 9), (5, 5), (2, 4), (1.5, 7), (2.5, 8), (3.5, 4), (4.5, 6)]


def numbers(n, length=256, seed=0):
    return torch.randn(n, length, generator=torch.Generator().manual_seed(seed))


def cost(x, values, states):
    return (x - values[states.long()]).square().sum(1)


def is_walk(states, bits, state_bits):
    own = own_bits(bits)
    return all(
        torch.equal(states[:, i] >> k, states[:, i - 1] % 2 ** (state_bits - k))
        for i in range(1, states.shape[1])
        for k in [own[i % 2]]
    )


@pytest.mark.parametrize("bits, state_bits", CASES)
@pytest.mark.parametrize("n", [1, 8, 19])
def test_vectors_and_tensor_operations_find_the_same_walks(bits, state_bits, n):
    x, values = numbers(n), codebook("strata", state_bits, bits)
    free = nearest_walks(x, values, bits)
    assert torch.equal(free, nearest_walks_torch(x, values, bits))
    past = (free[:, 99] % 2 ** (state_bits - int(bits))).int()
    bound = nearest_walks(x, values, bits, past)
    assert torch.equal(bound, nearest_walks_torch(x, values, bits, past))


def test_no_walk_is_nearer():
    """All walks of six weights over 2^4 states at 1 bit, tried one by one."""
    x, values = numbers(8, 6), codebook("gauss", 4, 1)
    every = []
    for first, *new in product(range(16), *[range(2)] * 5):
        states = [first]
        for bit in new:
            states.append((states[-1] << 1 | bit) % 16)
        every.append(states)
    walks = torch.tensor(every)
    least = (x.unsqueeze(1) - values[walks]).square().sum(2).amin(1)
    assert torch.allclose(cost(x, values, nearest_walks(x, values, 1)), least, rtol=1e-5)


def test_no_walk_of_half_bits_is_nearer():
    """All walks of six weights over 2^4 states at 1.5 bits, tried one by one."""
    x, values = numbers(8, 6), codebook("gauss", 4, 1)
    every = []
    for first, *new in product(range(16), *[range(4), range(2)] * 2, range(4)):
        states = [first]
        for i, bits in enumerate(new):
            states.append((states[-1] << (2 - i % 2) | bits) % 16)
        every.append(states)
    walks = torch.tensor(every)
    least = (x.unsqueeze(1) - values[walks]).square().sum(2).amin(1)
    assert torch.allclose(cost(x, values, nearest_walks(x, values, 1.5)), least, rtol=1e-5)


@pytest.mark.parametrize("bits, state_bits", CASES)
def test_what_comes_back_is_a_walk_and_bites_its_tail_if_asked(bits, state_bits):
    x, values = numbers(9), codebook("strata", state_bits, bits)
    for tail_biting in (False, True):
        states = encode(x, values, bits, tail_biting=tail_biting)
        assert states.shape == (9, 256) and states.dtype == torch.int32
        assert is_walk(states, bits, state_bits)
        if tail_biting:
            k = int(bits)
            assert torch.equal(states[:, 0] >> k, states[:, -1] % 2 ** (state_bits - k))


def test_biting_its_tail_costs_less_than_the_bits_of_a_start_are_worth():
    x, values = numbers(64), codebook("strata", 10, 2)
    free, tied = (encode(x, values, 2, tail_biting=t) for t in (False, True))
    ratio = float(cost(x, values, tied).sum() / cost(x, values, free).sum())
    assert 1.0 <= ratio < 4 ** ((10 - 2) / 256)  # 1.044: what 8 bits per walk bring elsewhere


# Squares left of N(0, 1), free walks. The random order's are the published recipe's figures.
@pytest.mark.parametrize(
    "name, bits, state_bits, expected",
    [
        ("gauss", 2, 8, 0.0860),
        ("gauss", 2, 10, 0.0765),
        ("gauss", 3, 8, 0.0260),
        ("strata", 2, 8, 0.0767),
        ("strata", 3, 8, 0.0211),
        ("strata", 2, 10, 0.0714),
        ("strata", 2.5, 10, 0.0384),
        ("weyl", 2.5, 10, 0.0376),
        ("weyl", 1.5, 10, 0.1480),
        ("weyl", 3.5, 10, 0.0098),
    ],
)
def test_gaussian_numbers_are_coded_as_well_as_measured(name, bits, state_bits, expected):
    x, gain = numbers(128), GAIN[bits]
    values = gain * codebook(name, state_bits, bits)
    error = float(cost(x, values, encode(x, values, bits, tail_biting=False)).sum() / x.numel())
    assert error == pytest.approx(expected, rel=0.03)
    assert error > 4.0**-bits  # the rate-distortion bound


def test_the_work_is_shared_by_threads():
    x, values = numbers(40), codebook("strata", 6, 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = nearest_walks(x, values, 2)
        torch.set_num_threads(3)
        assert torch.equal(nearest_walks(x, values, 2), alone)
    finally:
        torch.set_num_threads(before)


def test_tensor_operations_go_in_batches_that_fit_memory(monkeypatch):
    x, values = numbers(11), codebook("strata", 6, 2)
    whole = nearest_walks_torch(x, values, 2)
    monkeypatch.setattr("hf_evopress.methods.maths.viterbi.MAX_BYTES", 20000)
    assert torch.equal(nearest_walks_torch(x, values, 2), whole)


def test_other_devices_find_the_same_walks(device):
    x, values = numbers(5), codebook("strata", 6, 2)
    found = encode(x.to(device), values.to(device), 2, tail_biting=True)
    assert found.device.type == device.type
    assert torch.equal(found.cpu(), encode(x, values, 2, tail_biting=True))


@pytest.mark.parametrize(
    "bits, state_bits", [(1, 6), (2, 6), (3, 7), (5, 5), (2, 4), (1.5, 5), (2.5, 6), (3.5, 4)]
)
def test_kernels_in_triton_find_the_same_walks(bits, state_bits):
    pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, values = numbers(5, 40), codebook("strata", state_bits, bits)
    there = x.to(device), values.to(device), bits
    free = nearest_walks(x, values, bits)
    found = viterbi_gpu.nearest_walks_triton(*there, None, batch=3)
    assert torch.equal(found.cpu(), free)
    past = (free[:, 19] % 2 ** (state_bits - int(bits))).int()
    bound = viterbi_gpu.nearest_walks_triton(*there, past.to(device), batch=3)
    assert torch.equal(bound.cpu(), nearest_walks(x, values, bits, past))


@pytest.mark.parametrize("fault", ["an error", "other walks", "memory", None])
def test_walks_of_a_kernel_that_fails_are_found_otherwise(fault, monkeypatch, caplog):
    x, values = numbers(6, 40), codebook("strata", 6, 2)
    wanted = nearest_walks_torch(x, values, 2)

    def run(x, values, bits, past, *, batch):
        if fault == "an error":
            raise OSError("no such driver")
        if fault == "memory":
            raise torch.OutOfMemoryError("out of memory")
        return torch.zeros_like(wanted) if fault else wanted

    monkeypatch.setattr(viterbi_gpu, "_failed", {})
    monkeypatch.setattr(viterbi_gpu, "_checked", set())
    monkeypatch.setattr(viterbi_gpu, "nearest_walks_triton", run)
    if fault == "memory":
        with pytest.raises(torch.OutOfMemoryError):
            viterbi._by_triton(x, values, 2, None)
        return
    found = viterbi._by_triton(x, values, 2, None)
    kind = viterbi_gpu.kind_of(x, values, 2, None)
    assert (found is None) == bool(fault) == (kind in viterbi_gpu._failed)
    assert ("walks of 2^6 states are looked for by tensor" in caplog.text) == bool(fault)
    assert fault or (torch.equal(found, wanted) and viterbi_gpu.has_checked(kind))


def test_nothing_to_code_gives_nothing():
    values = codebook("strata", 6, 2)
    assert nearest_walks(torch.empty(0, 256), values, 2).shape == (0, 256)
    assert nearest_walks_torch(torch.empty(0, 256), values, 2).shape == (0, 256)
