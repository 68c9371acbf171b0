"""Under LoRA, compressed layers still compute by kernels, in training and after it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from hf_evopress.loading.kernels import operators
from hf_evopress.loading.kernels.gpu import layer as gpu_layer
from hf_evopress.loading.kernels.gpu.layer import TritonKernel
from hf_evopress.loading.kernels.layer import Kernel
from hf_evopress.loading.layers import compressed_linears, prepare_layers
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods import compose
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

LEVELS = {
    "q_proj": "rtn:bits=4,group_size=32",
    "k_proj": "rtn:bits=3,group_size=32 + lowrank:rank=4,metric=plain",
    "v_proj": "trellis:bits=3,state_bits=6,feedback=none",
    "o_proj": "magnitude:sparsity=0.5",
    "up_proj": "rtn:bits=5,group_size=32",
    "gate_proj": "rows:bits=3,top_bits=6,top=0.2,group_size=32",
    "down_proj": "lowrank:rank=16,metric=plain",
}
TARGETS = {"target_modules": list(LEVELS), "r": 4, "init_lora_weights": False}
WAYS = [
    "auto",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason="Triton has no interpreter"),
    ),
]


@pytest.fixture(scope="module")
def packed(tiny_model: Any, text_tokens: Any) -> Any:
    """A tiny model of one block, with a level of every kind that has a kernel."""
    model = tiny_model("llama", num_hidden_layers=1)
    levels = {u.name: LEVELS.get(u.name.rpartition(".")[2], "dense") for u in find_units(model)}
    plan = Plan(levels, shapes={u.name: u.shape for u in find_units(model)})
    compress_model(model, plan, text_tokens(2, 32))
    attach(model, plan)
    return model


@pytest.fixture
def ids(text_tokens: Any) -> Tensor:
    tokens: Tensor = text_tokens(2, 12, seed=5)
    return tokens


@pytest.fixture(autouse=True)
def no_kernel_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_layer, "_failed", {})
    monkeypatch.setattr(operators, "_failed", [])


def prepared(packed: Any, runtime: str) -> Any:
    if runtime == "triton":
        pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')
    model = copy.deepcopy(packed)
    choices = prepare_layers(model, runtime)
    assert len(choices) == len(LEVELS)
    assert all("packed" not in choice for choice in choices.values()) or runtime == "packed"
    return model


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(**TARGETS))


class Calls:
    """How often kernels were asked for a product and for the gradient of an input."""

    products = gradients = 0


@contextmanager
def counted(runtime: str) -> Iterator[Calls]:
    """Count what kernels of a runtime do; the reference must not be asked, but to check them."""
    kind, calls, is_inside = (TritonKernel if runtime == "triton" else Kernel), Calls(), [False]
    reference, linear, gradient = compose.operator, kind.linear, kind.input_gradient

    def product(self: Any, *args: Any) -> Tensor:
        calls.products += 1
        is_inside[0] = True
        try:
            return linear(self, *args)
        finally:
            is_inside[0] = False

    def input_gradient(self: Any, *args: Any) -> Tensor:
        calls.gradients += 1
        return gradient(self, *args)

    def operator(*args: Any) -> Any:
        assert is_inside[0], "a layer computed its weight"
        return reference(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "linear", product)
        patch.setattr(kind, "input_gradient", input_gradient)
        patch.setattr(compose, "operator", operator)
        yield calls


def step(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return the loss and the gradients of all adapters of one training step."""
    model.train()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in found.values())
    return {"loss": loss.detach(), **found}


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def is_near(found: Tensor, wanted: Tensor) -> bool:
    return bool((found - wanted).norm() <= 1e-4 * wanted.norm() + 1e-7)


@pytest.mark.parametrize("runtime", WAYS)
def test_a_training_step_is_that_of_the_reference_and_runs_kernels(
    packed: Any, ids: Tensor, runtime: str
) -> None:
    wanted = step(adapted(prepared(packed, "packed")), ids)
    made = adapted(prepared(packed, runtime))
    with counted(runtime) as calls:
        found = step(made, ids)
    assert calls.products == len(LEVELS)
    # the inputs of q, k and v are those of the model, which nothing before them trains
    assert calls.gradients == len(LEVELS) - 3
    assert found.keys() == wanted.keys()
    assert all(is_near(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("runtime", WAYS)
def test_checkpointed_blocks_run_kernels_again(packed: Any, ids: Tensor, runtime: str) -> None:
    wanted = step(adapted(prepared(packed, "packed")), ids)
    made = adapted(prepared(packed, runtime))
    made.gradient_checkpointing_enable()
    made.enable_input_require_grads()
    with counted(runtime) as calls:
        found = step(made, ids)
    assert calls.products == 2 * len(LEVELS) and calls.gradients == len(LEVELS)
    assert all(is_near(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("runtime", WAYS)
def test_an_adapted_model_in_use_runs_kernels(packed: Any, ids: Tensor, runtime: str) -> None:
    wanted = logits(adapted(prepared(packed, "packed")), ids)
    made = adapted(prepared(packed, runtime))
    for layer in compressed_linears(made).values():
        layer._direct = None  # the short way of a CPU calls no Kernel: it has tests of its own
    with counted(runtime) as calls:
        found = logits(made, ids)
    assert calls.products == len(LEVELS) and calls.gradients == 0
    assert is_near(found, wanted)


def test_the_short_way_of_a_cpu_is_taken_under_an_adapter(packed: Any, ids: Tensor) -> None:
    made = adapted(prepared(packed, "auto"))
    one = ids[:1, :1]
    wanted = logits(made, one)
    with counted("auto") as calls:
        assert torch.equal(logits(made, one), wanted)
    short = [layer._direct is not None for layer in compressed_linears(made).values()]
    assert sum(short) == 2  # q and up, of one coded matrix
    assert calls.products == len(LEVELS) - 2


@pytest.mark.parametrize("runtime", WAYS)
def test_adapters_of_transformers_run_kernels(
    packed: Any, ids: Tensor, runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    results = []
    for own in ("packed", runtime):
        made = prepared(packed, own)
        torch.manual_seed(0)
        made.add_adapter(LoraConfig(**TARGETS))
        if own == "packed":
            results.append(step(made, ids))
            continue
        with counted(runtime) as calls:
            results.append(step(made, ids))
        assert calls.products == len(LEVELS) and calls.gradients == len(LEVELS) - 3
    assert all(is_near(results[1][name], results[0][name]) for name in results[0])


@pytest.mark.parametrize("runtime", WAYS)
def test_mixed_precision_by_autocast_runs_kernels(packed: Any, ids: Tensor, runtime: str) -> None:
    exact = step(adapted(prepared(packed, "packed")), ids)
    with torch.autocast("cpu", torch.bfloat16):
        reference = step(adapted(prepared(packed, "packed")), ids)
        made = adapted(prepared(packed, runtime))
        with counted(runtime) as calls:
            found = step(made, ids)
    assert calls.products == len(LEVELS) and calls.gradients == len(LEVELS) - 3
    off = [sum(float((r[n] - exact[n]).norm()) for n in exact) for r in (reference, found)]
    # Triton's interpreter cuts float32 to bfloat16, where a GPU rounds it
    assert off[1] <= (4 if runtime == "triton" else 2) * off[0]


def test_autocast_gives_the_dtypes_that_it_gives_dense_layers(packed: Any) -> None:
    layers = compressed_linears(prepared(packed, "auto")).values()
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            for layer in layers:
                x = torch.randn(3, layer.in_features, dtype=dtype, requires_grad=True)
                y = layer(x)
                y.sum().backward()
                assert y.dtype == torch.bfloat16 and x.grad.dtype == dtype
