"""EXL3 folders against an oracle that decodes them by exllamav3's arithmetic (exl3_decoder.py)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from hf_evopress.export.exl3 import TABLE, EXL3Export, check_plan
from hf_evopress.export.exl3_format.config import ARCHITECTURES
from hf_evopress.export.exl3_format.tensors import pack, two_halves
from hf_evopress.jobs.convert import convert
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods import compose
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

from . import exl3_decoder as oracle

FITS = "state_bits=16,rotation=128,order=mma,feedback=none"
LEVEL = f"trellis:bits=3,codebook=mul1,{FITS}"
ATTENTION, MLP = "model.layers.0.self_attn.", "model.layers.0.mlp."
CODED = {
    f"{ATTENTION}q_proj": LEVEL,
    f"{ATTENTION}k_proj": f"trellis:bits=2,codebook=mul1,scales=channels,seed=5,{FITS}",
    f"{MLP}down_proj": f"trellis:bits=5,codebook=mul1,scales=channels,{FITS}",
}
IDS = torch.arange(3, 35).view(2, 16)
TinyModel = Callable[..., Any]


def tiny(make: TinyModel, arch: str = "llama", **more: Any) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return make(arch, **{**sizes, **heads, **more})


def in_numpy(tensors: dict[str, torch.Tensor], unit: str = "") -> dict[str, Any]:
    start = f"{unit}." if unit else ""
    own = {k: t for k, t in tensors.items() if k.startswith(start)}
    return {k.removeprefix(start): t.numpy() for k, t in own.items() if t.dtype != torch.bfloat16}


def random_state(level: str, shape: tuple[int, int]) -> dict[str, torch.Tensor]:
    """Return a state of any codes: every one stands for some weight."""
    g = torch.Generator().manual_seed(len(level))
    made = {}
    for name, like in compose.empty(compose.normalize(level), shape, torch.float32).items():
        if like.dtype == torch.uint8:
            made[name] = torch.randint(256, like.shape, generator=g, dtype=torch.uint8)
        else:
            made[name] = (torch.rand(like.shape, generator=g) / 10 + 0.01).to(like.dtype)
    return made


@pytest.fixture(scope="module")
def home(
    tiny_model: TinyModel, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with a model at CODED in small/, its bfloat16 tensors dense, and exl3/."""
    folder = tmp_path_factory.mktemp("exl3")
    model = tiny(tiny_model).to(torch.bfloat16)
    shapes = {u.name: u.shape for u in find_units(model)}
    plan = Plan({u: CODED.get(u, "dense") for u in shapes}, shapes)
    compress_model(model, plan, None)
    attach(model, plan)
    model.save_pretrained(folder / "small")
    byte_tokenizer.save_pretrained(folder / "small")
    convert(str(folder / "small"), folder / "exl3", format="exl3")
    return folder


@pytest.mark.parametrize("codebook", ["mul1", "mcg", "3inst"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_packed_tensors_decode_to_the_same_weight(bits: int, codebook: str) -> None:
    scales = ("tensor", "channels")[bits % 2]
    level = compose.normalize(
        f"trellis:bits={bits},codebook={codebook},scales={scales},seed={bits},{FITS}"
    )
    shape = (256, 128)
    state = random_state(str(level), shape)
    W = compose.decompress(level, state, shape, torch.float32)
    found = torch.from_numpy(oracle.weight(in_numpy(pack(level, state, shape))))
    # sums of float32; one scale as two halves moves all weights by 2^-17 at most
    most = 1e-6 if scales == "channels" else 2**-17
    assert float((found - W).norm() / W.norm()) < most


def test_exported_weights_and_logits_are_those_of_the_model(home: Path) -> None:
    tensors = load_file(home / "exl3" / "model.safetensors")
    ours: Any = AutoModelForCausalLM.from_pretrained(home / "small", dtype=torch.float32).eval()
    theirs = copy.deepcopy(ours).dequantize()
    for unit, level in CODED.items():
        packed = ours.get_submodule(unit)
        shape = (packed.out_features, packed.in_features)
        state = dict(packed.state)
        W = compose.decompress(compose.normalize(level), state, shape, torch.float32)
        found = torch.from_numpy(oracle.weight(in_numpy(tensors, unit)))
        assert float((found - W).norm() / W.norm()) < (1e-6 if "channels" in level else 2**-17)
        theirs.get_submodule(unit).weight.data = found.float()
    rest = {k: t for k, t in tensors.items() if not k.startswith(tuple(CODED))}
    known = theirs.state_dict()
    assert {k for k in known if not k.startswith(tuple(CODED))} == set(rest)
    assert all(torch.equal(known[k], t.float()) for k, t in rest.items())
    with torch.no_grad():
        assert torch.allclose(ours(IDS).logits, theirs(IDS).logits, atol=1e-4)


def test_half_arithmetic_of_their_kernels_stays_within_half_precision(home: Path) -> None:
    tensors = load_file(home / "exl3" / "model.safetensors")
    x = torch.randn(7, 128, generator=torch.Generator().manual_seed(0)).half()
    own = in_numpy(tensors, f"{ATTENTION}q_proj")
    exact = x.double().numpy() @ oracle.weight(own).T
    error = np.linalg.norm(oracle.product(x.numpy(), own) - exact) / np.linalg.norm(exact)
    assert error < 2**-10


def test_the_folder_says_what_exllamav3_asks_for(home: Path) -> None:
    config = json.loads((home / "exl3" / "config.json").read_text())
    said, table = config["quantization_config"], json.loads((home / "exl3" / TABLE).read_text())
    assert said["quant_method"] == "exl3" and said["codebook"] == "mul1"
    assert said["head_bits"] == 16
    sizes = (128 * 128, 128 * 128, 128 * 256)
    assert said["bits"] == pytest.approx(np.average([3, 2, 5], weights=sizes), abs=1e-4)
    assert config["architectures"] == ["LlamaForCausalLM"]
    entry = table["tensor_storage"][f"{ATTENTION}k_proj"]
    assert (entry["quant_format"], entry["bits_per_weight"]) == ("exl3", 2)
    assert entry["mul1_multiplier"] == 0x83DCD12D
    trellis = entry["stored_tensors"][f"{ATTENTION}k_proj.trellis"]
    assert trellis == {"shape": [8, 8, 32], "n_bytes": 128 * 128 * 2 // 8, "dtype": "torch.int16"}
    assert (home / "exl3" / "tokenizer.json").is_file()
    plan = Plan.load(home / "exl3")
    assert str(plan[f"{ATTENTION}q_proj"]) == str(compose.normalize(LEVEL))


def test_a_product_of_two_halves_is_near_to_any_scale() -> None:
    g = torch.Generator().manual_seed(0)
    for x in (*(torch.randn(50, generator=g) * 0.05).tolist(), 3e-5, -12.0, 1.0):
        a, b = two_halves(x)
        assert [float(torch.tensor(n).half()) for n in (a, b)] == [a, b]
        assert a * b == pytest.approx(x, rel=2**-17)
    assert two_halves(0.0) == (0.0, 0.0)


@pytest.mark.parametrize(
    "level, reason",
    [
        ("rtn:bits=4,group_size=32", "q_proj: level 'rtn.*is not one trellis term"),
        (f"{LEVEL} + lowrank:rank=4,metric=plain", "is not one trellis term"),
        (LEVEL.replace("bits=16", "bits=12"), "state_bits=12 where it has 16"),
        (LEVEL.replace("bits=3,", "bits=2.5,"), "bits=2.5 where it has whole ones"),
        (LEVEL.replace("=128", "=full"), "rotation=full where it has 128"),
        (LEVEL.replace("=mma", "=rows"), "order=rows where it has mma"),
        (LEVEL.replace("mul1", "strata"), "codebook=strata where it has mul1, mcg, 3inst"),
        (f"{LEVEL},tail_biting=false", "tail_biting=false where it has true"),
    ],
)
def test_levels_without_a_place_are_refused_by_name(
    level: str, reason: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    plan = Plan({f"{ATTENTION}q_proj": level, f"{ATTENTION}k_proj": LEVEL})
    with pytest.raises(ValueError, match=f"{reason}.*--for exl3.*or use the evopress") as info:
        EXL3Export().save(tiny(tiny_model), plan, _none, tmp_path / "x")
    assert "k_proj" not in str(info.value)
    assert not (tmp_path / "x").exists()


def test_plans_and_models_without_a_place_are_refused(tiny_model: TinyModel) -> None:
    model, unit = tiny(tiny_model), f"{ATTENTION}q_proj"
    with pytest.raises(ValueError, match="self_attn: it is dropped"):
        check_plan(model, Plan({"model.layers.0.self_attn": "drop", unit: "dense"}))
    with pytest.raises(ValueError, match="leaves all layers dense"):
        check_plan(model, Plan({unit: "dense"}))
    both = {unit: LEVEL, f"{ATTENTION}k_proj": LEVEL.replace("mul1", "mcg")}
    with pytest.raises(ValueError, match="one codebook, and the plan has mcg and mul1"):
        check_plan(model, Plan(both))
    with pytest.raises(ValueError, match="no GPTNeoXForCausalLM can be written"):
        check_plan(tiny_model("gpt_neox"), Plan({unit: "dense"}))
    wide = tiny(tiny_model, intermediate_size=192)
    with pytest.raises(
        ValueError, match="down_proj: its 128 x 192 weights are no multiples of 128"
    ):
        check_plan(wide, Plan({f"{MLP}down_proj": LEVEL}))


def test_truncated_codes_are_refused_before_anything_is_written(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    unit = f"{ATTENTION}q_proj"
    state = random_state(LEVEL, (128, 128))
    state["codes"] = state["codes"][:4]
    with pytest.raises(
        ValueError, match=r"q_proj: .*codes of shape \(8, 8, 96\), got \(4, 8, 96\)"
    ):
        EXL3Export().save(tiny(tiny_model), Plan({unit: LEVEL}), lambda *_: state, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_biases_heads_and_ends_of_other_levels(
    tiny_model: TinyModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Qwen2 has biases; the untied head takes a level of EXL3's, the embedding is written dense."""
    model = tiny(tiny_model, "qwen2", tie_word_embeddings=False)
    unit, head = f"{ATTENTION}q_proj", "lm_head"
    nn.init.normal_(model.get_submodule(unit).bias)
    bias = model.get_submodule(unit).bias.detach().clone()
    levels = {unit: LEVEL, head: LEVEL, "model.embed_tokens": "rtn:bits=8,group_size=32"}
    states = {u: random_state(x, (128 if u == unit else 256, 128)) for u, x in levels.items()}
    folder = EXL3Export().save(model, Plan(levels), lambda u, _: states[u], tmp_path / "x")
    assert "model.embed_tokens (rtn:bits=8" in caplog.text and "written dense" in caplog.text
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors[f"{unit}.bias"], bias.half())
    assert tensors["lm_head.trellis"].shape == (8, 16, 48)
    rtn = compose.normalize(levels["model.embed_tokens"])
    rows = compose.decompress(rtn, states["model.embed_tokens"], (256, 128), torch.float32)
    assert torch.equal(tensors["model.embed_tokens.weight"], rows)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["head_bits"] == 3


def test_a_tied_head_is_left_to_the_embedding(tiny_model: TinyModel, tmp_path: Path) -> None:
    model = tiny(tiny_model, tie_word_embeddings=True)
    unit = f"{ATTENTION}q_proj"
    state = random_state(LEVEL, (128, 128))
    folder = EXL3Export().save(model, Plan({unit: LEVEL}), lambda *_: state, tmp_path / "x")
    assert not any(k.startswith("lm_head") for k in load_file(folder / "model.safetensors"))
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True


def test_layers_of_known_architectures_have_exllamav3_names() -> None:
    """Its loader asks for these names; a fused layer of transformers would have another."""
    import transformers

    known = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    for name in ARCHITECTURES:
        kind = getattr(transformers, name, None)
        if kind is None:  # an older transformers
            continue
        sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
        config = kind.config_class(**sizes, num_attention_heads=4, num_key_value_heads=4)
        with torch.device("meta"):
            model = kind(config)
        found = {n.rpartition(".") for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert {last for path, _, last in found if path} <= known, name
        paths = {path for path, _, _ in found if path}
        assert paths == {"model.layers.0.self_attn", "model.layers.0.mlp"}, name


def _none(*_: Any) -> Any:
    raise AssertionError("nothing is asked for before the plan is checked")
