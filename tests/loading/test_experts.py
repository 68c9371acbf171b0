"""Mixtures of compressed experts computed at once give what one after the other gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_evopress.loading.experts import group_experts
from hf_evopress.loading.kernels import experts as operators
from hf_evopress.loading.kernels import steps
from hf_evopress.loading.kernels.gpu import experts as gpu_experts
from hf_evopress.loading.kernels.gpu import layer as gpu_layer
from hf_evopress.loading.kernels.gpu.experts import FEW, tiles_of
from hf_evopress.loading.kernels.layer import MOST_TOKENS
from hf_evopress.loading.layers import CompressedLinear, prepare_layers
from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.models.experts import SplitExperts, split_experts

ALIKE = ["rtn:bits=3,group_size=32"] * 4
MIXED = [
    "rtn:bits=4,group_size=32",
    "magnitude:sparsity=0.5",
    "rtn:bits=3,group_size=32 + lowrank:rank=2,metric=plain",
    "dense",
]
KINDS = ("qwen3_moe", "gpt_oss")  # the latter: biases, transposed, gates woven in
NONE = 4  # of four experts: what a masked token has


@pytest.fixture(autouse=True)
def no_kernel_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_layer, "_failed", {})


@pytest.fixture
def mixture(tiny_model: Callable[..., nn.Module]) -> Callable[..., Any]:
    """The factory mixture(kind, levels, dtype, runtime) of four experts, as a layer has them."""

    def make(
        kind: str = KINDS[0],
        levels: list[str] | None = None,
        dtype: torch.dtype = torch.float32,
        runtime: str = "auto",
        width: int = 64,
    ) -> Any:
        model = tiny_model(kind, hidden_size=width).to(dtype)
        split_experts(model)
        found = next(m for m in model.modules() if isinstance(m, SplitExperts))
        for own, text in zip(found, levels or ALIKE, strict=True):
            for name in own.names:
                compress(own, name, text)
        found.requires_grad_(False)
        prepare_layers(found, runtime)
        return found

    return make


def compress(expert: Any, name: str, text: str) -> None:
    linear = expert.get_submodule(name)
    if linear.bias is not None:
        nn.init.normal_(linear.bias)
    if text == "dense":
        return
    level, shape = compose.normalize(text), tuple(linear.weight.shape)
    W = linear.weight.detach().float()
    state = compose.compress(level, W, Stats(torch.eye(shape[1]), None, None, 64))
    dtype, bias = linear.weight.dtype, linear.bias
    layer = CompressedLinear.from_state(level, state, bias, shape, dtype=dtype)
    expert.set_submodule(name, layer)


def one_by_one(experts: Any, *given: Tensor) -> Tensor:
    twin = copy.deepcopy(experts)
    group_experts(twin, by_kernels=False)
    return twin(*given)  # type: ignore[no-any-return]


def routed(
    tokens: int, dtype: torch.dtype = torch.float32, width: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens that the first expert gets all of, the second some, the third none."""
    torch.manual_seed(0)
    expert = torch.zeros(tokens, 2, dtype=torch.int64)
    expert[:, 1] = torch.tensor([1, 3, NONE])[torch.arange(tokens) % 3]
    return torch.randn(tokens, width).to(dtype), expert, torch.rand(tokens, 2).to(dtype)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of tasks of each call of the CPU kernels."""
    counts: list[int] = []
    run = steps.run
    monkeypatch.setattr(steps, "run", lambda tasks: counts.append(len(tasks)) or run(tasks))
    return counts


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [ALIKE, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 5, MOST_TOKENS + 3])
def test_the_answer_is_that_of_one_after_the_other(
    kind: str, levels: list[str], dtype: torch.dtype, tokens: int, mixture: Callable[..., Any]
) -> None:
    experts = mixture(kind, levels, dtype)
    given = routed(tokens, dtype)
    found, wanted = experts(*given), one_by_one(experts, *given)
    assert found.dtype == dtype and found.shape == (tokens, 64)
    assert torch.allclose(found, wanted, atol=1e-5 if dtype == torch.float32 else 1e-2)


@torch.no_grad()
def test_all_experts_are_one_call_per_layer(
    mixture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, counts = mixture(), launches(monkeypatch)
    experts(*routed(4))
    assert counts == [3, 3]  # the third expert has no tokens
    counts.clear()
    one_by_one(experts, *routed(4))
    assert counts == [1] * 6


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_no_tokens_give_none(kind: str, mixture: Callable[..., Any]) -> None:
    assert mixture(kind)(*routed(0)).shape == (0, 64)


@torch.no_grad()
def test_tokens_of_no_expert_get_nothing(mixture: Callable[..., Any]) -> None:
    hidden, expert, weight = routed(3)
    assert mixture(KINDS[1])(hidden, torch.full_like(expert, NONE), weight).count_nonzero() == 0


@pytest.mark.parametrize("levels", [ALIKE, MIXED], ids=["alike", "mixed"])
def test_gradients_of_tokens_are_those_of_one_after_the_other(
    levels: list[str], mixture: Callable[..., Any]
) -> None:
    experts, grads = mixture(levels=levels), []
    for compute in (experts, lambda *given: one_by_one(experts, *given)):
        hidden, expert, weight = routed(6)
        hidden.requires_grad_(), weight.requires_grad_()
        compute(hidden, expert, weight).square().sum().backward()
        grads.append((hidden.grad, weight.grad))
    for found, wanted in zip(*grads, strict=True):
        assert found is not None and torch.allclose(found, wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("levels", [ALIKE, MIXED], ids=["alike", "mixed"])
def test_under_autocast_they_are_as_near_to_the_exact_answer_as_one_after_the_other(
    kind: str, levels: list[str], mixture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, (hidden, *rest) = mixture(kind, levels), routed(7)
    exact, answers = one_by_one(experts, hidden, *rest), []
    with torch.autocast("cpu", torch.bfloat16):
        reference = one_by_one(experts, hidden, *rest)
        counts = launches(monkeypatch)
        for x in (hidden, hidden.clone().requires_grad_()):
            answers.append(experts(x, *rest))
        answers[1].float().sum().backward()
    assert max(counts) > 1 and x.grad.dtype == torch.float32
    assert bool(x.grad.isfinite().all()) and float(x.grad.norm()) > 0
    for answer in answers:
        assert answer.dtype == reference.dtype
        assert (answer - exact).norm() <= 1.5 * (reference - exact).norm()


def test_the_operator_keeps_the_rules_of_pytorch(mixture: Callable[..., Any]) -> None:
    layers = [expert.get_submodule(expert.names[0]) for expert in mixture()]
    state = [tensor for layer in layers for tensor in layer.state.values()]
    names = layers[0].level_text, [0] * 4, layers[0].out_features, "auto"
    x, expert = torch.randn(5, 64, requires_grad=True), torch.tensor([0, 0, 1, 3, NONE])
    torch.library.opcheck(torch.ops.evopress.experts.default, (x, expert, state, [], *names))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_compiled_whole_whatever_the_routing(
    kind: str, mixture: Callable[..., Any]
) -> None:
    experts = mixture(kind, MIXED)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    hidden, expert, weight = routed(6)
    for routing in (expert, expert.flip(0), torch.full_like(expert, 2)):
        found = compiled(hidden, routing, weight)
        assert torch.allclose(found, one_by_one(experts, hidden, routing, weight), atol=1e-5)


@torch.no_grad()
def test_hooks_on_experts_are_called(mixture: Callable[..., Any]) -> None:
    experts, seen = mixture(), []
    layer = experts[1].get_submodule(experts[1].names[1])
    handle = layer.register_forward_hook(lambda module, x, y: seen.append(x[0].shape))
    given = routed(6)
    found = experts(*given)
    assert seen == [(2, experts[1].get_submodule(experts[1].names[1]).in_features)]
    handle.remove()
    assert torch.allclose(experts(*given), found, atol=1e-6) and len(seen) == 1


def test_packed_tensors_that_are_trained_get_their_gradient(mixture: Callable[..., Any]) -> None:
    experts = mixture()
    scales = experts[0].get_submodule(experts[0].names[0]).scales.requires_grad_()
    experts(*routed(4)).sum().backward()
    assert scales.grad is not None and scales.grad.norm() > 0


@torch.no_grad()
def test_a_kernel_that_fails_leaves_the_reference(
    mixture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from hf_evopress.loading.kernels import operators as own

    experts, given = mixture(), routed(4)
    wanted = experts(*given)
    monkeypatch.setattr(own, "_failed", [])

    def fail(products: object) -> None:
        raise OSError("no kernels")

    monkeypatch.setattr(operators, "finish_all", fail)
    assert torch.allclose(experts(*given), wanted, atol=1e-5)
    assert caplog.text.count("no kernels") == 1


# -- on a GPU, and in Triton's interpreter ---------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CODES = ["rtn:bits=4,group_size=32,scales=bfloat16", "rtn:bits=3,group_size=32,symmetric=true"] * 2
SUM = ["rtn:bits=3,group_size=32 + lowrank:rank=2,metric=plain"] * 4
SPARSE = ["magnitude:sparsity=0.5", "magnitude:pattern=2:4,bits=4,group_size=32"] * 2
TRELLIS = ["trellis:bits=3,state_bits=6,feedback=none"] * 4
WALKS = [
    "trellis:bits=3,state_bits=6,feedback=none,scales=channels,order=mma",
    "trellis:bits=2,state_bits=7,feedback=none,tail_biting=false + lowrank:rank=2,metric=plain",
] * 2
ROWS = ["rows:bits=3,top_bits=6,top=0.2,group_size=32"] * 4
ALL = [ALIKE[0], SPARSE[0], TRELLIS[0], ROWS[0]]
LAUNCHES = [  # of each layer
    *((ALIKE, 1), (CODES, 2), (SUM, 3), (SPARSE, 2 + 1), (TRELLIS, 1), (WALKS, 1 + 3), (ROWS, 2)),
    *((ALL, 1 + 2 + 1 + 2), (MIXED, 1 + 2 + 3 + 1)),
]


def triton_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    launch = gpu_experts.launch

    def count(family: str, name: str, *given: Any) -> None:
        names.append(f"{family}.{name}")
        launch(family, name, *given)

    monkeypatch.setattr(gpu_experts, "launch", count)
    return names


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, levels, dtype, tokens",
    [
        (KINDS[0], ALIKE, torch.float32, 1),
        (KINDS[1], CODES, torch.float16, 1),
        (KINDS[1], CODES, torch.float32, FEW // 2 + 5),
        (KINDS[0], SUM, torch.float16, FEW // 2 + 2),
        (KINDS[1], SPARSE, torch.float32, 2),
        (KINDS[0], SPARSE, torch.float16, FEW // 2 + 2),
        (KINDS[1], TRELLIS, torch.float32, 1),
        (KINDS[1], WALKS, torch.float32, 2),
        (KINDS[1], WALKS, torch.float32, FEW // 2 + 2),
        (KINDS[0], TRELLIS, torch.float16, FEW // 2 + 1),
        (KINDS[1], ROWS, torch.float16, 2),
        (KINDS[1], ROWS, torch.float32, FEW // 2 + 2),
        (KINDS[1], ALL, torch.float32, 3),
        (KINDS[1], MIXED, torch.float32, 3),
        (KINDS[0], MIXED, torch.float16, FEW // 2 + 2),
        (KINDS[1], ALL, torch.float32, FEW // 2 + 2),
    ],
    ids=str,
)
def test_triton_kernels_answer_as_the_reference(
    kind: str,
    levels: list[str],
    dtype: torch.dtype,
    tokens: int,
    mixture: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')
    experts = mixture(kind, levels, dtype, "triton").to(DEVICE)
    given = [one.to(DEVICE) for one in routed(tokens, dtype)]
    names = triton_launches(monkeypatch)
    monkeypatch.setattr(gpu_layer.TritonKernel, "has_checked", lambda *given: True)
    found = experts(*given)
    (expected,) = (n for known, n in LAUNCHES if known is levels)
    assert len(names) == 2 * expected and not gpu_layer._failed
    experts.to("cpu")
    prepare_layers(experts, "packed")
    wanted = one_by_one(experts, *routed(tokens, dtype))
    close = 1e-4 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.cpu(), wanted, atol=close)


@torch.no_grad()
def test_a_token_is_multiplied_by_four_codes_of_its_experts_at_once(
    mixture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')
    monkeypatch.setattr(gpu_layer.TritonKernel, "has_checked", lambda *given: True)
    experts = mixture(dtype=torch.bfloat16, runtime="triton", width=128).to(DEVICE)
    shape = experts[0].get_submodule(experts[0].names[0]).shape
    kernel = gpu_layer.triton_kernel_of(compose.normalize(ALIKE[0]), shape)
    assert shape[1] == 128 and kernel._terms[0][0].constants["WHOLE"]
    found = experts(*(one.to(DEVICE) for one in routed(2, torch.bfloat16, 128))).cpu()
    prepare_layers(experts.to("cpu"), "packed")
    wanted = one_by_one(experts, *routed(2, torch.bfloat16, 128))
    assert torch.allclose(found, wanted, atol=2e-2)


@torch.no_grad()
def test_experts_are_products_by_themselves_where_one_has_no_kernel(
    mixture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')
    experts = mixture(levels=[*MIXED[:3], "zero"], runtime="triton").to(DEVICE)
    names = triton_launches(monkeypatch)
    found = experts(*(one.to(DEVICE) for one in routed(5)))
    prepare_layers(experts.to("cpu"), "packed")
    assert not names and torch.allclose(found.cpu(), one_by_one(experts, *routed(5)), atol=1e-4)


@torch.no_grad()
def test_a_grouped_kernel_that_is_wrong_is_found_out(
    mixture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')
    levels = ["rtn:bits=5,group_size=32"] * 4  # whose first result is looked at here
    experts = mixture(levels=levels, runtime="triton").to(DEVICE)
    given = [one.to(DEVICE) for one in routed(1)]
    monkeypatch.setattr(operators, "grouped", lambda x, *rest: x.new_ones(len(x), rest[1].shape[0]))
    for _ in range(2):
        found = experts(*given)
    assert caplog.text.count("the Triton kernel 'experts'") == 1
    prepare_layers(experts.to("cpu"), "packed")
    assert torch.allclose(found.cpu(), one_by_one(experts, *routed(1)), atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, FEW])
def test_a_level_that_no_token_is_sent_to_is_looked_at_too_and_once(
    tokens: int, mixture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')
    levels = ["rtn:bits=6,group_size=32"] * 2 + ["rtn:bits=7,group_size=32"] * 2
    experts = mixture(levels=levels, runtime="triton").to(DEVICE)
    hidden, _, weight = (one.to(DEVICE) for one in routed(tokens))
    to_first = torch.tensor([[0, 1]] * tokens, device=DEVICE)
    experts(hidden, to_first, weight)
    way = "one of experts" if 2 * tokens <= FEW else "many of experts"
    for own in experts:
        for name in own.names:
            assert own.get_submodule(name)._kernel.has_checked(hidden.device, way)
    monkeypatch.setattr(operators, "spans", lambda *given: pytest.fail("asks the device"))
    experts(hidden, to_first.flip(1), weight)


@torch.no_grad()
@pytest.mark.parametrize("which", [0, 1])
def test_experts_of_which_one_matrix_is_dense_are_computed_at_once_too(
    which: int, mixture: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = mixture()
    for own in experts:
        name = own.names[which]
        own.set_submodule(name, own.get_submodule(name).dequantize())
    given = routed(6)
    wanted = one_by_one(experts, *given)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(CompressedLinear, "forward", lambda *given: pytest.fail("one by one"))
    assert torch.allclose(experts(*given), wanted, atol=1e-5)
    assert torch.allclose(compiled(*given), wanted, atol=1e-5)


def test_tiles_cover_each_token_once() -> None:
    expert = torch.tensor([0] * 37 + [2] * 16 + [3] + [NONE] * 4)
    for size in (1, 16, 32):
        seen = torch.full_like(expert, NONE)
        for own, first, end in tiles_of(expert, 4, size).tolist():
            for token in range(first, min(first + size, end)) if own >= 0 else ():
                assert seen[token] == NONE
                seen[token] = own
        assert torch.equal(seen, expert)
