"""Kernels in Triton compute what the reference path does: on a GPU, else in Triton's interpreter.

The interpreter cuts float32 to bfloat16 instead of rounding it, so that bfloat16 results are up to
twice as far off there.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_evopress.loading.kernels.gpu import launch
from hf_evopress.loading.kernels.gpu import layer as gpu_layer
from hf_evopress.loading.kernels.gpu import lowrank as gpu_lowrank
from hf_evopress.loading.kernels.gpu import matrix as gpu_matrix
from hf_evopress.loading.kernels.gpu.layer import MOST_TOKENS, TritonKernel, triton_kernel_of
from hf_evopress.loading.layers import CompressedLinear, prepare_layers
from hf_evopress.loading.runtimes import KERNELS, TRITON_KERNELS, check_device, chosen
from hf_evopress.methods import base, compose, trellis
from hf_evopress.methods.base import State
from hf_evopress.methods.maths.walks import BITS

from .test_kernels import CODES, MMA, SPARSE, SUMS, TRELLIS, drawn, error, make

pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = DEVICE != "cpu"
MORE = [
    "trellis:bits=3,state_bits=8,feedback=none,codebook=mcg",
    "trellis:bits=4,state_bits=8,feedback=none,codebook=3inst",
    "lowrank:rank=4,centred=true",
    "magnitude:sparsity=0.5 + lowrank:rank=4,metric=plain,factors=int8",
    "magnitude:pattern=2:4,bits=4,group_size=-1 + lowrank:rank=3,metric=plain",
    "rtn:bits=5,group_size=-1 + lowrank:rank=20,metric=plain,factors=int4",
]
SHAPES = [(17, 192), (33, 48), (16, 13)]  # the last: no whole bytes, no groups
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def no_kernel_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_layer, "_failed", {})


def kernel_at(level: str, shape: tuple[int, int]) -> tuple[TritonKernel, State]:
    own, state = make(level, shape)
    kernel = triton_kernel_of(own.level, shape)
    assert kernel is not None
    return kernel, {name: tensor.to(DEVICE) for name, tensor in state.items()}


def fitting(level: str) -> list[tuple[int, int]]:
    if "trellis" in level:
        return [(40, 72)]
    known, fits = compose.normalize(level), []
    for shape in SHAPES:
        try:
            compose.check_shape(known, shape)
        except ValueError:
            continue
        fits.append(shape)
    return fits or [(8, 384)]


def most_error(dtype: torch.dtype, dense: float) -> float:
    if dtype == torch.float32:
        return 1e-6
    return (1.05 if dtype == torch.float16 or ROUNDS else 3.5) * dense


ALL = CODES + SPARSE + SUMS + TRELLIS + MMA + MORE
CASES = [
    (level, fitting(level)[i % len(fitting(level))], DTYPES[(i + j) % 3], tokens)
    for i, level in enumerate(ALL)
    for j, tokens in enumerate((1, 3, MOST_TOKENS + 1))
]


@pytest.mark.parametrize("level, shape, dtype, tokens", CASES, ids=str)
def test_products_are_as_near_to_the_exact_ones_as_those_of_a_dense_layer(
    level: str, shape: tuple[int, int], dtype: torch.dtype, tokens: int
) -> None:
    kernel, state = kernel_at(level, shape)
    W = compose.decompress(kernel.level, state, shape, torch.float32)
    x = torch.randn(tokens, shape[1], device=DEVICE).to(dtype)
    bias = torch.randn(shape[0], device=DEVICE).to(dtype)
    fix = compose.bias_fix(kernel.level, state)
    added = bias.double() if fix is None else bias.double() + fix.double()
    exact = x.double() @ W.double().T + added
    found = kernel.linear(x, state, bias)
    dense = F.linear(x, W.to(dtype), added.to(dtype))
    assert found.dtype == dtype and found.shape == dense.shape
    turns = 1.5 if "trellis" in level else 1.0  # rotated activations are rounded as well
    terms = 1.6 if "+" in level or "lowrank" in level else 1.0  # and each term by itself
    assert error(found, exact) <= turns * terms * most_error(dtype, error(dense, exact))


@pytest.mark.parametrize("first", ["rtn:bits=3,group_size=48", "magnitude:sparsity=0.5"])
@pytest.mark.parametrize("factors", ["float16", "int8"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_low_rank_term_is_added_in_the_kernel_that_it_is_beside(
    first: str, factors: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, state = kernel_at(f"{first} + lowrank:rank=4,metric=plain,factors={factors}", (33, 48))
    x = torch.randn(tokens, 48, device=DEVICE)
    kernel.linear(x, state, None)  # the first result is compared with the reference
    names = []
    for module in (gpu_matrix, gpu_lowrank):
        real = module.launch
        monkeypatch.setattr(
            module, "launch", lambda *given, real=real: names.append(given[:2]) or real(*given)
        )
    kernel.linear(x, state, None)
    assert len(names) == 2 and names[1][0] == "lowrank" and names[1][1].startswith("product_")


@pytest.mark.parametrize("how, rank", [("raises", 5), ("is wrong", 6)])  # kernels are kept
def test_where_that_kernel_fails_the_low_rank_term_is_a_product_by_itself(
    how: str, rank: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = layer(f"rtn:bits=3,group_size=48 + lowrank:rank={rank},metric=plain", prepared=False)
    x = torch.randn(3, 96, device=DEVICE)
    wanted = made(x)  # as packed

    def fails(*given: Any) -> None:
        if how == "raises":
            raise launch.KernelError("lowrank", ValueError("no"))
        given[-1]["y"].zero_()

    monkeypatch.setattr(gpu_lowrank, "launch", fails)
    made.prepare("triton")
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.allclose(made(x), wanted, atol=1e-4)
    assert len(caplog.records) == 1 and "low-rank terms apart" in caplog.text
    use_no_reference(monkeypatch)
    assert torch.allclose(made(x), wanted, atol=1e-4)


def test_torch_func_goes_through_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer().requires_grad_(False), torch.randn(2, 3, 96, device=DEVICE)
    W = made(torch.eye(96, device=DEVICE)).T - made.bias[:, None]
    use_no_reference(monkeypatch)
    assert torch.allclose(torch.func.vmap(made)(x), made(x), atol=1e-4)
    slopes = torch.func.vmap(torch.func.grad(lambda one: made(one).square().sum()))(x)
    assert torch.allclose(slopes, 2 * made(x) @ W, atol=1e-2)


@pytest.mark.parametrize("level", CODES + SPARSE)
def test_rows_are_those_of_the_reference_to_the_bit(level: str) -> None:
    shape = fitting(level)[-1]
    kernel, state = kernel_at(level, shape)
    ids = torch.tensor([3, 0, shape[0] - 1, 3], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16 if ROUNDS else torch.float16):
        W = compose.decompress(kernel.level, state, shape, dtype)
        assert torch.equal(kernel._terms[0][0].weights(state, dtype, first=1), W[1:])
        assert torch.equal(kernel.look_up(ids, state, dtype), W[ids])


@pytest.mark.parametrize("ends", ["", ",tail_biting=false"], ids=["tail", "starts"])
@pytest.mark.parametrize("order", ["rows", "mma"])
@pytest.mark.parametrize("bits", BITS)
def test_any_walk_is_read_as_the_reference_reads_it(bits: float, order: str, ends: str) -> None:
    state_bits, shape = (16, 12, 8)[int(bits) % 3], (33, 100)
    text = f"trellis:bits={bits},order={order},state_bits={state_bits},rotation=none{ends}"
    own, state = drawn(text, shape)
    kernel = triton_kernel_of(own.level, shape)
    assert kernel is not None
    state = {name: among_nan(tensor.to(DEVICE)) for name, tensor in state.items()}
    W = compose.decompress(kernel.level, state, shape, torch.float32)
    assert torch.equal(kernel._terms[0][0].weights(state, torch.float32) * state["scale"], W)
    for tokens in (1, 3):
        x = torch.randn(tokens, shape[1], device=DEVICE)
        assert error(kernel.linear(x, state, None), x.double() @ W.double().T) < 1e-6


@pytest.mark.parametrize("level", [CODES[0], CODES[-1], SPARSE[0]])
def test_numbers_of_no_row_give_nan_and_are_not_read(level: str) -> None:
    kernel, state = kernel_at(level, fitting(level)[0])
    ids = torch.tensor([0, kernel.shape[0], -1, 2**40], device=DEVICE)
    found = kernel.look_up(ids, state, torch.float32)
    assert found.isnan().all(1).tolist() == [False, True, True, True]


@pytest.mark.parametrize("level", [CODES[7], SPARSE[0], SUMS[3], TRELLIS[1]])
def test_gradients_are_those_of_the_reference(level: str) -> None:
    kernel, state = kernel_at(level, (40, 96))
    W = compose.decompress(kernel.level, state, (40, 96), torch.float32)
    grad = torch.randn(5, 40, device=DEVICE)
    assert torch.allclose(kernel.input_gradient(grad, state), grad @ W, atol=1e-4)


def among_nan(tensor: Tensor) -> Tensor:
    """Return a copy with bytes around it that are NaN as numbers."""
    size = tensor.numel() * tensor.itemsize
    around = torch.full((size + 512,), 255, dtype=torch.uint8, device=tensor.device)
    around[256 : 256 + size] = tensor.contiguous().view(-1).view(torch.uint8)
    return around[256 : 256 + size].view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize(
    "level",
    [
        *(CODES[9], CODES[10], CODES[-1], SPARSE[0], SPARSE[3], SUMS[0], SUMS[1], TRELLIS[1]),
        *(TRELLIS[-1], MMA[0]),
    ],
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_nothing_beside_the_packed_tensors_gets_into_the_result(level: str, tokens: int) -> None:
    shape = fitting(level)[-1]
    kernel, state = kernel_at(level, shape)
    x, bias = torch.randn(tokens, shape[1], device=DEVICE), torch.randn(shape[0], device=DEVICE)
    wanted = compose.operator(kernel.level, state, bias, shape, torch.float32)(x)
    found = kernel.linear(among_nan(x), {k: among_nan(v) for k, v in state.items()}, bias)
    assert torch.allclose(found, wanted, atol=1e-4)


def layer(
    level: str = "rtn:bits=3,group_size=32", *, prepared: bool = True, **how: torch.dtype
) -> CompressedLinear:
    torch.manual_seed(0)
    shape = (24, 96)
    state = compose.compress(compose.normalize(level), torch.randn(shape), None)
    made = CompressedLinear.from_state(level, state, torch.randn(24), shape, **how).to(DEVICE)
    if not prepared:
        made.prepare("packed")
        return made
    assert made.prepare("triton") == TRITON_KERNELS
    for tokens in (1, 3):  # each kind of product is compared with the reference once
        made(torch.randn(tokens, 96, device=DEVICE, dtype=made.weight_dtype))
    return made


def use_no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise AssertionError("the weight was computed")

    monkeypatch.setattr(compose, "decompress", never)
    monkeypatch.setattr(compose, "operator", never)


def test_shapes_and_strides_of_inputs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = layer(), torch.randn(2, 3, 96, device=DEVICE)
    use_no_reference(monkeypatch)
    y = made(x)
    assert torch.allclose(made(x.transpose(0, 1)), y.transpose(0, 1), atol=1e-5)
    spread = torch.randn(2, 3, 192, device=DEVICE)[..., ::2].copy_(x)
    assert not spread.is_contiguous()
    assert torch.allclose(made(spread), y, atol=1e-5)
    assert torch.allclose(made(x[0, 0]), y[0, 0], atol=1e-5)
    assert made(x[:0]).shape == (0, 3, 24) and made(x[:, :0]).shape == (2, 0, 24)
    bias, made.bias = made.bias, torch.nn.Parameter(torch.randn(48, device=DEVICE)[::2])
    assert torch.allclose(made(x[0]) - made.bias, y[0] - bias, atol=1e-5)
    with pytest.raises(RuntimeError, match="an input of shape .2, 95. for a layer of 96 inputs"):
        made(torch.randn(2, 95, device=DEVICE))


def test_inputs_and_bias_get_their_gradient_without_the_weight(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, x = layer(), torch.randn(3, 96, device=DEVICE, requires_grad=True)
    made(torch.randn(96, 96, device=DEVICE))
    use_no_reference(monkeypatch)
    y = made(x)
    y.square().sum().backward()
    W = (made(torch.eye(96, device=DEVICE)) - made.bias).detach()  # (in, out)
    assert torch.allclose(x.grad, 2 * y.detach() @ W.T, atol=1e-3)
    assert torch.allclose(made.bias.grad, 2 * y.detach().sum(0), atol=1e-3)


def test_a_compiled_layer_is_one_graph_that_calls_the_kernel() -> None:
    made, x = layer(), torch.randn(3, 96, device=DEVICE)
    whole = torch.compile(made, fullgraph=True, backend="aot_eager")
    calls = []
    original = TritonKernel.linear
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(TritonKernel, "linear", lambda *a: calls.append(a) or original(*a))
        found = whole(x)
    assert len(calls) == 1
    assert torch.allclose(found, made(x), atol=1e-5)
    torch._dynamo.reset()


def test_the_operators_keep_the_rules_of_pytorch() -> None:
    made, x = layer(), torch.randn(3, 96, device=DEVICE, requires_grad=True)
    state = [getattr(made, name) for name in made._state_names]
    rest = (state, made.bias.detach(), made.level_text, 24, "triton")
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.evopress.linear.default, (x, *rest), test_utils=tests)


def test_models_look_up_rows_and_say_what_they_compute_with(
    caplog: pytest.LogCaptureFixture,
) -> None:
    from hf_evopress.loading.embedding import compress_embedding

    shape, level = (20, 64), "rtn:bits=4,group_size=32"
    state = compose.compress(compose.normalize(level), torch.randn(shape), None)
    model = torch.nn.Sequential(compress_embedding(torch.nn.Embedding(*shape), level, state))
    model.to(DEVICE)
    with caplog.at_level(logging.INFO, "hf_evopress"):
        assert prepare_layers(model, "triton") == {"0": TRITON_KERNELS}
    assert "runtime triton: 1 layers by Triton kernels" in caplog.messages
    ids = torch.tensor([[1, 2], [19, 0]], device=DEVICE)
    assert torch.equal(model(ids), model[0].weight[ids])


def test_a_kernel_that_fails_is_left_with_one_warning_that_names_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, x = layer(), torch.randn(3, 96, device=DEVICE)
    wanted = made(x)
    original = launch.import_module

    def fails(name: str, package: str | None = None) -> object:
        if name == ".triton_codes":
            raise OSError("Failed to find C compiler.\nPlease specify")
        return original(name, package)

    monkeypatch.setattr(launch, "import_module", fails)
    with caplog.at_level(logging.WARNING):
        found = [made(x) for _ in range(3)]
    assert all(torch.allclose(y, wanted, atol=1e-5) for y in found)
    assert caplog.messages == [
        "the Triton kernel 'codes' of hf_evopress does not work here (OSError: Failed to find C "
        "compiler.): layers that need it compute as with runtime 'packed', which is slower"
    ]
    assert made.prepare("triton") == "as packed (Triton kernel 'codes' failed)"
    assert layer("magnitude:sparsity=0.5").prepare("triton") == TRITON_KERNELS


def test_a_kernel_that_computes_something_else_is_left_at_its_first_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hf_evopress.loading.kernels.gpu.kinds import Codes

    made = layer("rtn:bits=5,group_size=32,symmetric=true")
    x = torch.randn(3, 96, device=DEVICE)
    wanted = made(x)
    made._kernel._checked.clear()
    monkeypatch.setattr(Codes, "into", lambda self, y, *args, **rest: y.zero_())
    with caplog.at_level(logging.WARNING):
        found = [made(x) for _ in range(2)]
    assert all(torch.allclose(y, wanted, atol=1e-5) for y in found)
    (message,) = caplog.messages
    assert "'codes at rtn:bits=5,group_size=32,symmetric=true'" in message
    assert "100 % off the reference" in message
    assert made.prepare("triton").startswith("as packed (Triton kernel 'codes at rtn:bits=5")


@torch.no_grad()
@pytest.mark.parametrize("value", [0.0, float("inf")])
def test_where_the_first_input_tells_nothing_another_is_tried(
    value: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hf_evopress.loading.kernels.gpu.kinds import Codes

    made = layer()
    made._kernel._checked.clear()
    x = torch.full((3, 96), value, device=DEVICE)
    wanted = made(x)
    assert made._kernel._checked == {(torch.device(DEVICE), "few")} and not caplog.messages
    made._kernel._checked.clear()
    monkeypatch.setattr(Codes, "into", lambda self, y, *args, **rest: y.zero_())
    assert torch.equal(made(x).isnan(), wanted.isnan())
    (message,) = caplog.messages
    assert "100 % off the reference" in message


@torch.no_grad()
def test_nothing_is_asked_nor_given_up_while_a_cuda_graph_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, x = layer(), torch.randn(3, 96, device=DEVICE)
    made._kernel._checked.clear()
    wanted = made(x)
    made._kernel._checked.clear()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    with monkeypatch.context() as patched:
        patched.setattr(Tensor, "__bool__", lambda self: pytest.fail("asks the device"))
        patched.setattr(Tensor, "__float__", lambda self: pytest.fail("asks the device"))
        found = made(x)
    assert torch.equal(found, wanted) and not made._kernel._checked

    def fails(name: str, package: str | None = None) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(launch, "import_module", fails)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        made(x)
    assert not gpu_layer._failed


@pytest.mark.parametrize("level", ["rtn:bits=4,group_size=32", "trellis:bits=2,state_bits=8"])
def test_the_check_of_a_first_result_holds_a_part_of_the_weight(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Largest(TorchDispatchMode):
        n_bytes = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                self.n_bytes = max(self.n_bytes, found.nbytes)
            return found

    known, shape = compose.normalize(level), (256, 512)
    state = {
        name: torch.randint(2**7, tensor.shape).to(tensor.dtype)
        for name, tensor in compose.empty(known, shape, torch.float32).items()
    }
    for module in (base, trellis):
        monkeypatch.setattr(module, "PART", 2**14)
    monkeypatch.setattr(trellis, "_PIECE", 2**14)
    compose.product(known, state, None, shape, torch.randn(4, 512))  # makes what is kept
    with Largest() as largest:
        compose.product(known, state, None, shape, torch.randn(4, 512))
    assert 0 < largest.n_bytes < 256 * 512 * 4 / 4


def test_too_little_memory_is_an_error_and_not_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    made = layer()
    monkeypatch.setattr(TritonKernel, "linear", fails)
    with pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        made(torch.randn(3, 96, device=DEVICE))


def test_the_choice_says_why_a_device_has_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    level, card = compose.normalize("rtn:bits=4,group_size=32"), torch.device("cuda:0")
    shape = (64, 64)
    launch._why_not.cache_clear()
    monkeypatch.setattr(launch, "capability", lambda device: (7, 5))
    wanted = "as packed (compute capability 7.5 is below 8.0)"
    assert chosen(level, shape, card, torch.bfloat16) == wanted
    launch._why_not.cache_clear()
    monkeypatch.setattr(launch, "capability", lambda device: (9, 0))
    assert chosen(level, shape, card, torch.bfloat16) == TRITON_KERNELS
    zero = compose.normalize("zero")
    assert chosen(zero, shape, card, torch.bfloat16) == "as packed (no kernel for zero)"
    assert chosen(level, shape, torch.device("mps"), torch.bfloat16) == (
        "as packed (no kernels for mps)"
    )
    launch._why_not.cache_clear()
    reason = "Triton cannot be imported: No module named 'triton'"
    monkeypatch.setattr(launch, "_missing", lambda: reason)
    assert chosen(level, shape, card, torch.bfloat16) == f"as packed ({reason})"
    with pytest.raises(ValueError, match="'triton' cannot be had on cuda:0: Triton cannot be impo"):
        check_device("triton", card)
    with pytest.raises(ValueError, match="'triton' cannot be had on cpu: Triton is for GPUs; take"):
        check_device("triton", torch.device("cpu"))
    assert chosen(level, shape, torch.device("cpu"), torch.bfloat16) == KERNELS
    launch._why_not.cache_clear()


@pytest.mark.slow
def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    script = Path(__file__).parent / "compile_for_gpus.py"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, script, "cuda"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    made = {" ".join(line.split()[:4]) for line in run.stdout.splitlines() if line[:4] == "cuda"}
    kinds = [(f, k) for f in ("codes", "sparse", "walks") for k in ("product", "unpack")]
    kinds += [("floats", "product"), ("sparse", "count")]
    kinds += [("viterbi", "forward"), ("viterbi", "backward")]
    kinds += [("experts", kind) for kind in ("codes", "floats", "sparse", "walks", "count")]
    assert {f"cuda 80 {family} {kind}" for family, kind in kinds} <= made
