"""Activations are rotated in one launch of Triton as the reference rotates them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_evopress.loading.kernels.gpu import matrix as gpu_matrix
from hf_evopress.loading.kernels.gpu import turns as gpu_turns
from hf_evopress.loading.kernels.gpu.turns import turned
from hf_evopress.methods import compose
from hf_evopress.methods.maths.rotation import rotate, unrotate

from .test_triton import DEVICE, kernel_at

pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')

SIZES = (1, 6, 13, 48, 224, 576, 2048, 4096, 14336)
SCALES = {"none": None, "one": (1,), "all": ("n",), "each": (5, 1), "each of all": (5, "n")}


def reference(x: Tensor, seed: int, block: int, *, is_back: bool) -> Tensor:
    return (unrotate if is_back else rotate)(x.T.contiguous(), seed, block).T


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("most_mixed", [0, 10**6])  # a product of matrices, and in the kernel
def test_rotations_are_the_references(
    n: int, most_mixed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_turns, "MOST_MIXED", most_mixed)
    x = torch.randn(5, n, device=DEVICE)
    for is_back in (False, True):
        found = turned(x, 3, 0, torch.float32, is_back=is_back)
        wanted = reference(x, 3, 0, is_back=is_back)
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
        if n & (n - 1) == 0:  # nothing is mixed: the same sums in the same order
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("block, n", [(16, 320), (64, 192), (128, 4224)])
def test_blocks_are_rotated_each_for_itself(block: int, n: int) -> None:
    x = torch.randn(3, n, device=DEVICE)
    for is_back in (False, True):
        found = turned(x, 2, block, torch.float32, is_back=is_back)
        assert torch.equal(found, reference(x, 2, block, is_back=is_back))


@pytest.mark.parametrize("n", [96, 128])
@pytest.mark.parametrize("kind", SCALES)
@pytest.mark.parametrize("most", [2**15, 16])  # with 16, by the operations of PyTorch
def test_scales_are_applied_before_and_after(
    n: int, kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_turns, "MOST", most)
    shape = SCALES[kind]
    scales = shape and torch.rand([n if s == "n" else s for s in shape], device=DEVICE) + 0.5
    scales = None if scales is None else scales.half()
    factor = 1.0 if scales is None else scales.float()
    x, start = torch.randn(5, n, device=DEVICE), torch.randn(5, n, device=DEVICE)
    there = turned(x, 0, 0, torch.float32, is_back=False, scales=scales)
    near = {"rtol": 0, "atol": 2e-5}
    torch.testing.assert_close(there, reference(x * factor, 0, 0, is_back=False), **near)
    for bias in (None, torch.randn(n, device=DEVICE), torch.randn(5, n, device=DEVICE)):
        back = turned(x, 0, 0, torch.float32, is_back=True, scales=scales, start=start, bias=bias)
        wanted = reference(x, 0, 0, is_back=True) * factor + start
        torch.testing.assert_close(back, wanted if bias is None else wanted + bias, **near)


def test_dtypes_slices_and_no_tokens() -> None:
    x = torch.randn(6, 128, device=DEVICE).half()
    part = x[:, 32:96]
    found = turned(part, 0, 0, torch.float16, is_back=False)
    assert torch.equal(found, reference(part.float(), 0, 0, is_back=False).half())
    assert turned(x[:0], 0, 0, torch.bfloat16, is_back=True).shape == (0, 128)


@pytest.mark.parametrize("tokens, n", [(70000, 64), (3, 14336), (9, 4096)])
def test_a_grid_has_no_more_than_a_card_takes(
    tokens: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(gpu_turns, "launch", lambda *given: grids.append(given[2]))
    turned(torch.empty(tokens, n, device=DEVICE), 0, 0, torch.float32, is_back=True)
    assert grids[0][0] == tokens and all(size <= 65535 for size in grids[0][1:])


def test_sides_that_no_program_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_turns, "MOST", 4)
    kernel, state = kernel_at("trellis:bits=3,state_bits=8,feedback=none", (40, 72))
    W = compose.decompress(kernel.level, state, (40, 72), torch.float32)
    x = torch.randn(3, 72, device=DEVICE)
    torch.testing.assert_close(kernel.linear(x, state, None), x @ W.T, rtol=0, atol=1e-4)


class Operations(TorchDispatchMode):
    """The operations of PyTorch that compute something."""

    FREE = ("empty", "new_empty", "view", "detach", "alias", "slice", "unsqueeze", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if not any(name.startswith(free) for free in self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "level, launches",
    [
        ("trellis:bits=3,state_bits=8,feedback=none", ["turn", "product", "turn"]),
        (
            "trellis:bits=3,state_bits=8,feedback=none,scales=channels + lowrank:rank=4",
            ["product", "product", "turn", "product", "turn"],
        ),
    ],
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_layer_of_trellis_codes_is_launches_and_nothing_else(
    level: str, launches: list[str], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, state = kernel_at(level, (40, 72))
    x, bias = torch.randn(tokens, 72, device=DEVICE).half(), torch.randn(40, device=DEVICE).half()
    kernel.linear(x, state, bias)  # the first result is compared with the reference
    names: list[str] = []
    for module in (gpu_matrix, gpu_turns):
        monkeypatch.setattr(module, "launch", lambda *given: names.append(given[1]))
    with Operations() as operations:
        kernel.linear(x, state, bias)
    assert names == launches and operations.names == []
