"""Compressed models in formats that are loaded without hf_evopress."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_evopress.cli import main
from hf_evopress.jobs.convert import convert
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.methods import compose
from hf_evopress.models.plain import make_plain
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

IDS = torch.arange(3, 35).view(2, 16)
LEVELS = ("rtn:bits=3,group_size=32,symmetric=true", "rtn:bits=8,group_size=-1,symmetric=true")
TinyModel = Callable[..., Any]


@pytest.fixture
def make(
    tiny_model: TinyModel, byte_tokenizer: Any, text_tokens: Any, tmp_path: Path
) -> Callable[..., Path]:
    """make(arch, *levels, **more) -> a compressed folder; levels go round, more are dropped."""

    def made(arch: str, *levels: str, **more: str) -> Path:
        model = tiny_model(arch)
        make_plain(model)
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
        units = find_units(model)
        plan = {u.name: levels[i % len(levels)] for i, u in enumerate(units)}
        dropped = tuple(f"{name}." for name in more)
        plan = {u: x for u, x in plan.items() if not u.startswith(dropped or "-")} | more
        shapes = {u.name: u.shape for u in units if u.name in plan}
        whole = Plan(plan, shapes=shapes, base_model="me/dense")
        compress_model(model, whole, text_tokens(4, 16))
        attach(model, whole)
        model.save_pretrained(tmp_path / "small")
        byte_tokenizer.save_pretrained(tmp_path / "small")
        whole.save(tmp_path / "small")
        return tmp_path / "small"

    return made


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    ("arch", "levels"),
    [
        ("llama", LEVELS),
        ("gpt2", ("rtn:bits=4,group_size=32",)),
        ("falcon", ("rtn:bits=4,group_size=32",)),
        ("mixtral", ("rtn:bits=4,group_size=32",)),
        ("opt", ("lowrank:rank=8,centred=true", "rtn:bits=4,group_size=32")),
    ],
)
def test_a_dense_export_computes_what_the_packed_model_does(
    arch: str, levels: tuple[str, ...], make: Callable[..., Path]
) -> None:
    small = make(arch, *levels)
    folder = convert(str(small), small.parent / "dense", format="dense")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert torch.allclose(logits(folder), logits(small), atol=2e-5)
    assert Plan.load(folder) == Plan.load(small)
    assert (folder / "tokenizer_config.json").is_file()


def test_each_weight_is_computed_once(
    make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    small = make("llama", *LEVELS)
    computed: list[Any] = []
    own = compose.decompress
    monkeypatch.setattr(compose, "decompress", lambda *a: computed.append(a[0]) or own(*a))
    convert(str(small), small.parent / "dense", format="dense")
    assert len(computed) == len(Plan.load(small))


@pytest.mark.parametrize("format", ["dense", "pruned"])
def test_dropped_blocks_go_or_become_zero(format: str, make: Callable[..., Path]) -> None:
    drops = {"model.layers.0.self_attn": "drop", "model.layers.0.mlp": "drop"}
    small = make("llama", "rtn:bits=4,group_size=32", **drops)
    folder = convert(str(small), small.parent / format, format=format)
    n_layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    assert n_layers == (1 if format == "pruned" else 2)
    assert torch.allclose(logits(folder), logits(small), atol=2e-5)


def test_codes_go_to_compressed_tensors(make: Callable[..., Path]) -> None:
    pytest.importorskip("compressed_tensors", reason="an extra: hf-evopress[compressed-tensors]")
    small = make("llama", *LEVELS)
    folder = convert(str(small), small.parent / "ct", format="compressed_tensors")
    assert torch.equal(logits(folder), logits(small))


@pytest.mark.parametrize("arch, kind", [("gpt2", "Conv1D"), ("falcon", "FalconLinear")])
def test_compressed_tensors_refuses_layers_of_other_classes_by_name(
    arch: str, kind: str, make: Callable[..., Path]
) -> None:
    pytest.importorskip("compressed_tensors", reason="an extra: hf-evopress[compressed-tensors]")
    small = make(arch, "rtn:bits=4,group_size=32,symmetric=true")
    with pytest.raises(ValueError, match=rf"transformer\.h\.0\.\S+: it is a {kind} there"):
        convert(str(small), small.parent / "ct", format="compressed_tensors")
    assert not (small.parent / "ct").exists()


@pytest.mark.parametrize("format", ["dense", "compressed_tensors"])
def test_an_export_that_would_load_as_another_model_is_not_kept(
    format: str, make: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("compressed_tensors", reason="an extra: hf-evopress[compressed-tensors]")
    small = make("llama", *LEVELS)
    own = AutoModelForCausalLM.from_pretrained

    def loads_noise(folder: Path, **options: Any) -> Any:  # as Conv1D did in compressed-tensors
        model, info = own(folder, **options)
        model(IDS)
        model.model.layers[1].mlp.up_proj.weight.data.normal_()
        return model, info

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", loads_noise)
    monkeypatch.setattr(
        "hf_evopress.jobs.convert.load", lambda name, dtype, kind: own(name, dtype=dtype)
    )
    with pytest.raises(RuntimeError, match=r"another model .*layers\.1\.mlp\.up_proj\.weight"):
        convert(str(small), small.parent / "out", format=format)
    assert not (small.parent / "out").exists()


def test_the_command_writes_and_says_how_large(
    make: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    small = make("llama", *LEVELS)
    out = small.parent / "stock"
    with pytest.raises(SystemExit) as ended:
        main(["export", str(small), "--format", "dense", "--out", str(out)])
    assert not ended.value.code
    assert f"{out}: " in capsys.readouterr().out


def test_what_cannot_be_is_said(make: Callable[..., Path], tiny_model: TinyModel) -> None:
    small = make("llama", *LEVELS)
    with pytest.raises(ValueError, match="did you mean 'dense'"):
        convert(str(small), small.parent / "x", format="dence")
    tiny_model("llama").save_pretrained(small.parent / "plain")
    with pytest.raises(ValueError, match="it has no plan"):
        convert(str(small.parent / "plain"), small.parent / "x", format="dense")
    with pytest.raises(ValueError, match="drops no block"):
        convert(str(small), small.parent / "x", format="pruned")
    assert not (small.parent / "x").exists()
