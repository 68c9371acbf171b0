"""transformers loads, saves, runs and dequantizes compressed models as it does any other."""

from __future__ import annotations

import copy
import filecmp
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from hf_evopress.loading import layers
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.layers import CompressedLinear, compressed_linears
from hf_evopress.loading.quantizer import EvoPressQuantizer, attach
from hf_evopress.loading.replace import replace_linears
from hf_evopress.methods import compose
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.training.tunable import make_tunable

from ..versions import is_older

LEVELS = ("rtn:bits=4,group_size=32", "rtn:bits=3,group_size=64", "dense", "zero")
UP = "model.layers.1.mlp.up_proj"
TOKENS = torch.arange(40).view(2, 20)


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


def make_plan(model: nn.Module) -> Plan:
    units = find_units(model)
    levels = {unit.name: LEVELS[i % len(LEVELS)] for i, unit in enumerate(units)}
    return Plan(levels, {unit.name: unit.shape for unit in units})


def compress(model: nn.Module, plan: Plan) -> nn.Module:
    def states(unit: str, level: Any) -> dict[str, Tensor]:
        weight = model.get_submodule(unit).weight.detach()
        return compose.compress(compose.normalize(level), weight, None)

    replace_linears(model, plan, states)
    attach(model, plan)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def load(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    assert filecmp.cmpfiles(one, other, names, shallow=False) == (names, [], [])


@pytest.fixture(scope="module")
def dense_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable) -> Path:
    model = tiny_model("llama", tie_word_embeddings=False)
    return save(model, tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def model(tiny_model: Callable) -> Any:
    """A compressed tiny Llama as it is made, not loaded; never change it."""
    dense = tiny_model("llama", tie_word_embeddings=False)
    return compress(dense, make_plan(dense))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    return save(model, tmp_path_factory.mktemp("packed"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    path = save(model, tmp_path_factory.mktemp("shards"), max_shard_size="40KB")
    assert len(list(path.glob("*.safetensors"))) > 3
    return path


# -- loading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "arch", ["llama", "mistral", "qwen3", "gemma3_text", "phi3", "gpt_neox", "opt"]
)
def test_a_model_comes_back_bit_for_bit(
    arch: str, tie: bool, tiny_model: Callable, tmp_path: Path
) -> None:
    made = tiny_model(arch, tie_word_embeddings=tie)
    compress(made, make_plan(made))
    loaded, report = load(save(made, tmp_path / "a"), output_loading_info=True)
    assert torch.equal(logits(loaded), logits(made))
    assert not any(report.values())
    assert compressed_linears(loaded).keys() == compressed_linears(made).keys()
    assert_same_files(tmp_path / "a", save(loaded, tmp_path / "b"))


DEVICE_MAPS: dict[str, Any] = {
    "none": None,
    "cpu": "cpu",
    "auto": "auto",
    "half on disk": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    },
    "disk": {"": "disk"},
}
if is_older("accelerate", "1.15"):  # which refuses to offload a whole model by device_map
    del DEVICE_MAPS["disk"]


def options_for(name: str, tmp_path: Path) -> dict[str, Any]:
    extra = {"offload_folder": tmp_path / "offload"} if "disk" in name else {}
    return {"device_map": DEVICE_MAPS[name], **extra}


@pytest.mark.parametrize("where", DEVICE_MAPS)
@pytest.mark.parametrize("source", ["folder", "shards"])
@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded")
def test_every_device_map_gives_the_same_logits_and_files(
    where: str, source: str, model: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(source)
    loaded = load(path, **options_for(where, tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    size = {"max_shard_size": "40KB"} if source == "shards" else {}
    assert_same_files(path, save(loaded, tmp_path / "again", **size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, "auto"])
def test_dtype_is_that_of_everything_but_the_packed_tensors(dtype: Any, folder: Path) -> None:
    loaded = load(folder, dtype=dtype)
    wanted = torch.float32 if dtype == "auto" else dtype
    assert logits(loaded).dtype == wanted
    layer = loaded.get_submodule(UP)
    assert (layer.codes.dtype, layer.scales.dtype) == (torch.uint8, torch.float16)
    assert layer.weight.dtype == wanted


def test_packed_tensors_are_loaded_without_gradient(folder: Path) -> None:
    for layer in compressed_linears(load(folder)).values():
        assert not any(tensor.requires_grad for tensor in layer.state.values())


def test_loading_computes_no_dense_weight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("a dense weight was computed")

    monkeypatch.setattr(layers.compose, "decompress", fail)
    loaded = load(folder, device_map="auto")
    assert isinstance(loaded.get_submodule(UP), CompressedLinear)


def test_memory_footprint_is_what_is_stored(folder: Path, model: Any, dense_folder: Path) -> None:
    loaded, dense = load(folder), load(dense_folder)
    saved = sum(
        dense.get_submodule(unit).weight.nbytes * 8
        - compose.cost_bits(compose.normalize(level), (dense.get_submodule(unit).weight.shape))
        for unit, level in make_plan(dense).items()
        if not level.is_dense
    )
    assert dense.get_memory_footprint() - loaded.get_memory_footprint() == saved // 8


def test_the_base_model_loads_from_the_whole_one_and_comes_back(
    folder: Path, model: Any, tmp_path: Path
) -> None:
    base = AutoModel.from_pretrained(folder)
    again = AutoModel.from_pretrained(save(base, tmp_path))
    with torch.no_grad():
        expected = model.model(TOKENS).last_hidden_state
        assert torch.equal(base(TOKENS).last_hidden_state, expected)
        assert torch.equal(again(TOKENS).last_hidden_state, expected)


def test_a_fresh_process_fails_without_the_plugin_and_agrees_with_it(
    folder: Path, model: Any
) -> None:
    # one process for both: importing transformers is what takes the time
    code = f"""
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(folder)!r})
except RuntimeError as error:
    print("ignore_mismatched_sizes" in str(error))
import hf_evopress
model = AutoModelForCausalLM.from_pretrained({str(folder)!r})
with torch.no_grad():
    logits = model(torch.arange(40).view(2, 20)).logits
print(logits.view(torch.int32).long().sum().item())
"""
    env = {**os.environ, "HF_EVOPRESS_AUTOLOAD": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr
    same = logits(model).view(torch.int32).long().sum().item()
    assert run.stdout.split() == ["True", str(same)]


def test_copies_and_generation_work(folder: Path) -> None:
    loaded = load(folder)
    clone = copy.deepcopy(loaded)
    assert torch.equal(logits(clone), logits(loaded))
    prompt, options = TOKENS[:1, :5], {"max_new_tokens": 6, "do_sample": False}
    text = loaded.generate(prompt, **options)
    assert text.shape == (1, 11)
    assert torch.equal(clone.generate(prompt, cache_implementation="static", **options), text)
    assert torch.equal(clone.generate(prompt, use_cache=False, **options), text)


# -- damage ------------------------------------------------------------------------------------


def damage(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Return a copy of a one-file checkpoint with changed tensors and no checksums."""
    target.mkdir()
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"]["checksums"]
    (target / "config.json").write_text(json.dumps(settings))
    return target


@pytest.mark.parametrize("where", DEVICE_MAPS)
def test_a_missing_tensor_is_an_error_that_names_it(
    where: str, folder: Path, tmp_path: Path
) -> None:
    path = damage(folder, tmp_path / "bad", lambda tensors: tensors.pop(f"{UP}.scales"))
    with pytest.raises(ValueError, match=f"lacks 1 packed tensors.*: {UP}.scales"):
        load(path, **options_for(where, tmp_path))


@pytest.mark.parametrize("where", DEVICE_MAPS)
@pytest.mark.parametrize("ignore", [True, False])
def test_a_tensor_of_another_shape_is_an_error_that_names_it(
    where: str, ignore: bool, folder: Path, tmp_path: Path
) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.codes"] = tensors[f"{UP}.codes"][:-1].contiguous()

    path, options = damage(folder, tmp_path / "bad", cut), options_for(where, tmp_path)
    with pytest.raises(ValueError, match=rf"{UP}.codes is \(127, \d+\), not \(128, \d+\)"):
        load(path, ignore_mismatched_sizes=ignore, **options)


def test_bytes_that_are_called_other_numbers_are_an_error(folder: Path, tmp_path: Path) -> None:
    def relabel(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"].view(torch.bfloat16)

    path = damage(folder, tmp_path / "bad", relabel)  # their checksums are right
    with pytest.raises(ValueError, match=rf"{UP}.scales is of BF16, not torch.float16"):
        load(path)


def test_scales_that_were_saved_while_they_are_trained_are_loaded(
    folder: Path, tmp_path: Path
) -> None:
    model = load(folder)
    make_tunable(model, ("scales",))
    model.save_pretrained(tmp_path / "in-training")
    again = load(tmp_path / "in-training")
    assert again.get_parameter(f"{UP}.scales").dtype == torch.float16
    assert torch.equal(logits(again), logits(load(folder)))


def flip(folder: Path, target: Path, name: str) -> Path:
    """Return a copy of the checkpoint with one flipped bit in the tensor `name`."""
    target.mkdir()
    data = bytearray((folder / "model.safetensors").read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + json.loads(data[8:start])[name]["data_offsets"][0] + 5] ^= 1
    (target / "model.safetensors").write_bytes(data)
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


@pytest.mark.parametrize("name", [f"{UP}.codes", "model.embed_tokens.weight"])
def test_a_flipped_bit_is_found_and_its_tensor_named(
    name: str, folder: Path, tmp_path: Path
) -> None:
    path = flip(folder, tmp_path / "bad", name)
    with pytest.raises(ValueError, match=f"damaged, 1 tensors differ.*: {name} in"):
        load(path)


def test_a_truncated_shard_is_found_and_named(shards: Path, tmp_path: Path) -> None:
    for path in shards.iterdir():
        data = path.read_bytes()
        cut = path.name.startswith("model-00003")
        (tmp_path / path.name).write_bytes(data[:-100] if cut else data)
    with pytest.raises(ValueError, match="model-00003.* is truncated"):
        load(tmp_path)


def test_checksums_follow_training_and_casts(folder: Path, tmp_path: Path) -> None:
    loaded = load(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        loaded.get_submodule(UP).scales.mul_(2)
    again = load(save(loaded, tmp_path), dtype="auto")
    assert torch.equal(logits(again), logits(loaded))


def test_a_plan_with_an_unknown_unit_is_an_error(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"]["plan"]["levels"]["model.layers.9.mlp.up_proj"] = "zero"
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"layers\.9\.mlp\.up_proj: not in the model"):
        load(tmp_path)


# -- saving ------------------------------------------------------------------------------------


def test_a_sentinel_of_no_bytes_stands_for_each_dense_weight(folder: Path, model: Any) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in compressed_linears(model):
            assert file.get_tensor(f"{name}.weight").numel() == 0


def test_attach_refuses_layers_that_are_not_as_planned(tiny_model: Callable) -> None:
    made = tiny_model()
    plan = make_plan(made)
    with pytest.raises(ValueError, match=r"do not hold the level .*layers\.0"):
        attach(made, plan)
    compress(made, plan)
    with pytest.raises(ValueError, match="1 layers do not hold"):
        attach(made, plan.replace(levels={**plan.levels, UP: "rtn:bits=2,group_size=32"}))


def test_dequantize_gives_a_stock_model(folder: Path, model: Any, tmp_path: Path) -> None:
    stock = load(folder).dequantize()
    assert not compressed_linears(stock)
    assert torch.equal(logits(stock), logits(model))
    save(stock, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert stock.float().get_submodule(UP).weight.requires_grad


def test_dequantize_casts_the_whole_model(folder: Path) -> None:
    stock = load(folder).dequantize(dtype=torch.bfloat16)
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_dequantize_while_loading(folder: Path, model: Any) -> None:
    stock = load(folder, quantization_config=EvoPressConfig(dequantize=True))
    assert not compressed_linears(stock)
    assert not hasattr(stock, "hf_quantizer") and not stock.is_quantized
    assert torch.equal(logits(stock), logits(model))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_another_plan_over_a_compressed_model_is_refused(folder: Path, model: Any) -> None:
    other = Plan({UP: "rtn:bits=2,group_size=32"})
    with pytest.raises(ValueError, match="already compressed with another plan"):
        load(folder, quantization_config=EvoPressConfig(other))
    same = EvoPressConfig(make_plan(load(folder).dequantize()))
    assert torch.equal(logits(load(folder, quantization_config=same)), logits(model))


# -- compressing a dense checkpoint ------------------------------------------------------------


def test_a_dense_model_is_compressed_while_loading(
    dense_folder: Path, model: Any, folder: Path, tmp_path: Path
) -> None:
    plan = model.hf_quantizer.quantization_config.plan
    loaded = load(dense_folder, quantization_config=EvoPressConfig(plan))
    assert torch.equal(logits(loaded), logits(model))
    own = loaded.hf_quantizer.quantization_config
    assert own.plan.base_model == str(dense_folder)  # all else is the same
    own.plan = own.plan.replace(base_model=plan.base_model)
    assert_same_files(folder, save(loaded, tmp_path))


def test_biases_are_kept_while_compressing(tiny_model: Callable, tmp_path: Path) -> None:
    dense = tiny_model("opt")
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    plan = make_plan(dense)
    save(dense, tmp_path)
    expected = logits(compress(dense, plan))
    assert torch.equal(logits(load(tmp_path, quantization_config=EvoPressConfig(plan))), expected)


def test_device_map_auto_counts_packed_bytes(dense_folder: Path) -> None:
    dense = load(dense_folder)
    config = EvoPressConfig(Plan({UP: "rtn:bits=4,group_size=32"}))
    quantizer = EvoPressQuantizer(config, pre_quantized=False)
    quantizer._process_model_before_weight_loading(dense)
    weight = dense.get_submodule(UP).weight
    assert quantizer.param_element_size(dense, f"{UP}.weight", weight) == (4 + 20 / 32) / 8
    assert quantizer.param_element_size(dense, "lm_head.weight", dense.lm_head.weight) == 4


def test_levels_that_need_data_are_refused_without_it(dense_folder: Path) -> None:
    config = EvoPressConfig(Plan({UP: "gptq:bits=3,group_size=32"}))
    with pytest.raises(ValueError, match=r"gptq:bits=3,group_size=32 need calibration data"):
        load(dense_folder, quantization_config=config)


def test_levels_that_need_data_are_calibrated_after_loading(
    dense_folder: Path,
    tmp_path: Path,
    byte_tokenizer: Any,
    structured_text: Callable[..., str],
) -> None:
    for path in dense_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(structured_text(400))
    plan = Plan({UP: "gptq:bits=3,group_size=32", UP.replace("up", "down"): LEVELS[0]})
    config = EvoPressConfig(plan, data=str(tmp_path / "text.txt"), n_sequences=8, seq_len=64)
    loaded = load(tmp_path, quantization_config=config)
    assert sorted(compressed_linears(loaded)) == sorted(plan)
    again = load(save(loaded, tmp_path / "packed"))
    assert torch.equal(logits(again), logits(loaded))


def test_compressing_and_offloading_to_disk_at_once_is_refused(dense_folder: Path) -> None:
    config = EvoPressConfig(Plan({UP: LEVELS[0]}))
    with pytest.raises(ValueError, match="offloaded to disk"):
        load(dense_folder, quantization_config=config, device_map={"": "disk"})


def test_a_config_without_a_plan_is_refused(dense_folder: Path) -> None:
    with pytest.raises(ValueError, match="has no plan"):
        load(dense_folder, quantization_config=EvoPressConfig())


def test_tensor_parallel_loading_is_refused(model: Any) -> None:
    parallel = SimpleNamespace(
        config=SimpleNamespace(distributed_config=SimpleNamespace(tp_size=2))
    )
    with pytest.raises(ValueError, match="tp_size=2"):
        model.hf_quantizer.update_parallel_plan(parallel, {})
