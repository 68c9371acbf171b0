"""CPU kernels compute what the reference path does, nearer to the exact product, at any level."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hf_evopress.loading.kernels import layer as layer_module
from hf_evopress.loading.kernels import operators, terms
from hf_evopress.loading.kernels.cpu import compiled, dots, places, walks, weyl
from hf_evopress.loading.kernels.layer import MOST_TOKENS, SLICE, Kernel, kernel_of
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.loading.runtimes import KERNELS
from hf_evopress.methods import compose
from hf_evopress.methods.base import State
from hf_evopress.methods.maths.codebook import codebook, weyl_half, weyl_multiplier
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.methods.maths.walks import unpack_walks, walk_bytes

CODES = [
    *(f"rtn:bits={bits},group_size=64" for bits in (2, 3, 4, 5, 6, 7, 8)),
    "rtn:bits=4,group_size=32",
    "rtn:bits=3,group_size=128",
    "rtn:bits=3,group_size=-1,symmetric=true",
    "rtn:bits=4,group_size=24,scales=bfloat16",
    "rtn:bits=6,group_size=8,symmetric=true",
    "rows:bits=3,top_bits=6,top=0.2,group_size=48",
]
SPARSE = [
    "magnitude:sparsity=0.5",
    "magnitude:pattern=4:8,values=bfloat16",
    "magnitude:pattern=2:4,bits=4,group_size=32",
    "magnitude:sparsity=0.7,bits=3,group_size=96",
]
TRELLIS = [
    "trellis:bits=1,state_bits=6,feedback=none",
    "trellis:bits=2,state_bits=8,feedback=none,codebook=mul1",
    "trellis:bits=3,state_bits=10,feedback=none,rotation=none",
    "trellis:bits=5,state_bits=9,feedback=none,seed=3",
    "trellis:bits=7,state_bits=7,feedback=none",
    "trellis:bits=3,state_bits=7,feedback=none,scales=channels",
    "trellis:bits=2,state_bits=6,feedback=none + lowrank:rank=2,metric=plain",
    "trellis:bits=8,state_bits=8,feedback=none",
    *(f"trellis:bits={k},feedback=none,tail_biting=false,state_bits={k + 4}" for k in (1, 3, 8)),
    "trellis:bits=3,state_bits=9,feedback=none,codebook=weyl",
    "trellis:bits=4,state_bits=4,feedback=none,tail_biting=false,order=mma",
    "trellis:bits=5,state_bits=8,feedback=none,tail_biting=false,order=mma,scales=channels",
    "trellis:bits=2.5,state_bits=9,feedback=none,codebook=weyl,scales=channels",
    "trellis:bits=1.5,state_bits=7,feedback=none",
    "trellis:bits=3.5,state_bits=9,feedback=none,tail_biting=false",
    "trellis:bits=2.5,state_bits=8,feedback=none,tail_biting=false,order=mma",
    "trellis:bits=4.5,state_bits=10,feedback=none,tail_biting=false,codebook=weyl",
]
MMA = [
    f"trellis:bits={k},state_bits=8,feedback=none,order=mma,codebook=mul1"
    for k in (1, 2, 2.5, 3, 8)
]
SUMS = [
    "lowrank:rank=8,metric=plain",
    "lowrank:rank=7,metric=plain,factors=int8",
    "lowrank:rank=5,metric=plain,factors=int4",
    "rtn:bits=3,group_size=32 + lowrank:rank=5,metric=plain",
    "rtn:bits=3,group_size=32 + magnitude:sparsity=0.95",
    "rtn:bits=2,group_size=32 + rtn:bits=2,group_size=64 + lowrank:rank=3,metric=plain",
]
SHAPES = [(40, 384), (17, 192), (33, 48), (16, 13)]  # the last: no whole bytes, no groups
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(level: str, shape: tuple[int, int]) -> tuple[Kernel, State]:
    """Return kernel and packed tensors of a random weight; skip what the level does not fit."""
    known = compose.normalize(level)
    try:
        compose.check_shape(known, shape)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    W = torch.randn(shape) + 0.3 * torch.randn(shape[0], 1)  # zero points off the middle
    X = torch.randn(2 * shape[1], shape[1])
    stats = Stats(X.T @ X / len(X), None, X.mean(0), len(X))
    kernel = kernel_of(known, shape)
    assert kernel is not None
    return kernel, compose.compress(known, W, stats)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", CODES + SPARSE + SUMS)
def test_products_are_nearer_to_the_exact_ones_than_those_of_a_dense_layer(
    level: str, shape: tuple[int, int]
) -> None:
    kernel, state = make(level, shape)
    W = compose.decompress(kernel.level, state, shape, torch.float32)
    for dtype in DTYPES:
        for tokens in (1, 3, MOST_TOKENS):
            x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
            exact = x.double() @ W.double().T + bias.double()
            found = kernel.linear(x, state, bias)
            dense = torch.nn.functional.linear(x, W.to(dtype), bias)
            assert found.dtype == dtype and found.shape == dense.shape
            # float32: the order of sums; 16 bits: only the result is rounded, and not the weight,
            # unless that is 16 bits itself: then a dense layer differs by the order of sums only
            most = 1e-6 if dtype == torch.float32 else 1.001 * error(dense, exact)
            assert error(found, exact) <= most


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("level", CODES + SPARSE)
def test_rows_are_those_of_the_reference_to_the_bit(level: str, shape: tuple[int, int]) -> None:
    kernel, state = make(level, shape)
    ids = torch.tensor([3, 0, 15, 3])
    for dtype in (torch.float32, torch.bfloat16):
        W = compose.decompress(kernel.level, state, shape, dtype)
        assert torch.equal(kernel._terms[0][0].weights(state, dtype), W)
        assert torch.equal(kernel.look_up(ids, state, dtype), W[ids])


@pytest.mark.parametrize("level", CODES[:3] + SPARSE + SUMS)
def test_prompts_and_gradients_are_those_of_the_reference(level: str) -> None:
    kernel, state = make(level, (40, 384))
    W = compose.decompress(kernel.level, state, (40, 384), torch.float32)
    x, grad = torch.randn(MOST_TOKENS + 1, 384), torch.randn(5, 40)
    assert torch.allclose(kernel.linear(x, state, None), x @ W.T, atol=1e-4)
    assert torch.allclose(kernel.input_gradient(grad, state), grad @ W, atol=1e-4)


@pytest.mark.parametrize("limit", [0, 10**6])
@pytest.mark.parametrize("level", ["rtn:bits=5,group_size=64", CODES[-1]])
def test_long_prompts_are_multiplied_by_tiles_or_in_slices(
    level: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_module, "most_by_integers", lambda: limit)
    kernel, state = make(level, (40, 384))
    W = compose.decompress(kernel.level, state, (40, 384), torch.float32)
    x, bias = torch.randn(2 * SLICE + 3, 384).bfloat16(), torch.randn(40).bfloat16()
    exact = x.double() @ W.double().T + bias.double()
    dense = torch.nn.functional.linear(x, W.bfloat16(), bias)
    found = kernel.linear(x, state, bias)
    assert found.shape == dense.shape and error(found, exact) <= 1.01 * error(dense, exact)


def test_integers_are_kept_for_few_tokens_where_bfloat16_is_multiplied_fast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    most = {}
    for feature in ("avx2", "avx512bf16", "amx-bf16"):
        monkeypatch.setattr(compiled, "has_feature", lambda name, known=feature: name == known)
        most[feature] = compiled.most_by_integers.__wrapped__()
    assert most["amx-bf16"] <= most["avx512bf16"] < 10**6 < most["avx2"]


@pytest.mark.parametrize("shape", [(48, 96), (40, 72)], ids=str)
@pytest.mark.parametrize("level", TRELLIS + MMA)
def test_trellis_codes_are_multiplied_in_the_rotated_basis(
    level: str, shape: tuple[int, int]
) -> None:
    kernel, state = make(level, shape)
    W = compose.decompress(kernel.level, state, shape, torch.float32)
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 2**-7)):
        for tokens in (1, 5, MOST_TOKENS + 1):
            x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
            exact = x.double() @ W.double().T + bias.double()
            assert error(kernel.linear(x, state, bias), exact) < most
    grad, ids = torch.randn(5, shape[0]), torch.tensor([3, 0, 15, 3])
    assert torch.allclose(kernel.input_gradient(grad, state), grad @ W, atol=1e-4)
    assert torch.allclose(kernel.look_up(ids, state, torch.float32), W[ids], atol=1e-5)


@pytest.mark.parametrize("ends", ["", ",tail_biting=false"], ids=["tail", "starts"])
@pytest.mark.parametrize("order", ["rows", "mma"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_any_walk_is_read_as_the_reference_reads_it(bits: int, order: str, ends: str) -> None:
    for settings, shape in (
        ("state_bits=16,rotation=none", (48, 384)),
        ("state_bits=8,rotation=none,codebook=gauss", (17, 13)),
        ("state_bits=12,seed=1", (33, 100)),  # rotations of 25 parts of 4
        ("state_bits=11,rotation=32", (96, 64)),
        ("state_bits=16,rotation=none,codebook=weyl", (33, 100)),
        ("state_bits=8,codebook=weyl", (48, 384)),
    ):
        kernel, state = drawn(f"trellis:bits={bits},order={order},{settings}{ends}", shape)
        W = compose.decompress(kernel.level, state, shape, torch.float32)
        for tokens in (1, 3, MOST_TOKENS, MOST_TOKENS + 1):
            x = torch.randn(tokens, shape[1])
            given = x.clone()
            found = kernel.linear(x, state, None)
            assert error(found, x.double() @ W.double().T) < 1e-6
            assert torch.equal(x, given)
        stored = kernel._terms[0][0]  # whole strips and rows alone are read by different code
        for dtype in (torch.float32, torch.bfloat16):
            rows = stored.look_up(state, torch.arange(shape[0]), dtype)
            for first in (0, 16, 5):
                assert torch.equal(stored.weights(state, dtype, first=first), rows[first:])


def drawn(level: str, shape: tuple[int, int]) -> tuple[Kernel, State]:
    """Return the kernel of a trellis level, and packed tensors of random bytes."""
    torch.manual_seed(shape[1])
    known = compose.normalize(level)
    sizes = compose.empty(known, shape, torch.float32)
    state = {
        name: torch.randint(256, tensor.shape, dtype=torch.uint8)
        if tensor.dtype == torch.uint8
        else torch.rand(tensor.shape).to(tensor.dtype)
        for name, tensor in sizes.items()
    }
    kernel = kernel_of(known, shape)
    assert kernel is not None
    return kernel, state


def test_an_outlier_among_the_inputs_does_not_drown_the_others() -> None:
    kernel, state = make("rtn:bits=4,group_size=64", (40, 384))
    W = compose.decompress(kernel.level, state, (40, 384), torch.float32)
    x = torch.randn(2, 384).bfloat16()
    x[0, 3] = 3000.0
    without = x.clone()
    without[0, 3] = 0.0
    one = kernel.linear(x, state, None).double() - 3000.0 * W[:, 3].double()
    exact = x.double() @ W.double().T
    assert error(kernel.linear(x, state, None), exact) < 2**-8
    small = W[:, 3].abs() < W.abs().max() / 16  # rows where the others decide
    found, wanted = one[0][small], (without.double() @ W.double().T)[0][small]
    rounding = 2**-8 * exact[0][small].abs()
    assert bool(((found - wanted).abs() <= rounding).all())


@pytest.mark.parametrize("level", ["rtn:bits=4,group_size=32", "rtn:bits=8,group_size=192"])
def test_each_token_has_its_own_outliers(level: str) -> None:
    kernel, state = make(level, (39, 384))
    W = compose.decompress(kernel.level, state, (39, 384), torch.float32)
    x = torch.randn(7, 384).bfloat16()
    for token, place in ((0, 0), (0, 200), (3, 383), (4, 1), (6, 64)):
        x[token, place] = 500.0
    x[5] = 0.0
    exact = x.double() @ W.double().T
    for some in (x, x[:1], x[3:5]):
        found = kernel.linear(some, state, None).double()
        for mine, wanted in zip(found, some.double() @ W.double().T, strict=True):
            assert error(mine, wanted) < 2**-8 if wanted.any() else not mine.any()
    assert error(kernel.linear(x, state, None), exact) < 2**-8


def test_infinite_inputs_and_nan_stay_where_they_are() -> None:
    kernel, state = make("rtn:bits=4,group_size=64", (40, 384))
    x = torch.randn(3, 384).bfloat16()
    x[0, 5], x[1, 7] = float("nan"), float("inf")
    found = kernel.linear(x, state, None)
    assert bool(found[0].isnan().all()) and not bool(found[1].isfinite().any())
    assert bool(found[2].isfinite().all())


def layer(level: str = "rtn:bits=3,group_size=32", **how: Any) -> CompressedLinear:
    torch.manual_seed(0)
    shape = (48, 96)
    state = compose.compress(compose.normalize(level), torch.randn(shape), None)
    made = CompressedLinear.from_state(level, state, torch.randn(48), shape, **how)
    assert made.prepare("auto") == KERNELS
    return made


@pytest.fixture
def reference_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("the weight was computed")

    monkeypatch.setattr(compose, "decompress", never)
    monkeypatch.setattr(compose, "operator", never)


@pytest.mark.usefixtures("reference_is_not_used")
def test_shapes_and_strides_of_inputs_are_kept() -> None:
    made, x = layer(), torch.randn(2, 3, 96)
    y = made(x)
    assert torch.allclose(made(x.transpose(0, 1)), y.transpose(0, 1))
    assert torch.allclose(made(torch.randn(2, 3, 192)[..., ::2].copy_(x)), y)
    assert torch.allclose(made(x[0, 0]), y[0, 0])
    assert made(x[:0]).shape == (0, 3, 48) and made(x[:, :0]).shape == (2, 0, 48)
    with pytest.raises(RuntimeError, match="an input of shape .2, 95. for a layer of 96 inputs"):
        made(torch.randn(2, 95))
    assert not operators._failed


def test_what_is_not_for_kernels_goes_the_reference_way() -> None:
    made, x = layer(), torch.randn(3, 96)
    wanted = made(x)
    made.bias = None
    assert made(x.double()).dtype == torch.float64
    made = layer()
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x).dtype == torch.bfloat16
    made.scales.requires_grad_()
    made(x).sum().backward()
    assert made.scales.grad is not None
    made.scales.requires_grad_(False)
    assert torch.equal(made(x), wanted)


def test_changed_packed_tensors_are_used_at_once() -> None:
    made, x = layer(), torch.randn(3, 96)
    before = made(x) - made.bias
    with torch.no_grad():
        made.scales.mul_(2)
    assert torch.allclose(made(x) - made.bias, 2 * before, atol=1e-5)


def test_copies_compute_the_same() -> None:
    made, x = layer(), torch.randn(3, 96)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(x), made(x))


@pytest.mark.usefixtures("reference_is_not_used")
@pytest.mark.parametrize("tokens", [3, 30])
def test_inputs_and_bias_get_their_gradient_without_the_weight(tokens: int) -> None:
    made, x = layer(), torch.randn(tokens, 96, requires_grad=True)
    y = made(x)
    y.square().sum().backward()
    W = torch.cat([made(row[None]) - made.bias for row in torch.eye(96)]).detach()  # (in, out)
    assert torch.allclose(x.grad, 2 * y.detach() @ W.T, atol=1e-3)
    assert torch.allclose(made.bias.grad, 2 * y.detach().sum(0), atol=1e-3)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    made, x = layer(), torch.randn(3, 96)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    made(one).square().sum().backward()
    checkpoint(made, two, use_reentrant=False).square().sum().backward()
    assert torch.equal(one.grad, two.grad)


def test_the_operators_keep_the_rules_of_pytorch() -> None:
    made, x = layer(), torch.randn(3, 96, requires_grad=True)
    state = [getattr(made, name) for name in made._state_names]
    rest = (state, made.bias.detach(), made.level_text, 48, "auto")
    torch.library.opcheck(torch.ops.evopress.linear.default, (x, *rest))
    ids = torch.tensor([[1, 2], [40, 0]])
    look_up = (ids, state, made.level_text, [48, 96], torch.float32, "auto")
    torch.library.opcheck(torch.ops.evopress.look_up.default, look_up)


@pytest.mark.parametrize("level", ["trellis:bits=3,state_bits=10", "lowrank:rank=16", CODES[0]])
def test_the_operator_answers_in_the_layout_that_compiled_code_was_told(level: str) -> None:
    shape = (64, 128)
    kernel, state = make(level, shape)
    tensors = [state[name] for name in sorted(state)]
    for tokens in (1, MOST_TOKENS + 4):
        x = torch.randn(tokens, shape[1])
        y = torch.ops.evopress.linear(x, tensors, None, kernel.text, shape[0], "auto")
        assert y.stride() == (shape[0], 1)


@pytest.mark.parametrize("level", ["rtn:bits=3,group_size=32", "zero"])
def test_a_compiled_layer_is_one_graph(level: str) -> None:
    torch.manual_seed(0)
    state = compose.compress(compose.normalize(level), torch.randn(48, 96), None)
    made = CompressedLinear.from_state(level, state, torch.randn(48), (48, 96))
    made.prepare("auto")
    whole = torch.compile(made, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96)
    with torch.no_grad():
        assert torch.equal(whole(x), made(x))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    whole(one).square().sum().backward()
    made(two).square().sum().backward()
    if level != "zero":
        assert torch.allclose(one.grad, two.grad, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("level", ["rtn:bits=3,group_size=32", "gguf:type=q4_0"])
def test_a_compiled_layer_under_autocast_gives_what_it_gives_uncompiled(level: str) -> None:
    torch.manual_seed(0)
    stats = Stats(torch.eye(96), None, None, 96)
    state = compose.compress(compose.normalize(level), torch.randn(48, 96), stats)
    made = CompressedLinear.from_state(level, state, torch.randn(48), (48, 96))
    made.prepare("auto")
    whole, x = torch.compile(made, fullgraph=True, backend="aot_eager"), torch.randn(3, 96)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = whole(x.requires_grad_()), made(x)
    assert found.dtype == wanted.dtype == torch.bfloat16
    assert torch.allclose(found, wanted, atol=0.05)
    found.float().sum().backward()
    assert x.grad.dtype == torch.float32
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_graphs_for_others_hold_plain_operations() -> None:
    made, x = layer(), torch.randn(3, 96)
    traced = torch.jit.trace(made, x, check_trace=False)
    other = torch.randn(3, 96)
    assert torch.allclose(traced(other), made(other), atol=1e-5)
    program = torch.export.export(made, (x,))
    assert not [n for n in program.graph.nodes if "evopress" in str(n.target)]


def test_kernels_that_fail_are_left_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made, x = layer(), torch.randn(3, 96)
    wanted = made(x)

    def fails(*args: Any) -> None:
        raise OSError("no such instruction")

    monkeypatch.setattr(operators, "_failed", [])
    monkeypatch.setattr(Kernel, "linear", fails)
    with caplog.at_level("WARNING"):
        found = [made(x) for _ in range(3)]
    assert all(torch.allclose(y, wanted, atol=1e-5) for y in found)
    assert [r.getMessage() for r in caplog.records] == [
        "the CPU kernels of hf_evopress do not work here (OSError: no such instruction): layers "
        "compute as with runtime 'packed', which is slower"
    ]


@pytest.mark.parametrize(
    "error, has_worked, is_theirs",
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), False, False),
        (MemoryError(), False, False),
        (ValueError("something odd"), False, True),
        (ValueError("something odd"), True, False),
        (OSError("no such instruction"), True, True),
    ],
    ids=str,
)
def test_errors_that_are_not_the_kernels_are_raised_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch, error: Exception, has_worked: bool, is_theirs: bool
) -> None:
    made, x = layer(), torch.randn(3, 96)

    def fails(*args: Any) -> None:
        raise error

    monkeypatch.setattr(operators, "_failed", [])
    monkeypatch.setattr(operators, "_worked", {made.level_text} if has_worked else set())
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Kernel, "linear", fails)
        if is_theirs:
            assert made(x).shape == (3, 48)
        else:
            with pytest.raises(type(error)):
                made(x)
    assert bool(operators._failed) == is_theirs
    choice = made.prepare("auto")
    name = type(error).__name__
    assert choice == (f"as packed (the CPU kernels failed: {name})" if is_theirs else KERNELS)


@pytest.mark.parametrize("runtime", ["packed", "auto", "expanded"])
def test_inputs_that_no_layer_takes_are_refused_and_change_nothing(runtime: str) -> None:
    made = layer()
    made.prepare(runtime)
    with pytest.raises(RuntimeError, match="torch.int32 for a layer that computes in floating"):
        made(torch.randint(-9, 9, (3, 96), dtype=torch.int32))
    with pytest.raises(RuntimeError):
        made(torch.tensor(1.0))
    dense = made.dequantize()
    x = torch.randn(3, 96)
    with torch.no_grad():
        assert torch.allclose(made(x.to_sparse()), dense(x), atol=1e-5)
    assert not operators._failed


def test_a_processor_without_avx2_takes_the_float32_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "vector_bytes", lambda: 0)
    assert compiled.chunk_of(64) == 0


@pytest.mark.parametrize("told", ["+avx2,+fma,-avx512bw", "+sse2"])
def test_kernels_are_for_the_processor_that_numba_compiles_for(
    told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_CPU_FEATURES", told)
    is_x86 = compiled.has_feature.__wrapped__("sse2") or "sse2" not in told
    assert is_x86
    assert compiled.has_feature.__wrapped__("avx2") == ("+avx2" in told)
    assert not compiled.has_feature.__wrapped__("avx512bw")


def test_that_kernels_are_being_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said, entry = threading.Event(), compiled._entry

    def slow(numba: Any, make: Any, arguments: int) -> Any:
        assert said.wait(60)  # as long as compiling takes
        return entry(numba, make, arguments)

    monkeypatch.setattr(compiled, "_PATIENCE", 0.01)
    monkeypatch.setattr(compiled.machine_code, "load", lambda version: None)
    monkeypatch.setattr(compiled, "_entry", slow)
    monkeypatch.setattr(compiled.logger, "warning", lambda text: said.set())
    compiled._compiled.__wrapped__()
    assert said.is_set()


@pytest.mark.skipif(not compiled.vector_bytes(), reason="a processor without AVX2")
@pytest.mark.parametrize("chunk", dots.CHUNKS)
def test_sums_are_the_same_at_any_width_of_vectors(chunk: int) -> None:
    n, rows, tokens = 3, 2, dots.TOGETHER
    codes = torch.randint(256, (rows, n * chunk), dtype=torch.uint8)
    x = torch.randint(-32767, 32768, (tokens, n * chunk), dtype=torch.int16)
    scales, zeros, x_scales, x_sums = (torch.rand(2, n) for _ in range(4))
    parts = (codes[:, None].double() * x.double()).unflatten(-1, (n, chunk)).sum(-1)
    wanted = (parts * scales[:, None] * x_scales).sum(-1) - (scales * zeros) @ x_sums.T
    for width in {32, compiled.vector_bytes()}:
        summed, room = torch.zeros(rows, tokens), torch.zeros(4096)
        given = (codes, n * chunk, x, scales, zeros, x_scales, x_sums, room, n, summed)
        addresses = [g.data_ptr() if isinstance(g, Tensor) else g for g in given]
        summer(dots.dot_of(chunk, rows, tokens, width))(*addresses)
        assert torch.allclose(summed.double(), wanted, rtol=1e-5)


def summer(dot: Any) -> Any:
    import numba

    def add_up(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums):  # type: ignore[no-untyped-def]
        dot(codes, step, x, scales, zeros, x_scales, x_sums, room, n, sums)

    return numba.njit(add_up)


def reader(decode: Any) -> Any:
    import numba

    def read(tile, past, table, size, target):  # type: ignore[no-untyped-def]
        decode(tile, past, table, size, target)

    return numba.njit(read)


@pytest.mark.parametrize("bits", [1.5, 3, 4.5, 7, 8])
def test_a_processor_without_bmi_reads_the_same_walks(bits: float) -> None:
    codes = torch.randint(256, (walk_bytes(bits),), dtype=torch.uint8)
    table, found = torch.randn(2**10), torch.zeros(2, 256)
    for target, has_bmi in zip(found, (False, compiled.has_bmi()), strict=True):
        decode = walks.intrinsics(has_bmi=has_bmi)[f"decode_{round(2 * bits)}"]
        past = codes[-8:]  # it bites its tail
        addresses = codes.data_ptr(), past.data_ptr(), table.data_ptr(), 10, target.data_ptr()
        reader(decode)(*addresses)
    states = unpack_walks(codes[None], bits, 10)
    assert torch.equal(found[0], table[states[0].long()]) and torch.equal(*found)


def called(function: Any) -> Any:
    """Return one of our functions as one that Python can call."""
    import numba

    def call(*given):  # type: ignore[no-untyped-def]
        return function(*given)

    return numba.njit(call)


@pytest.mark.skipif(not compiled.vector_bytes(), reason="a processor without AVX2")
@pytest.mark.parametrize("bits", [1, 1.5, 2.5, 3, 3.5, 4, 4.5, 8])
def test_values_are_computed_to_the_bit_at_any_width_of_vectors(bits: float) -> None:
    codes = torch.randint(256, (walk_bytes(bits),), dtype=torch.uint8)  # it bites its tail
    pair = round(2 * bits)
    for width in {32, compiled.weyl_bytes()}:
        made = weyl.intrinsics(width=width)
        compute, to_floats = called(made[f"weyl_{pair}"]), called(made["float_words"])
        add, add_words = called(made[f"sum_weyl_{pair}"]), called(made["add_words"])
        for state_bits in (8, 13, 16):
            words, found = torch.zeros(256, dtype=torch.int16), torch.zeros(256)
            multiplier = weyl_multiplier(state_bits, bits) << (16 - state_bits)
            walk, how = (
                (codes.data_ptr(), codes[-8:].data_ptr()),
                (multiplier, weyl_half(state_bits)),
            )
            compute(*walk, 1, *how, words.data_ptr())
            to_floats(words.data_ptr(), found.data_ptr(), 32)
            states = unpack_walks(codes[None], bits, state_bits)[0].long()
            assert torch.equal(found, codebook("weyl", state_bits, bits)[states])
            x, scale = torch.randint(-32767, 32768, (16,), dtype=torch.int16), torch.rand(1)
            sums = torch.ones(2, 16, 8)
            given, one, two = (
                (x.data_ptr(), scale.data_ptr()),
                sums[0].data_ptr(),
                sums[1].data_ptr(),
            )
            add(*walk, 1, 1, *how, *given, one)
            add_words(words.data_ptr(), 1, *given, two)
            wanted = scale * (found.view(16, 16).double() @ x.double())
            assert torch.allclose(sums.sum(2).double() - 8, wanted, rtol=1e-5, atol=1e-1)
            assert torch.equal(*sums)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("tokens", [1, 18])
def test_bfloat16_times_computed_values_is_in_integers_but_for_outliers(
    bits: int, tokens: int
) -> None:
    shape = (40, 576)
    level = f"trellis:bits={bits},state_bits=12,codebook=weyl,rotation=none"
    kernel, state = drawn(level, shape)
    W = compose.decompress(kernel.level, state, shape, torch.float32).double()
    stored, x = kernel._terms[0][0], torch.randn(tokens, shape[1]).bfloat16()
    found = stored.product(state, x, torch.float32)
    assert error(found, x.double() @ W.T) < 2**-14
    if stored.summed:
        assert not torch.equal(found, stored.product(state, x.float(), torch.float32))
    x[-1, 3] = 3000.0
    assert error(stored.product(state, x, torch.float32), x.double() @ W.T) < 1e-6


def test_a_processor_without_avx2_looks_every_value_up(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = (48, 96)
    own, state = drawn("trellis:bits=3,state_bits=8,codebook=weyl", shape)
    monkeypatch.setattr(terms, "weyl_bytes", lambda: 0)
    other = kernel_of.__wrapped__(own.level, shape)
    assert other is not None
    x = torch.randn(1, shape[1])
    found = [kernel.linear(x, state, None) for kernel in (own, other)]
    assert torch.allclose(*found, atol=1e-5)
    (theirs,) = other._terms[0]
    assert theirs.fixed["multiplier"] == 0
    rows = own._terms[0][0].weights(state, torch.float32)
    assert torch.equal(rows, theirs.weights(state, torch.float32))


@pytest.mark.skipif(not compiled.vector_bytes(), reason="a processor without AVX2")
def test_kept_weights_are_put_to_their_places_at_any_width_of_vectors() -> None:
    mask = torch.randint(2, (5 * places.BLOCK,), dtype=torch.uint8)
    mask[:8], mask[8:16] = 0, 1
    n = int(mask.sum())
    values, codes = torch.randn(256), torch.randint(256, (256,), dtype=torch.uint8)
    own = compiled.vector_bytes(), compiled.has_vbmi2()
    for width, has_vbmi2 in {(32, False), (own[0], False), own}:
        made = places.intrinsics(width=width, has_vbmi2=has_vbmi2)
        for name, kept, rest in (("floats", values, 0), ("codes", codes, 7)):
            found = torch.full(mask.shape, 9).to(kept.dtype)
            size, wanted = kept.element_size(), torch.full_like(found, rest)
            wanted[mask.bool()] = kept[:n]
            put = called(made[f"place_{name}"])
            end = put(mask.data_ptr(), kept.data_ptr(), found.data_ptr(), 5, rest)
            assert torch.equal(found, wanted) and end == kept.data_ptr() + size * n


@pytest.mark.parametrize("level", [*SPARSE, "magnitude:pattern=1:2", "magnitude:pattern=3:4"])
def test_sparse_rows_of_any_length_are_those_of_the_reference(level: str) -> None:
    for shape in ((3, 480), (18, 672), (5, 2112)):
        kernel, state = drawn_sparse(level, shape)
        W = compose.decompress(kernel.level, state, shape, torch.float32)
        assert torch.equal(kernel._terms[0][0].weights(state, torch.float32), W)


def drawn_sparse(level: str, shape: tuple[int, int]) -> tuple[Kernel, State]:
    """Return kernel and packed tensors of a weight whose rows keep very different shares."""
    known = compose.normalize(level)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(shape[1]))
    W *= torch.linspace(0.1, 3, shape[0])[:, None]
    kernel = kernel_of(known, shape)
    assert kernel is not None
    return kernel, compose.compress(known, W, None)


def test_rows_are_shared_by_threads() -> None:
    kernel, state = make("rtn:bits=3,group_size=64", (700, 384))
    x, before = torch.randn(2, 384), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(kernel.linear(x, state, None))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_token_ids_out_of_range_are_an_error() -> None:
    from torch import nn

    from hf_evopress.loading.embedding import compress_embedding

    level = compose.normalize("rtn:bits=4,group_size=32")
    state = compose.compress(level, torch.randn(20, 32), None)
    made = compress_embedding(nn.Embedding(20, 32), level, state)
    assert made.prepare("auto") == KERNELS
    assert made(torch.tensor([[1, 19]])).shape == (1, 2, 32)
    with pytest.raises(IndexError, match="token ids from 3 to 20 for an embedding of 20 tokens"):
        made(torch.tensor([3, 20]))
