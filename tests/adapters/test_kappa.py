"""KappaTune over packed layers chooses what PEFT chooses on the dense model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import find_kappa_target_modules
from torch import nn

from hf_evopress.adapters.kappa import FILE, condition_numbers, kappa_targets
from hf_evopress.loading.layers import compress_linear
from hf_evopress.methods import compose
from hf_evopress.models.units import find_units


def packed(model: nn.Module, levels: dict[str, str]) -> nn.Module:
    for unit in find_units(model):
        level = levels.get(unit.name.rpartition(".")[2])
        if level is not None:
            linear = model.get_submodule(unit.name)
            parsed = compose.normalize(level)
            state = compose.compress(parsed, linear.weight.detach(), None)
            model.set_submodule(unit.name, compress_linear(linear, parsed, state))
    return model


def test_on_a_dense_model_it_is_what_peft_finds(trained_llama: Any) -> None:
    expected = find_kappa_target_modules(trained_llama, top_p=0.3, show_progress=False)
    assert kappa_targets(trained_llama, 0.3, everywhere=True) == expected["target_modules"]


def test_packed_layers_count_as_their_dequantized_weights(trained_llama: Any) -> None:
    model = packed(copy.deepcopy(trained_llama), {"q_proj": "rtn:bits=8,group_size=32"})
    dense = copy.deepcopy(trained_llama)
    for unit in find_units(dense):
        dense.get_submodule(unit.name).weight.data = (
            model.get_submodule(unit.name).weight.detach().clone()
        )
    assert kappa_targets(model, 0.4) == kappa_targets(dense, 0.4)


def test_a_low_rank_layer_is_judged_by_the_values_it_stores(tiny_model: Any) -> None:
    model = tiny_model()
    name = "model.layers.0.self_attn.o_proj"
    linear = model.get_submodule(name)
    Q, _ = torch.linalg.qr(torch.randn(64, 64))
    linear.weight.data = Q[:, :8] @ Q[:, 8:16].T  # eight equal singular values, 56 zeros
    assert name not in kappa_targets(model, 0.99)
    assert kappa_targets(packed(model, {"o_proj": "lowrank:rank=8,metric=plain"}), 0.05) == [name]


def test_layers_that_store_nothing_are_left_out(tiny_model: Any) -> None:
    model = packed(tiny_model(), {"down_proj": "zero"})
    everything = kappa_targets(model, 1.0)
    assert len(everything) == len(find_units(model)) - 2
    assert not any("down_proj" in name for name in everything)


def test_numbers_are_those_of_numpy(trained_llama: Any) -> None:
    numbers = condition_numbers(trained_llama)
    for name, number in numbers.items():
        W = trained_llama.get_submodule(name).weight.double().numpy()
        assert number == pytest.approx(np.linalg.cond(W), rel=1e-3)


def test_numbers_are_kept_for_the_same_weights_only(
    trained_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, file = (
        packed(copy.deepcopy(trained_llama), {"q_proj": "rtn:bits=8,group_size=32"}),
        tmp_path / FILE,
    )
    targets = kappa_targets(model, 0.3, cache=file)
    calls: list[nn.Module] = []
    monkeypatch.setattr(
        "hf_evopress.adapters.kappa._kappa", lambda layer: calls.append(layer) or 1.0
    )
    assert kappa_targets(model, 0.3, cache=file) == targets == kappa_targets(model, 0.3, cache=file)
    assert not calls
    other = packed(copy.deepcopy(trained_llama), {"q_proj": "rtn:bits=4,group_size=32"})
    kappa_targets(other, 0.3, cache=file)
    assert len(calls) == len(find_units(other))


def test_a_damaged_file_of_numbers_is_named(tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("[]")
    with pytest.raises(ValueError, match=r"kappa\.json is damaged; remove it"):
        kappa_targets(tiny_model(), cache=tmp_path / FILE)


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_is_between_0_and_1(tiny_model: Any, share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        kappa_targets(tiny_model(), share)
