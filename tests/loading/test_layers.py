"""The compressed layer behaves as an nn.Linear that cannot lose a change to its weight."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_evopress.loading import layers
from hf_evopress.loading.layers import CompressedLinear, resolve_units
from hf_evopress.loading.replace import replace_linears, restore_linears
from hf_evopress.methods import compose
from hf_evopress.methods.base import State
from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan

LEVEL = compose.normalize("rtn:bits=3,group_size=32")


def make_layer(*, has_bias: bool = True, dtype: torch.dtype = torch.float32) -> CompressedLinear:
    torch.manual_seed(0)
    state = compose.compress(LEVEL, torch.randn(16, 64), None)
    bias = torch.randn(16, dtype=dtype) if has_bias else None
    return CompressedLinear.from_state(LEVEL, state, bias, (16, 64), dtype=dtype)


def dense(layer: CompressedLinear, dtype: torch.dtype = torch.float32) -> Tensor:
    return compose.decompress(layer.level, layer.state, layer.shape, dtype)


def rtn_states(model: nn.Module) -> Callable[[str, Level], State]:
    return lambda unit, level: compose.compress(
        compose.normalize(level), model.get_submodule(unit).weight.detach(), None
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_computes_what_a_linear_with_the_decompressed_weight_does(
    dtype: torch.dtype, has_bias: bool
) -> None:
    layer = make_layer(has_bias=has_bias, dtype=dtype)
    x = torch.randn(2, 3, 64, dtype=dtype)
    assert torch.equal(layer(x), F.linear(x, dense(layer, dtype), layer.bias))


def test_it_is_an_nn_linear_that_owns_only_packed_tensors_and_the_bias() -> None:
    layer = make_layer()
    assert isinstance(layer, nn.Linear)
    assert sorted(dict(layer.named_parameters())) == ["bias", "codes", "scales", "zeros"]
    assert sorted(layer.state_dict()) == ["bias", "codes", "scales", "zeros"]
    assert not list(layer.buffers())


@pytest.mark.parametrize("has_bias", [True, False])
def test_its_first_parameter_is_no_integer(has_bias: bool) -> None:
    first = next(make_layer(has_bias=has_bias).parameters())  # models cast to its dtype
    assert first.is_floating_point() and (first.dtype == torch.float32 or not has_bias)


def test_its_bytes_are_the_declared_cost() -> None:
    layer = make_layer(has_bias=False)
    assert 8 * sum(p.nbytes for p in layer.parameters()) == compose.cost_bits(LEVEL, (16, 64))


def test_packed_tensors_take_no_gradient_and_inputs_do() -> None:
    layer = make_layer()
    assert not any(t.requires_grad for t in layer.state.values())
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, dense(layer).sum(0).expand(3, 64), atol=1e-5)


def test_the_weight_is_computed_in_the_dtype_of_the_model() -> None:
    layer = make_layer(dtype=torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight.clone(), dense(layer, torch.bfloat16))


def test_every_way_to_change_the_weight_in_place_raises() -> None:
    layer = make_layer()
    delta = torch.ones(16, 64)

    def assign_data() -> None:
        layer.weight.data = delta

    def add_to_data() -> None:
        layer.weight.data += delta

    def assign() -> None:
        layer.weight = nn.Parameter(delta)

    def write_part() -> None:
        layer.weight[0] = 1.0

    def write_view() -> None:
        layer.weight.detach().t().mul_(2)

    def write_out() -> None:
        torch.add(delta, delta, out=layer.weight)

    def initialise() -> None:
        nn.init.normal_(layer.weight)

    for change in (assign_data, add_to_data, write_part, write_view, write_out, initialise):
        with pytest.raises(RuntimeError, match="dequantize"):
            change()
    with pytest.raises(AttributeError, match="dequantize"):
        assign()


def test_what_is_computed_from_the_weight_is_an_ordinary_tensor() -> None:
    W = make_layer().weight
    for tensor in (W.clone(), W + 1, W.double(), W @ torch.ones(64)):
        assert type(tensor) is Tensor
        tensor.mul_(2)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_it_can_be_copied(copier: Callable[[CompressedLinear], CompressedLinear]) -> None:
    layer, x = make_layer(), torch.randn(2, 64)
    other = copier(layer)
    assert torch.equal(other(x), layer(x))
    assert other.level == layer.level
    assert other.codes.data_ptr() != layer.codes.data_ptr()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_changes_bias_and_weight_dtype_but_never_the_scales(dtype: torch.dtype) -> None:
    layer = make_layer()
    before = {name: tensor.clone() for name, tensor in layer.state.items()}
    layer.to(dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    for name, tensor in layer.state.items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor, before[name])


def test_a_move_to_another_device_moves_every_tensor() -> None:
    layer = make_layer().to("meta")
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    assert not any(p.is_meta for p in layer.parameters())
    assert layer.scales.dtype == torch.float16


def test_dequantize_returns_a_stock_linear_with_the_same_output() -> None:
    layer, x = make_layer(), torch.randn(2, 64)
    linear = layer.dequantize()
    assert type(linear) is nn.Linear
    assert torch.equal(linear(x), layer(x))
    assert layer.dequantize(dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_dequantize_of_an_unloaded_layer_says_so() -> None:
    with pytest.raises(ValueError, match="device_map"):
        CompressedLinear.empty(LEVEL, (16, 64)).dequantize()


def test_repr_shows_level_and_bits() -> None:
    assert "level='rtn:bits=3,group_size=32', bits_per_weight=3.59" in repr(make_layer())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("zeros"), "stores codes, scales, zeros"),
        (lambda s: s.update(extra=s["codes"]), "got codes, extra, scales, zeros"),
        (
            lambda s: s.update(codes=s["codes"][:-1]),
            r"codes of level .* got torch.uint8 \(15, 24\)",
        ),
        (lambda s: s.update(scales=s["scales"].float()), "scales of level .* got torch.float32"),
    ],
)
def test_a_state_of_another_level_is_refused(change: Callable, message: str) -> None:
    state = dict(make_layer().state)
    change(state)
    with pytest.raises(ValueError, match=message):
        CompressedLinear.from_state(LEVEL, state, None, (16, 64))


def test_replace_and_restore_change_planned_layers_only(tiny_model: Callable) -> None:
    model = tiny_model("opt")
    names = [f"model.decoder.layers.{i}.fc1" for i in range(2)]
    bias = model.get_submodule(names[0]).bias
    plan = Plan(dict.fromkeys(names, LEVEL) | {"model.decoder.layers.0.fc2": "dense"})
    assert replace_linears(model, plan, rtn_states(model)) == names
    assert list(layers.compressed_linears(model)) == names
    assert model.get_submodule(names[0]).bias is bias
    x = torch.arange(8)[None]
    with torch.no_grad():
        logits = model(x).logits
        restore_linears(model)
        assert not layers.compressed_linears(model)
        assert torch.equal(model(x).logits, logits)


def test_units_resolve_with_and_without_the_base_model_prefix(tiny_model: Callable) -> None:
    model = tiny_model()
    long, short = "model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"
    assert resolve_units(model, Plan({short: LEVEL})) == {short: long}
    assert resolve_units(model.model, Plan({long: LEVEL})) == {long: short}


@pytest.mark.parametrize(
    "plan, error, message",
    [
        (Plan({"model.layers.0.mlp.up_pro": LEVEL}), ValueError, "did you mean .*up_proj"),
        (
            Plan({"model.layers.0.mlp.up_proj": LEVEL}, {"model.layers.0.mlp.up_proj": (9, 64)}),
            ValueError,
            "the model has 128x64, the plan was made for 9x64",
        ),
        (Plan({"model.layers.0.mlp": LEVEL}), TypeError, "is a LlamaMLP"),
        (Plan({"lm_head": LEVEL}), ValueError, "tied"),
        (
            Plan({"model.layers.0.mlp.up_proj": "rtn:bits=3,group_size=48"}),
            ValueError,
            r"up_proj: rtn: group_size=48 does not divide",
        ),
    ],
)
def test_a_plan_that_does_not_fit_the_model_is_refused(
    tiny_model: Callable, plan: Plan, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve_units(tiny_model(tie_word_embeddings=True), plan)
