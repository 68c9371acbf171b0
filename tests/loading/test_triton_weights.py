"""Kernels in Triton unpack the weights that the reference does, to the bit, of all codes."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.loading.kernels.gpu import lowrank as gpu_lowrank
from hf_evopress.loading.kernels.gpu.kinds import Codes
from hf_evopress.loading.kernels.gpu.layer import TritonKernel, triton_kernel_of
from hf_evopress.methods import compose
from hf_evopress.methods.base import State
from hf_evopress.methods.maths.walks import BITS

from .test_kernels import error
from .test_triton import DEVICE

pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')

BOOKS = ("weyl", "mcg", "mul1", "strata", "3inst")
WALKS = [
    (bits, order, tail) for bits in BITS for order in ("rows", "mma") for tail in ("true", "false")
]
STATE_BITS = (8, 12, 16)


def drawn(text: str, shape: tuple[int, int]) -> tuple[TritonKernel, State]:
    """Return the kernel of a level, and any packed tensors."""
    level = compose.normalize(text)
    kernel = triton_kernel_of(level, shape)
    assert kernel is not None
    state = {}
    for name, like in compose.empty(level, shape, torch.float32).items():
        is_codes = like.dtype == torch.uint8
        some = torch.randint(256, like.shape) if is_codes else torch.rand(like.shape) + 0.5
        state[name] = some.to(like.dtype).to(DEVICE)
    return kernel, state


@pytest.mark.parametrize("number", range(len(WALKS)))
def test_walks_are_read_at_every_rate_in_every_order(number: int) -> None:
    (bits, order, tail), state_bits = WALKS[number], STATE_BITS[number % 3]
    shape, book = (40, 72), BOOKS[number % len(BOOKS)]
    kernel, state = drawn(
        f"trellis:bits={bits},state_bits={state_bits},rotation=none,feedback=none,"
        f"codebook={book},order={order},tail_biting={tail}",
        shape,
    )
    W = compose.decompress(kernel.level, state, shape, torch.float32)
    ids = torch.tensor([39, 0, 17], device=DEVICE)
    found = kernel._terms[0][0].look_up(state, ids, torch.float32)
    assert torch.equal(found * state["scale"].float(), W[ids])


@pytest.mark.parametrize("bits", ["7", "8", "3,symmetric=true", "4,scales=bfloat16"])
def test_codes_of_whole_rows_are_read_without_divisions(bits: str) -> None:
    shape = (40, 128)  # eighths of the zero points end within a program
    kernel, state = drawn(f"rtn:bits={bits},group_size=32", shape)
    matrix = kernel._terms[0][0]
    assert isinstance(matrix, Codes) and matrix.constants["WHOLE"]
    W = compose.decompress(kernel.level, state, shape, torch.float32)
    columns = [0, 31, 32, 90, 127]
    for some in (columns[3:4], columns):
        x = torch.eye(128, device=DEVICE)[some]
        assert torch.equal(kernel.linear(x, state, None), W[:, some].T)
    assert torch.equal(matrix.weights(state, torch.float32, first=20), W[20:])


@pytest.mark.parametrize("bits", ["2", "3", "3,symmetric=true", "4", "5", "6", "7"])
def test_one_token_is_multiplied_by_four_codes_at_once(bits: str) -> None:
    number = int(bits[0])
    dtype = (torch.bfloat16, torch.float16)[number % 2]
    rows, n, group = (24, *((128, 32), (384, 32), (640, 128))[number % 3])  # 1, 3 and 5 parts
    kernel, state = drawn(f"rtn:bits={bits},group_size={group}", (rows, n))
    matrix = kernel._terms[0][0]
    W = compose.decompress(kernel.level, state, (rows, n), torch.float32)
    x = torch.randn(1, n + 1, device=DEVICE).to(dtype)
    for some in (x[:, :n], x[:, 1:]):  # the second does not lie in words
        found = matrix.product(state, some, torch.float32)
        exact = some.double() @ W.double().T
        assert error(found, exact) < 1e-6


def test_a_low_rank_term_is_added_to_one_token_times_four_codes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    level = "rtn:bits=3,group_size=32 + lowrank:rank=4,metric=plain"
    kernel, state = drawn(level, (24, 128))
    names, real = [], gpu_lowrank.launch
    monkeypatch.setattr(
        gpu_lowrank, "launch", lambda *given: names.append(given[1]) or real(*given)
    )
    W = compose.decompress(kernel.level, state, (24, 128), torch.float32)
    x = torch.randn(1, 128, device=DEVICE).bfloat16()
    exact = x.double() @ W.double().T
    assert error(kernel.linear(x, state, None), exact) < 2**-8
    assert names == ["product_codes"]


@pytest.mark.parametrize("rows, n", [(16, 128), (9, 320), (9, 328), (9, 20)])
def test_codes_that_do_not_lie_in_words_or_in_aligned_groups(rows: int, n: int) -> None:
    kernel, state = drawn("rtn:bits=3,group_size=-1", (rows, n))
    W = compose.decompress(kernel.level, state, (rows, n), torch.float32)
    x = torch.eye(n, device=DEVICE)[[n - 1, 0]]
    assert torch.equal(kernel.linear(x, state, None), W[:, [n - 1, 0]].T)
    assert torch.equal(kernel.linear(x[:1], state, None), W[:, [n - 1]].T)


def test_codes_at_an_odd_address_are_moved() -> None:
    kernel, state = drawn("rtn:bits=4,group_size=64", (16, 128))
    codes = state["codes"]
    room = torch.empty(codes.numel() + 1, dtype=torch.uint8, device=DEVICE)
    moved = room[1:].view(codes.shape)
    moved.copy_(codes)
    x = torch.eye(128, device=DEVICE)[:2]
    assert torch.equal(
        kernel.linear(x, {**state, "codes": moved}, None), kernel.linear(x, state, None)
    )
