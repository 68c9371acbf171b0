"""generate() with a static cache compiles a compressed model whole, and writes the same tokens.

transformers compiles by itself on GPUs; here a config of its own makes it do so on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hf_evopress.loading.kernels import operators
from hf_evopress.loading.kernels.gpu import layer as gpu_layer
from hf_evopress.loading.layers import prepare_layers
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

SCALAR = ["rtn:bits=4,group_size=32"]
TRELLIS = ["trellis:bits=3,state_bits=6,feedback=none"]
ALL = [
    *(SCALAR + TRELLIS),
    "rtn:bits=3,group_size=32 + lowrank:rank=4,metric=plain",
    "magnitude:sparsity=0.5",
    "rows:bits=3,top_bits=6,top=0.2,group_size=32",
    "zero",  # has no kernel
]
OPTIONS: dict[str, Any] = {"do_sample": False, "eos_token_id": -1}


@pytest.fixture(autouse=True)
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gpu_layer, "_failed", {})
    monkeypatch.setattr(operators, "_failed", [])
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def compressed(
    make: Callable[..., Any], kind: str, levels: list[str], runtime: str = "auto"
) -> Any:
    """Return a tiny model whose layers have these levels in turn."""
    model = make(kind, num_hidden_layers=1)
    units = find_units(model)
    texts = {unit.name: levels[i % len(levels)] for i, unit in enumerate(units)}
    plan = Plan(texts, shapes={unit.name: unit.shape for unit in units})
    tokens = torch.arange(64).view(2, 32)
    compress_model(model, plan, tokens)
    attach(model, plan)
    prepare_layers(model, runtime)
    assert model.hf_quantizer.is_compileable
    return model


def on_any_device(backend: str = "aot_eager") -> CompileConfig:
    config = CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def is_written_alike(model: Any, prompt: Tensor, n: int, config: CompileConfig) -> bool:
    """Return whether the compiled model writes the n tokens that it writes uncompiled."""
    options = {**OPTIONS, "max_new_tokens": n, "attention_mask": torch.ones_like(prompt)}
    wanted = model.generate(prompt, **options)
    how = {"cache_implementation": "static", "compile_config": config}
    return torch.equal(model.generate(prompt, **options, **how), wanted)


def graphs() -> int:
    assert not counters["graph_break"]
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("levels", [SCALAR, TRELLIS, ALL], ids=["scalar", "trellis", "all"])
def test_a_model_is_one_graph_that_is_compiled_again_for_other_shapes_once(
    levels: list[str], tiny_model: Callable[..., nn.Module]
) -> None:
    model, config = compressed(tiny_model, "llama", levels), on_any_device()
    tokens = torch.arange(3, 63)
    assert is_written_alike(model, tokens[None, :8], 6, config)
    assert graphs() == 1
    assert is_written_alike(model, tokens[None, 5:9], 4, config)  # the same cache
    assert graphs() == 1
    for n in (2, 3, 4):  # batches of other sizes
        assert is_written_alike(model, tokens[: 6 * n].view(n, 6), 4, config)
        assert graphs() == 2


def test_a_mixture_of_experts_is_one_graph(tiny_model: Callable[..., nn.Module]) -> None:
    model = compressed(tiny_model, "qwen3_moe", ALL[:4])
    assert is_written_alike(model, torch.arange(3, 9)[None], 4, on_any_device())
    assert graphs() == 1


def test_kernels_for_gpus_are_in_the_graph(tiny_model: Callable[..., nn.Module]) -> None:
    pytest.importorskip("triton", reason='no Triton: pip install "hf-evopress[dev]" on Linux')
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there: Triton's interpreter
    few = SCALAR + TRELLIS + ["dense"] * 5
    model = compressed(tiny_model, "llama", few, "triton").to(device)
    prompt = torch.arange(3, 9, device=device)[None]
    assert is_written_alike(model, prompt, 3, on_any_device())
    assert graphs() == 1


@pytest.mark.slow
def test_inductor_compiles_the_graph(tiny_model: Callable[..., nn.Module]) -> None:
    model = compressed(tiny_model, "llama", ALL)
    assert is_written_alike(model, torch.arange(3, 9)[None], 4, on_any_device("inductor"))
    assert graphs() == 1
