"""What layers make once to be faster: never another weight than the packed one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_evopress.loading import int4, runtimes
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.int4 import has_int4_kernel
from hf_evopress.loading.layers import CompressedLinear, compressed_linears
from hf_evopress.loading.runtimes import KERNELS, TRITON_KERNELS, log_choices
from hf_evopress.methods import compose

LEVELS = (
    "magnitude:sparsity=0.5",
    "magnitude:pattern=2:4,bits=4,group_size=32",
    "rtn:bits=3,group_size=32 + lowrank:rank=2,metric=plain",
    "rtn:bits=4,group_size=32",
    "zero",
)


def make_layer(
    level: str = LEVELS[1], *, dtype: torch.dtype = torch.float32, has_bias: bool = True
) -> CompressedLinear:
    torch.manual_seed(0)
    state = compose.compress(compose.normalize(level), torch.randn(16, 64), None)
    bias = torch.randn(16, dtype=dtype) if has_bias else None
    return CompressedLinear.from_state(level, state, bias, (16, 64), dtype=dtype)


def expanded(level: str = LEVELS[1], **options: torch.dtype) -> CompressedLinear:
    layer = make_layer(level, **options)
    layer.prepare("expanded")
    return layer


def decompressions(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []
    decompress = compose.decompress
    monkeypatch.setattr(compose, "decompress", lambda *a: calls.append(a) or decompress(*a))
    return calls


@pytest.fixture(autouse=True)
def no_runtime_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_EVOPRESS_RUNTIME", raising=False)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_computes_what_the_packed_layer_computes(level: str, has_bias: bool) -> None:
    layer, x = make_layer(level, has_bias=has_bias), torch.randn(2, 3, 64)
    packed = layer(x)
    layer.prepare("expanded")
    assert torch.allclose(layer(x), packed, atol=1e-5)


def test_a_corrected_bias_is_corrected_in_both() -> None:
    from hf_evopress.methods.maths.linalg import Stats

    X = torch.randn(200, 64) + 2
    stats = Stats(X.T @ X / 200, None, X.mean(0), 200)
    level = compose.normalize("lowrank:rank=4,centred=true")
    state = compose.compress(level, torch.randn(16, 64), stats)
    layer = CompressedLinear.from_state(level, state, None, (16, 64))
    packed = layer(X[:3])
    layer.prepare("expanded")
    assert torch.allclose(layer(X[:3]), packed, atol=1e-3)


def test_it_decompresses_once_for_all_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = decompressions(monkeypatch)
    layer = expanded()
    for _ in range(3):
        layer(torch.randn(1, 64))
    assert len(calls) == 1


def test_it_takes_the_memory_of_both_and_saves_the_packed_tensors_only() -> None:
    layer = expanded(dtype=torch.bfloat16)
    assert [b.nbytes for b in layer.buffers()] == [2 * 16 * 64]
    assert sorted(layer.state_dict()) == ["bias", "codes", "places", "scales", "zeros"]


def test_a_loaded_state_replaces_the_copy() -> None:
    layer, other = expanded(), make_layer()
    other.scales.data *= 2
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 64)
    assert torch.allclose(layer(x), other(x), atol=1e-5)


def test_a_cast_computes_the_copy_anew() -> None:
    layer, x = expanded(dtype=torch.bfloat16), torch.randn(3, 64)
    layer.float()
    assert torch.allclose(layer(x), make_layer().to(torch.bfloat16).float()(x), atol=1e-5)
    assert layer.made_weight.dtype == torch.float32
    exact = compose.decompress(layer.level, layer.state, layer.shape, torch.float32)
    assert torch.equal(layer.made_weight, exact)


def test_inputs_of_another_dtype_work_as_before() -> None:
    layer, x = expanded(dtype=torch.bfloat16, has_bias=False), torch.randn(3, 64)
    assert torch.equal(layer(x), make_layer(dtype=torch.bfloat16, has_bias=False)(x))


def test_packed_tensors_that_are_trained_get_their_gradient() -> None:
    layer, x = expanded(), torch.randn(3, 64)
    layer(x)
    layer.scales.requires_grad_()
    layer(x).square().sum().backward()
    assert layer.scales.grad is not None and layer.scales.grad.norm() > 0
    with torch.no_grad():
        layer.scales.mul_(3)
    layer.scales.requires_grad_(False)
    fresh = compose.decompress(layer.level, layer.state, layer.shape, torch.float32)
    assert torch.allclose(layer(x), x @ fresh.T + layer.bias, atol=1e-4)


def test_inputs_get_their_gradient() -> None:
    layer, x = expanded(), torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(3, 64), atol=1e-5)


def test_a_copy_of_the_layer_is_expanded_too() -> None:
    layer, x = expanded(), torch.randn(3, 64)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))


def test_layers_that_are_not_loaded_cannot_be_prepared() -> None:
    layer = CompressedLinear.empty(LEVELS[0], (16, 64))
    with pytest.raises(ValueError, match="not loaded; .* to prepare runtime 'expanded' of it"):
        layer.prepare("expanded")


needs_kernel = pytest.mark.skipif(not has_int4_kernel(), reason="no int4 kernel for this CPU")

CODED = (
    *(f"rtn:bits={bits},group_size=32" for bits in (2, 3, 4, 5, 6, 7, 8)),
    "rtn:bits=4,group_size=-1",
    "rtn:bits=3,group_size=192,symmetric=true",
    "rtn:bits=8,group_size=64,symmetric=true,scales=bfloat16",
    "magnitude:pattern=2:4,bits=4,group_size=32",
    "magnitude:sparsity=0.5,bits=3,group_size=96",
)


def int4_layer(level: str, *, rows: int = 40) -> CompressedLinear:
    """Return a bfloat16 layer (rows, 192) prepared for the kernel."""
    torch.manual_seed(0)
    W = torch.randn(rows, 192) + 0.3 * torch.randn(rows, 1)  # zero points off the middle
    state = compose.compress(compose.normalize(level), W, None)
    bias = torch.randn(rows, dtype=torch.bfloat16)
    layer = CompressedLinear.from_state(level, state, bias, (rows, 192), dtype=torch.bfloat16)
    layer.prepare("int4")
    return layer


@needs_kernel
@pytest.mark.parametrize("level", CODED)
@pytest.mark.parametrize("rows", [40, 16])
def test_the_int4_kernel_is_as_exact_as_a_dense_bfloat16_layer(level: str, rows: int) -> None:
    layer, x = int4_layer(level, rows=rows), torch.randn(2, 3, 192, dtype=torch.bfloat16)
    assert sorted(layer._made) == ["codes", "grids"]
    W = compose.decompress(layer.level, layer.state, layer.shape, torch.float32)
    exact = x.float() @ W.T + layer.bias.float()
    dense = torch.nn.functional.linear(x, W.bfloat16(), layer.bias)
    ours = layer(x)
    assert ours.shape == exact.shape and ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() < 2 * (dense.float() - exact).norm()


@needs_kernel
def test_later_terms_are_added_to_what_the_kernel_gives() -> None:
    layer = int4_layer("rtn:bits=2,group_size=32 + lowrank:rank=8,metric=plain")
    x = torch.randn(3, 192, dtype=torch.bfloat16)
    W = compose.decompress(layer.level, layer.state, layer.shape, torch.float32)
    exact = x.float() @ W.T + layer.bias.float()
    assert sorted(layer._made) == ["codes", "grids"]
    assert (layer(x).float() - exact).norm() < 0.01 * exact.norm()


@needs_kernel
def test_the_kernel_holds_four_bits_per_plane_and_a_scale_and_shift_per_group() -> None:
    for bits, planes in ((3, 1), (6, 2)):
        made = int4_layer(f"rtn:bits={bits},group_size=64").named_buffers()
        sizes = {name: tensor.nbytes for name, tensor in made}
        assert sizes == {
            "made_codes": planes * 48 * 192 // 2,
            "made_grids": planes * 48 * 3 * 4,
        }


@needs_kernel
@pytest.mark.parametrize(
    ("level", "computes"),
    [
        ("magnitude:sparsity=0.5", KERNELS),
        ("rtn:bits=4,group_size=48", KERNELS),
        ("lowrank:rank=4,metric=plain", KERNELS),
        ("zero", "as packed (no kernel for zero)"),
    ],
)
def test_levels_without_fitting_codes_hold_nothing_and_say_what_they_do(
    level: str, computes: str
) -> None:
    layer, x = int4_layer(level), torch.randn(3, 192, dtype=torch.bfloat16)
    assert layer.prepare("int4") == computes
    assert not list(layer.buffers())
    packed = compose.operator(layer.level, layer.state, layer.bias, layer.shape, torch.bfloat16)(x)
    assert torch.allclose(layer(x), packed, rtol=0.02, atol=0.5)


@needs_kernel
def test_prompts_other_dtypes_and_gradients_go_through_the_packed_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = int4_layer("rtn:bits=4,group_size=64")
    monkeypatch.setattr(int4, "_kernel", None)  # calling it would be an error
    prompt = torch.randn(4, 9, 192, dtype=torch.bfloat16)
    assert torch.allclose(layer(prompt), prompt @ layer.weight.T + layer.bias, rtol=0.02, atol=0.5)
    x = torch.randn(2, 192, dtype=torch.bfloat16, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.weight.sum(0).expand(2, 192), rtol=0.02, atol=0.5)


@needs_kernel
def test_changed_scales_change_what_the_kernel_gives() -> None:
    layer, x = int4_layer("rtn:bits=4,group_size=64"), torch.randn(1, 192, dtype=torch.bfloat16)
    before = layer(x) - layer.bias
    with torch.no_grad():
        layer.scales.mul_(2)
    assert torch.allclose(layer(x) - layer.bias, 2 * before, rtol=0.02, atol=0.5)


def test_without_the_int4_kernel_the_runtime_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "has_int4_kernel", lambda: False)
    with pytest.raises(ValueError, match="no int4 kernel for this processor .* 'auto'"):
        runtimes.check_runtime("int4", torch.bfloat16)


def test_int4_is_refused_on_a_card() -> None:
    with pytest.raises(ValueError, match="'int4' is for CPUs and the model is on cuda:0"):
        runtimes.check_device("int4", torch.device("cuda:0"))


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable, write_model: Callable
) -> Path:
    return write_model(tmp_path_factory.mktemp("packed"), tiny_model("llama"), *LEVELS) / "small"


def test_a_model_is_loaded_expanded_when_asked_and_saved_packed(
    folder: Path, tmp_path: Path
) -> None:
    tokens = torch.arange(20).view(1, 20)
    reference = EvoPressConfig(runtime="packed")
    packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=reference)
    config = EvoPressConfig(runtime="expanded")
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    with torch.no_grad():
        assert torch.allclose(model(tokens).logits, packed(tokens).logits, atol=1e-4)
    dense_bytes = sum(
        layer.in_features * layer.out_features * layer.weight_dtype.itemsize
        for layer in compressed_linears(model).values()
    )
    extra = model.get_memory_footprint() - packed.get_memory_footprint()
    assert extra == dense_bytes
    model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == (folder / "config.json").read_text()
    names = ("model.safetensors",)
    assert all((tmp_path / n).read_bytes() == (folder / n).read_bytes() for n in names)


def test_int4_needs_bfloat16(folder: Path) -> None:
    config = EvoPressConfig(runtime="int4")
    with pytest.raises(ValueError, match=r"'int4' computes in bfloat16 .* pass dtype=torch.bfloat"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@needs_kernel
def test_a_model_generates_through_the_int4_kernel_and_is_saved_packed(
    folder: Path, tmp_path: Path
) -> None:
    tokens = torch.arange(5).view(1, 5)
    models = [
        AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, quantization_config=EvoPressConfig(runtime=runtime)
        )
        for runtime in ("packed", "int4")
    ]
    with torch.no_grad():
        packed, fast = (model(tokens).logits.float() for model in models)
    assert (packed - fast).abs().max() < 0.05 * packed.abs().max()
    assert models[1].generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 9)
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    saved = [(tmp_path / str(i) / "model.safetensors").read_bytes() for i in range(2)]
    assert saved[0] == saved[1]


def test_joint_sparse_codes_reload_and_generate(folder: Path) -> None:
    tokens = torch.arange(5).view(1, 5)
    answers = []
    for runtime in ("packed", "expanded"):
        config = EvoPressConfig(runtime=runtime)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        answers.append(model.generate(tokens, max_new_tokens=4, do_sample=False))
    assert answers[0].shape == (1, 9)
    assert torch.equal(*answers)


def test_another_runtime_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no runtime \['auto'\], did you mean 'auto'"):
        EvoPressConfig(runtime=["auto"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no runtime 'expand', did you mean 'expanded'"):
        EvoPressConfig(runtime="expand")
    with pytest.raises(ValueError, match="no runtime 'fast'; known: auto, packed, expanded, int4"):
        make_layer().prepare("fast")


def test_the_runtime_is_auto_unless_the_environment_names_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert EvoPressConfig().runtime == "auto"
    monkeypatch.setenv("HF_EVOPRESS_RUNTIME", "expanded")
    assert EvoPressConfig().runtime == "expanded"
    assert EvoPressConfig(runtime="packed").runtime == "packed"
    monkeypatch.setenv("HF_EVOPRESS_RUNTIME", "fast")
    with pytest.raises(ValueError, match="^environment variable HF_EVOPRESS_RUNTIME: no runtime"):
        EvoPressConfig()
    with pytest.raises(ValueError, match="^environment variable HF_EVOPRESS_RUNTIME: no runtime"):
        EvoPressConfig.from_dict({"quant_method": "evopress"})  # not config.json's fault


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)], ids=str
)
def test_a_model_that_is_loaded_by_default_is_near_the_reference_and_holds_no_more(
    folder: Path, dtype: torch.dtype, tolerance: float, caplog: pytest.LogCaptureFixture
) -> None:
    tokens = torch.arange(5).view(1, 5)
    reference = EvoPressConfig(runtime="packed")
    packed = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=reference
    )
    with caplog.at_level("INFO", "hf_evopress"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("runtime auto")]
    n_zero = sum(str(layer.level) == "zero" for layer in compressed_linears(model).values())
    n_others = len(compressed_linears(model)) - n_zero
    assert lines == [
        f"runtime auto: {n_others} layers by CPU kernels, {n_zero} layers as packed "
        "(no kernel for zero)"
    ]
    with torch.no_grad():
        found, wanted = (m(tokens).logits.float() for m in (model, packed))
        assert (found - wanted).norm() <= tolerance * wanted.norm()
    assert model.get_memory_footprint() == packed.get_memory_footprint()
    wanted_text = packed.generate(tokens, max_new_tokens=4, do_sample=False)
    if dtype == torch.float32:
        assert torch.equal(model.generate(tokens, max_new_tokens=4, do_sample=False), wanted_text)


def test_layers_that_a_runtime_asked_for_by_name_does_not_serve_are_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log_choices("int4", ["int4", "int4", KERNELS], ["int4", "int4", KERNELS])
    log_choices("int4", ["int4", KERNELS], ["int4"])  # the other is an embedding
    log_choices("expanded", ["packed", "expanded"], ["expanded"])
    log_choices("triton", [TRITON_KERNELS], [TRITON_KERNELS])
    log_choices("auto", [KERNELS, "as packed (no kernel for zero)"], [KERNELS])
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warned == ["runtime int4: 2 layers int4, 1 layers by CPU kernels"]


def test_a_whole_model_compiles_into_one_graph(folder: Path) -> None:
    tokens = torch.arange(5).view(1, 5)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.hf_quantizer.is_compileable
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        found, wanted = (m(tokens, use_cache=False).logits for m in (compiled, model))
    assert torch.allclose(found, wanted, atol=1e-5)


def test_a_prompt_is_what_the_reference_makes_of_it(folder: Path) -> None:
    tokens = torch.arange(40).view(1, 40)
    configs = (EvoPressConfig(runtime=name) for name in ("auto", "packed"))
    models = [
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
        for config in configs
    ]
    with torch.no_grad():
        found, wanted = (model(tokens).logits for model in models)
    assert torch.allclose(found, wanted, atol=1e-5)
