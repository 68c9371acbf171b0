"""Adapter folders: stock PEFT reads what we write, and what does not fit is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_evopress.adapters.folder import (
    activate,
    adapter_bytes,
    load_adapter,
    read_adapter,
    write_adapter,
)
from hf_evopress.models.units import find_units


def random_factors(model: nn.Module, *, seed: int = 0) -> dict[str, Any]:
    """Return factors of rank 1 to 5 for every linear layer."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for i, unit in enumerate(find_units(model)):
        rank, (rows, columns) = 1 + i % 5, unit.shape
        A = torch.randn(rank, columns, generator=generator).bfloat16()
        B = (0.02 * torch.randn(rows, rank, generator=generator)).bfloat16()
        made[unit.name] = (A, B)
    return made


def added(model: nn.Module, factors: dict[str, Any]) -> nn.Module:
    """Return a copy of the model with B A added to its weights."""
    model = copy.deepcopy(model)
    for name, (A, B) in factors.items():
        model.get_submodule(name).weight.data += B.float() @ A.float()
    return model


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


@pytest.fixture
def ids(text_tokens: Any) -> torch.Tensor:
    return text_tokens(2, 16)


def test_stock_peft_reads_mixed_ranks_at_scaling_one(
    tiny_model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny_model(num_hidden_layers=12)  # layer 1 is no prefix of layers 10 and 11
    factors = random_factors(model)
    write_adapter(tmp_path, factors)
    stock = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
    scalings = {m.scaling["default"] for m in stock.modules() if hasattr(m, "lora_A")}
    assert scalings == {1.0}
    assert torch.allclose(logits(stock, ids), logits(added(model, factors), ids), atol=1e-4)


def test_reading_gives_back_what_was_written(tiny_model: Any, tmp_path: Path) -> None:
    factors = random_factors(tiny_model())
    write_adapter(tmp_path, factors, base_model="me/model", about={"made_by": "eora"})
    read = read_adapter(tmp_path)
    assert read.about == {"made_by": "eora"}
    assert read.config["base_model_name_or_path"] == "me/model"
    assert set(read.scaling.values()) == {1.0}
    for name, (A, B) in factors.items():
        assert torch.equal(read.factors[name][0], A) and torch.equal(read.factors[name][1], B)


def test_the_declared_size_is_at_least_the_file_and_close_to_it(
    tiny_model: Any, tmp_path: Path
) -> None:
    model = tiny_model()
    factors = random_factors(model)
    write_adapter(tmp_path, factors)
    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    declared = adapter_bytes({u.name: u.shape for u in find_units(model)}, ranks)
    written = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert written <= declared <= written + 90 * len(ranks) + 1000


def test_adapters_that_peft_wrote_are_read_with_their_scaling(
    tiny_model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny_model()
    for rslora in (False, True):
        config = LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=rslora,
            target_modules=["q_proj", "up_proj"],
            rank_pattern={"up_proj": 2},
            alpha_pattern={"up_proj": 5},
            init_lora_weights=False,
        )
        made = get_peft_model(copy.deepcopy(model), config)
        made.save_pretrained(tmp_path)
        read = read_adapter(tmp_path)
        changed = copy.deepcopy(model)
        for name in read.factors:
            changed.get_submodule(name).weight.data += read.delta(name)
        assert torch.allclose(logits(changed, ids), logits(made, ids), atol=1e-4)


def test_a_slice_keeps_the_first_components(tiny_model: Any, tmp_path: Path) -> None:
    factors = random_factors(tiny_model())
    write_adapter(tmp_path, factors)
    cut = read_adapter(tmp_path).sliced(2)
    assert set(cut.ranks.values()) == {1, 2}
    for name, (A, B) in factors.items():
        assert torch.equal(cut.factors[name][0], A[:2])
        assert torch.equal(cut.factors[name][1], B[:, :2])


def test_a_frozen_adapter_works_beside_a_trained_one(
    tiny_model: Any, ids: torch.Tensor, tmp_path: Path
) -> None:
    model = tiny_model()
    write_adapter(tmp_path / "one", random_factors(model, seed=1))
    write_adapter(tmp_path / "two", random_factors(model, seed=2))
    made = load_adapter(copy.deepcopy(model), tmp_path / "one", name="one")
    made = load_adapter(made, tmp_path / "two", name="two", is_trainable=True)
    trained = {n for n, p in made.named_parameters() if p.requires_grad}
    assert trained and all(".two." in name for name in trained)
    both = added(added(model, random_factors(model, seed=1)), random_factors(model, seed=2))
    assert torch.allclose(logits(made, ids), logits(both, ids), atol=1e-4)
    activate(made, ["two"], train=[])
    two = added(model, random_factors(model, seed=2))
    assert torch.allclose(logits(made, ids), logits(two, ids), atol=1e-4)


def test_a_name_that_is_taken_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model()
    write_adapter(tmp_path, random_factors(model))
    made = load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"already has an adapter called 'default'.*name="):
        load_adapter(made, tmp_path)


def test_an_adapter_of_another_model_is_refused(tiny_model: Any, tmp_path: Path) -> None:
    write_adapter(tmp_path, random_factors(tiny_model()), base_model="me/base")
    with pytest.raises(ValueError, match=r"does not fit.*me/base[\s\S]*is \(96, 64\)"):
        load_adapter(tiny_model(intermediate_size=96), tmp_path)
    with pytest.raises(ValueError, match=r"layers\.1\.\S+ is not in the model"):
        load_adapter(tiny_model(num_hidden_layers=1), tmp_path)


def test_an_adapter_is_not_written_beside_a_model(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a model.*folder of its own"):
        write_adapter(tmp_path, random_factors(model))
    with pytest.raises(ValueError, match="no factors"):
        write_adapter(tmp_path / "adapter", {})


def test_folders_that_are_no_plain_adapter_say_why(tiny_model: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        read_adapter(tmp_path)
    write_adapter(tmp_path, random_factors(tiny_model()))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    with pytest.raises(ValueError, match="use_dora=True.*merge_and_unload"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="IA3"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({"x.y": torch.zeros(1), **tensors}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"'x\.y'"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="damaged"):
        read_adapter(tmp_path)
