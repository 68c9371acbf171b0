"""The weight of a packed layer is computed for its values, and not for its dtype or shape."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoConfig, CompileConfig, MambaForCausalLM, T5ForConditionalGeneration

from hf_evopress.loading.computed_weight import ComputedWeight
from hf_evopress.loading.layers import CompressedLinear, prepare_layers
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods import compose
from hf_evopress.models.ends import find_ends
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

LEVEL = compose.normalize("rtn:bits=4,group_size=32")
CLASSES = {"t5": T5ForConditionalGeneration, "mamba": MambaForCausalLM}
ENDS = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
SETTINGS: dict[str, dict[str, Any]] = {
    "t5": {**ENDS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 8},
}
IDS = torch.arange(3, 15).view(1, 12)
INPUTS = {"t5": {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]}, "mamba": {"input_ids": IDS}}


@pytest.fixture
def n_computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of weights computed so far, in a list of one."""
    n, stock = [0], compose.decompress

    def decompress(*args: Any) -> Tensor:
        n[0] += 1
        return stock(*args)

    monkeypatch.setattr(compose, "decompress", decompress)
    return n


@pytest.fixture
def nothing_is_compiled() -> Any:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def make_layer() -> CompressedLinear:
    torch.manual_seed(0)
    state = compose.compress(LEVEL, torch.randn(16, 64), None)
    return CompressedLinear.from_state(LEVEL, state, None, (16, 64))


def compressed(kind: str) -> Any:
    """Return a tiny model with every layer and its ends at LEVEL."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=256, **SETTINGS[kind])
    model: Any = CLASSES[kind](config).eval()
    units = [*find_units(model), *find_ends(model)]
    plan = Plan(
        {unit.name: LEVEL for unit in units}, shapes={unit.name: unit.shape for unit in units}
    )
    compress_model(model, plan, torch.arange(64).view(2, 32))
    attach(model, plan)
    prepare_layers(model, "auto")
    return model


def test_questions_for_dtype_and_shape_compute_nothing(n_computed: list[int]) -> None:
    W = make_layer().weight
    assert isinstance(W, Tensor) and W.shape == W.size() == (16, 64) and len(W) == W.size(0) == 16
    assert W.dtype == torch.float32 and W.element_size() == W.itemsize == 4 and W.nbytes == 4096
    assert W.numel() == 1024 and W.dim() == W.ndim == 2 and W.layout == torch.strided
    assert W.device.type == "cpu" and W.is_cpu and not W.is_cuda and not W.is_meta
    assert W.is_floating_point() and torch.is_floating_point(W) and not W.is_complex()
    assert not W.requires_grad and W.is_leaf and W.grad is None and W.grad_fn is None
    assert W.detach().shape == W.data.shape == (16, 64)
    assert isinstance(nn.Parameter(W, requires_grad=False), ComputedWeight)
    assert n_computed == [0]


def test_values_are_computed_once(n_computed: list[int]) -> None:
    W, x = make_layer().weight, torch.randn(3, 64)
    expected = x @ W.T
    for y in (F.linear(x, W), x @ W.detach().t(), F.linear(x, weight=W.data)):
        assert torch.equal(y, expected)
    assert torch.stack([W, W]).shape == (2, 16, 64)
    assert repr(W).startswith("tensor(") and W.numpy().shape == (16, 64)
    assert n_computed == [1]


@pytest.mark.parametrize(
    "copier", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_is_an_ordinary_tensor(copier: Callable[[Tensor], Tensor]) -> None:
    W = make_layer().weight
    made = copier(W)
    assert type(made) is Tensor and torch.equal(made, W)


def test_a_cast_of_the_layer_does_not_change_a_weight_taken_before() -> None:
    layer = make_layer()
    before, expected = layer.weight, layer.weight.clone()
    layer.to("meta", torch.bfloat16)
    assert before.dtype == torch.float32 and torch.equal(before, expected)


def test_gradients_reach_packed_tensors_that_are_trained() -> None:
    layer = make_layer()
    layer.scales.requires_grad_(True)
    assert layer.weight.requires_grad and not layer.weight.is_leaf
    F.linear(torch.ones(1, 64), layer.weight).sum().backward()
    assert layer.scales.grad is not None and layer.scales.grad.any()


def test_a_parameter_made_of_it_takes_its_own_gradient() -> None:
    parameter = nn.Parameter(make_layer().weight)
    F.linear(torch.ones(1, 64), parameter).sum().backward()
    assert torch.equal(parameter.grad, torch.ones(16, 64))


def test_a_weight_used_first_in_inference_mode_takes_part_in_gradients_later() -> None:
    W, x = make_layer().weight, torch.ones(1, 64, requires_grad=True)
    with torch.inference_mode():
        F.linear(x, W)
    F.linear(x, W).sum().backward()
    assert torch.allclose(x.grad[0], W.sum(0))


def test_operators_that_go_around_python_read_it_and_cannot_change_it() -> None:
    W = make_layer().weight
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(torch.add(W, 1), W.clone() + 1)
        with pytest.raises(RuntimeError, match="dequantize"):
            W.add_(1)


@pytest.mark.parametrize(
    "views",
    [
        lambda W: W.chunk(2),
        lambda W: W.split(4, dim=1),
        lambda W: torch.unbind(input=W),
        lambda W: W.t().tensor_split(2),
        lambda W: torch.split(W.data, [4, 12]),
        list,
    ],
)
def test_views_that_come_several_at_once_cannot_be_changed(views: Callable[[Tensor], Any]) -> None:
    layer = make_layer()
    expected = views(layer.weight.clone())
    for view, wanted in zip(views(layer.weight), expected, strict=True):
        assert torch.equal(view, wanted)
        with pytest.raises(RuntimeError, match="dequantize"):
            view += 1
    assert type(layer.weight.max(0).values) is Tensor


def test_a_dense_layer_takes_a_clone_of_it_as_its_data() -> None:
    W, linear = make_layer().weight, nn.Linear(64, 16)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        linear.weight.data = W  # PyTorch asks no subclass here
    linear.weight.data = W.clone()
    assert torch.equal(linear.weight, W)


class OwnProduct(nn.Module):
    """A layer that computes with the weight of another one, as DoRA does."""

    def __init__(self, layer: CompressedLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.layer.weight.dtype), self.layer.weight)


@pytest.mark.usefixtures("nothing_is_compiled")
def test_a_graph_can_compute_with_the_weight() -> None:
    module, x = OwnProduct(make_layer()), torch.randn(3, 64)
    expected = module(x)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="aot_eager")(x), expected)
    program = torch.export.export(module, (x,), strict=False)
    assert torch.equal(program.module()(x), expected)
    assert not any("evopress" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("kind", ["t5", "mamba"])
def test_a_forward_that_asks_for_the_dtype_computes_no_weight(
    kind: str, n_computed: list[int]
) -> None:
    model = compressed(kind)
    with torch.no_grad():
        model(**INPUTS[kind])
        n_computed[0] = 0
        model(**INPUTS[kind])
    assert n_computed == [0]


@pytest.mark.usefixtures("nothing_is_compiled")
def test_t5_is_one_graph_and_can_be_exported() -> None:
    model, inputs = compressed("t5"), {**INPUTS["t5"], "use_cache": False}
    with torch.no_grad():
        expected = model(**inputs).logits
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(whole(**inputs).logits, expected, atol=1e-4)
        program = torch.export.export(model, (), inputs, strict=False)
        assert torch.allclose(program.module()(**inputs).logits, expected, atol=1e-4)


@pytest.mark.usefixtures("nothing_is_compiled")
def test_t5_writes_the_same_with_a_static_cache() -> None:
    model = compressed("t5")
    how = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    how._compile_all_devices = True
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    expected = model.generate(IDS, **options)
    found = model.generate(IDS, cache_implementation="static", compile_config=how, **options)
    assert torch.equal(found, expected) and not counters["graph_break"]
