"""Models of other quantizers: their weights are found out, and EoRA adapters repair them.

Checkpoints are written by hand (`foreign_formats`) and loaded by transformers, which needs the
quantizer's library for some; those tests are skipped where it is not installed.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from hf_evopress.adapters import repair
from hf_evopress.adapters.by_name import load
from hf_evopress.adapters.eora import eora
from hf_evopress.adapters.folder import WEIGHTS
from hf_evopress.adapters.foreign import check_package, check_readable, dense_weight
from hf_evopress.adapters.repair import adapt
from hf_evopress.models.units import find_units
from hf_evopress.training.settings import Tuning
from hf_evopress.training.tune import tune

from .. import foreign_formats
from ..versions import needs_version

Q8_0 = 8  # ggml's number


@pytest.fixture(scope="module")
def base(trained_llama: Any, write_model: Any, structured_text: Any, tmp_path_factory: Any) -> Path:
    """A folder with the dense model and the text of the task."""
    folder = write_model(tmp_path_factory.mktemp("foreign"), trained_llama)
    (folder / "task.txt").write_text(structured_text(800))
    return folder


@pytest.fixture(scope="module")
def unseen(text_tokens: Any) -> Tensor:
    return text_tokens(6, 64, seed=9)


def kl(dense: Any, model: Any, ids: Tensor) -> float:
    """Mean divergence of `model` from `dense` per token, in nats."""
    with torch.no_grad():
        p, q = (m(input_ids=ids, use_cache=False).logits.log_softmax(-1) for m in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def needs(name: str, *packages: str, slow: bool = False) -> Any:
    missing = [p for p in packages if importlib.util.find_spec(p) is None]
    marks = [pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")]
    return pytest.param(name, marks=[*marks, *([pytest.mark.slow] if slow else [])])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "finegrained_fp8",
            marks=needs_version("transformers", "5.21", "needs a tensor-parallel plan on a CPU"),
        ),
        needs("gguf", "gguf"),
        needs("compressed_int4", "compressed_tensors"),
        needs("compressed_int8", "compressed_tensors"),
        needs("compressed_fp8", "compressed_tensors"),
        needs("gptq", "gptqmodel", slow=True),  # compiles a kernel at its first run
        needs("awq", "gptqmodel", slow=True),
    ],
)
def test_a_checkpoint_of_another_quantizer_is_repaired(
    base: Path, trained_llama: Any, byte_tokenizer: Any, unseen: Tensor, tmp_path: Path, name: str
) -> None:
    path = tmp_path / ("tiny-Q4_0.gguf" if name == "gguf" else name)
    made = str(getattr(foreign_formats, name)(path, trained_llama, byte_tokenizer))
    adapt(
        made,
        tmp_path / "adapter",
        data=[str(base / "task.txt")],
        dense=str(base / "dense"),
        rank=8,
        n_sequences=16,
        seq_len=64,
    )
    model = load(made)
    before = kl(trained_llama, model, unseen)
    repaired = PeftModel.from_pretrained(model, tmp_path / "adapter")
    assert kl(trained_llama, repaired, unseen) < 0.5 * before


def nf4() -> Any:
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
    return BitsAndBytesConfig(load_in_4bit=True, **settings)


def quanto() -> Any:
    return QuantoConfig(weights="int4")


def torchao() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return TorchAoConfig(IntxWeightOnlyConfig(torch.int4, PerGroup(32)))


def torchao_w8a8() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def load_with(base: Path, config: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        base / "dense", quantization_config=config, device_map="cpu", dtype=torch.float32
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, package, share",
    [
        (nf4, "bitsandbytes", 0.5),
        (quanto, "optimum.quanto", 0.5),
        (torchao, "torchao", 0.5),
        (torchao_w8a8, "torchao", 1.0),  # the rounding of its inputs stays
    ],
)
def test_a_model_quantised_on_load_is_repaired(
    base: Path,
    trained_llama: Any,
    text_tokens: Any,
    unseen: Tensor,
    tmp_path: Path,
    config: Callable[[], Any],
    package: str,
    share: float,
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    eora(load_with(base, config()), trained_llama, text_tokens(16, 64), tmp_path, rank=8)
    before = kl(trained_llama, load_with(base, config()), unseen)
    # a fresh model: state_dict(), which PEFT calls, spoils bitsandbytes' weights after a forward
    repaired = PeftModel.from_pretrained(load_with(base, config()), tmp_path)
    assert kl(trained_llama, repaired, unseen) < share * before


@pytest.mark.slow
def test_an_adapter_is_trained_over_a_model_of_bitsandbytes(
    base: Path, byte_tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    load_with(base, nf4()).save_pretrained(tmp_path / "nf4")
    byte_tokenizer.save_pretrained(tmp_path / "nf4")
    check_training(tmp_path / "nf4", base / "task.txt", tmp_path / "lora")


def test_an_adapter_is_trained_over_packed_compressed_tensors(
    base: Path, trained_llama: Any, byte_tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    folder = foreign_formats.compressed_int4(tmp_path / "int4", trained_llama, byte_tokenizer)
    check_training(folder, base / "task.txt", tmp_path / "lora")


def check_training(model: Path, text: Path, out: Path) -> None:
    settings = Tuning(steps=20, batch=4, seq_len=32, sequences=32, rank=4, learning_rate=2e-3)
    done = tune(str(model), out, settings, data=[str(text)])
    layers = {key.rpartition(".lora_")[0] for key in load_file(done.folder / WEIGHTS)}
    assert len(layers) == 21  # seven in each of three blocks
    assert sum(done.losses[-5:]) < sum(done.losses[:5])


def test_int8_of_bitsandbytes_is_read_as_it_was_rounded(base: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    model = load_with(base, BitsAndBytesConfig(load_in_8bit=True))
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    codes, scale = layer.weight.data.float(), layer.weight.SCB[:, None] / 127
    found = dense_weight(layer, (128, 64), torch.float32)
    assert float((found - codes * scale).norm() / found.norm()) < 1e-4


@pytest.mark.parametrize("form", ["compressed_int4", "compressed_int8", "compressed_fp8"])
def test_compressed_tensors_say_the_same_before_and_after_they_unpack(
    trained_llama: Any, byte_tokenizer: Any, unseen: Tensor, tmp_path: Path, form: str
) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    model = load(str(getattr(foreign_formats, form)(tmp_path, trained_llama, byte_tokenizer)))
    units = find_units(trained_llama)
    packed = [dense_weight(model.get_submodule(u.name), u.shape, torch.float32) for u in units]
    model(input_ids=unseen)  # unpacks
    for unit, W in zip(units, packed, strict=True):
        module = model.get_submodule(unit.name)
        assert torch.allclose(dense_weight(module, unit.shape, torch.float32), W, atol=1e-6)
        assert torch.allclose(module.weight, W, atol=1e-6)


def gguf_linear(*, permutation: Tensor | None = None) -> tuple[Any, Tensor]:
    """A layer of Q8_0 blocks (half a scale, 32 codes), and the weight that they stand for."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (16, 2, 32), generator=generator, dtype=torch.int8)
    scale = torch.rand(16, 2, 1, generator=generator).half()
    gguf = pytest.importorskip("transformers.integrations.gguf.utils", reason="transformers 5.21")
    layer = gguf.GgufLinear(64, 16, Q8_0)
    layer.weight.data = torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], 2).flatten(1)
    layer.input_permutation = permutation
    return layer, (scale.float() * codes).flatten(1)


@pytest.mark.parametrize("is_permuted", [False, True])
def test_gguf_blocks_are_read_as_the_layer_computes_with_them(is_permuted: bool) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    layer, W = gguf_linear(permutation=order if is_permuted else None)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(2))
    found = dense_weight(layer, (16, 64), torch.float32)
    assert torch.allclose(F.linear(x, found), layer(x), atol=1e-3)
    assert torch.equal(found[:, order] if is_permuted else found, W)


class Scaled(nn.Linear):
    """FP8 as DeepSeek stores it: a weight of 8-bit floats that means nothing without its scale."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * 3, self.bias)


class Ternary(nn.Linear):
    """Keeps a plain weight and multiplies by another."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.sign(), self.bias)


class NeedsGpu(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("fp4_gemm is not compiled for this device")


class Saturated(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.clamp(-1, 1) ** 3, self.weight, self.bias)


def test_floats_of_8_bits_are_not_taken_for_the_weight() -> None:
    layer = Scaled(16, 8)
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    found = dense_weight(layer, (8, 16), torch.float32)
    assert torch.allclose(found, 3 * layer.weight.float(), atol=1e-5)


def test_a_layer_with_a_forward_of_its_own_is_asked() -> None:
    layer = Ternary(16, 8)
    found = dense_weight(layer, (8, 16), torch.float32)
    assert torch.allclose(found, layer.weight.sign(), atol=1e-5)


def test_wide_layers_are_asked_in_parts() -> None:
    layer = Ternary(2500, 3)
    found = dense_weight(layer, (3, 2500), torch.float32)
    assert torch.allclose(found, layer.weight.sign(), atol=1e-5)


@pytest.mark.parametrize(
    "kind, why",
    [(NeedsGpu, "not compiled for this device"), (Saturated, "not those of one weight")],
)
def test_a_layer_that_hides_its_weight_is_named_with_the_way_out(
    kind: type[nn.Linear], why: str
) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__} \(.*{why}.*dequantize=True"):
        dense_weight(kind(16, 8), (8, 16), torch.float32)


def test_it_is_refused_before_the_dense_model_is_loaded(
    base: Path, trained_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(trained_llama)
    model.model.layers[2].mlp.down_proj = NeedsGpu(128, 64)
    other = str(tmp_path / "other")
    model.config.save_pretrained(other)  # whose class is looked at first
    monkeypatch.setattr(repair, "load", {other: model}.__getitem__)  # KeyError for the dense one
    with pytest.raises(ValueError, match="NeedsGpu"):
        adapt(other, tmp_path / "out", data=["none.txt"], dense="dense", rank=2)
    with pytest.raises(ValueError, match="NeedsGpu"):
        check_readable(model)


@pytest.mark.parametrize("form", ["gptq", "awq", "compressed_int4"])
def test_a_missing_package_is_named(
    trained_llama: Any,
    byte_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    folder = getattr(foreign_formats, form)(tmp_path, trained_llama, byte_tokenizer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install (gptqmodel|compressed-tensors)"):
        check_package(str(folder))


@pytest.mark.parametrize("name", ["none.gguf", "folder/none.gguf"])
def test_a_missing_gguf_file_is_named(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.gguf.*OWNER/REPOSITORY"):
        load(name)
