"""Codes of 1 to 8 bits survive packing, and take exactly the bytes they should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_evopress.methods.maths.packing import pack, packed_bytes, unpack

BITS = range(1, 9)
shapes = st.tuples(st.lists(st.integers(0, 4), max_size=2), st.integers(1, 70))


@settings(max_examples=80, deadline=None)
@given(bits=st.integers(1, 8), shape=shapes, seed=st.integers(0, 2**31))
def test_unpack_undoes_pack_for_all_bits_and_ragged_shapes(bits, shape, seed):
    lead, n = shape
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (*lead, n), dtype=torch.uint8, generator=generator)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, bits * ((n + 7) // 8)) == (*lead, packed_bytes(n, bits))
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_code_fills_every_bit(bits):
    codes = torch.full((3, 16), 2**bits - 1, dtype=torch.uint8)
    assert (pack(codes, bits) == 255).all()


def test_the_layout_is_the_documented_one():
    """Three bits: a plane of the two high bits, then one of the low bit; w = p * n / 8."""
    codes = torch.tensor([7, 0, 2, 0, 0, 4, 0, 1], dtype=torch.uint8)
    high = [(7 >> 1) | (2 >> 1) << 2, (4 >> 1) << 4]  # values 0, 2 | 4, 6 and 1, 3 | 5, 7
    low = (1 << 0) | (1 << 7)  # values 0 and 7 are odd
    assert pack(codes, 3).tolist() == [*high, low]


@pytest.mark.parametrize("bits", BITS)
def test_meta_tensors_pack_and_unpack_to_the_right_shapes(bits):
    codes = torch.empty(5, 21, dtype=torch.uint8, device="meta")
    assert pack(codes, bits).shape == (5, packed_bytes(21, bits))
    packed = torch.empty(5, packed_bytes(21, bits), dtype=torch.uint8, device="meta")
    assert unpack(packed, bits, 21).shape == (5, 21)


@pytest.mark.parametrize("bits", BITS)
def test_an_exported_graph_unpacks_the_same_codes(bits):
    class Unpack(torch.nn.Module):
        def forward(self, packed):
            return unpack(packed, bits, 40)

    codes = torch.randint(0, 2**bits, (6, 40), dtype=torch.uint8)
    packed = pack(codes, bits)
    program = torch.export.export(Unpack(), (packed,))
    assert torch.equal(program.module()(packed), codes)
    operators = {str(node.target) for node in program.graph.nodes}
    assert not any("shift" in name for name in operators), "ONNX has no shift of tensors"


@pytest.mark.parametrize("bits", [0, 9, 16])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=f"1 to 8 bits, got bits={bits}"):
        packed_bytes(8, bits)


def test_codes_of_another_dtype_are_refused():
    with pytest.raises(TypeError, match="uint8 codes"):
        pack(torch.zeros(2, 8), 4)


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="16 codes of 3 bits take 6 bytes, got 5"):
        unpack(torch.zeros(2, 5, dtype=torch.uint8), 3, 16)
