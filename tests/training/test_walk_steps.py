"""The P-step on trellis codes: tiles are coded again downhill, at the same bytes."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_evopress import PVTuning
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.methods import compose
from hf_evopress.refine.distillation import distillation_loss, teacher_targets
from hf_evopress.training.checkpoints import train
from hf_evopress.training.settings import Tuning
from hf_evopress.training.tunable import settle
from hf_evopress.training.tune import tune
from hf_evopress.training.walk_steps import move_walks, rotated_gradient

LEVEL = "trellis:bits=2,state_bits=8"
FREE = "trellis:bits=2,state_bits=6,tail_biting=false"
HALF = "trellis:bits=2.5,state_bits=6,tail_biting=false,codebook=weyl"
CHANNELS = "trellis:bits=2,state_bits=8,scales=channels,order=mma"


@pytest.fixture(scope="module")
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(32, 48)


@pytest.fixture(scope="module")
def place(trained_llama: Any, tokens: Tensor, write_model: Any, tmp_path_factory: Any) -> Path:
    """A folder with dense/ and small/: levels with and without stored starts, half and half."""
    folder = tmp_path_factory.mktemp("walks")
    return write_model(folder, copy.deepcopy(trained_llama), LEVEL, FREE, tokens=tokens)


@pytest.fixture
def model(place: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(place / "small")


def packed(shape: tuple[int, int], text: str) -> tuple[Any, dict[str, Tensor], dict[str, Any]]:
    level = compose.normalize(text)
    W = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    state = compose.compress(level, W, None)
    return level, state, next(compose.terms(level, state))[1]


def ones(shape: tuple[int, int]) -> Tensor:
    return torch.ones(shape[1])


@pytest.mark.parametrize("shape", [(64, 96), (40, 33)])  # whole tiles, and padded ones
@pytest.mark.parametrize("text", [LEVEL, FREE, CHANNELS, HALF])
def test_a_step_codes_few_tiles_again_and_goes_downhill(shape: tuple[int, int], text: str) -> None:
    level, state, params = packed(shape, f"{text},feedback=none")
    G = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    before = compose.decompress(level, state, shape, torch.float32)
    sizes = {name: tensor.shape for name, tensor in state.items()}
    moved, n_changed = move_walks(state, G, ones(shape), params, max_change=0.25, trust=10.0)
    change = compose.decompress(level, state, shape, torch.float32) - before
    assert 0 < int(moved.sum()) <= math.ceil(0.25 * moved.numel()) and n_changed > 0
    assert float((change * G).sum()) < 0
    assert {name: tensor.shape for name, tensor in state.items()} == sizes
    # in the rotated basis other tiles are as they were
    if text == CHANNELS:
        change /= state["row_scales"].float().unsqueeze(1) * state["column_scales"].float()
    still = rotated_gradient(change, params)
    for r, c in (~moved).nonzero().tolist():
        part = still[16 * r : 16 * r + 16, 16 * c : 16 * c + 16]
        assert float(part.abs().sum() if part.numel() else 0.0) < 1e-3


@pytest.mark.parametrize("text", [LEVEL, FREE, HALF])
def test_a_step_is_the_same_on_any_device(device: torch.device, text: str) -> None:
    _, state, params = packed((64, 96), f"{text},feedback=none")
    there = {name: tensor.clone().to(device) for name, tensor in state.items()}
    G = torch.randn(64, 96, generator=torch.Generator().manual_seed(5))
    how = {"max_change": 0.25, "trust": 10.0}
    x = torch.rand(96, generator=torch.Generator().manual_seed(7)) + 0.1
    moved, n_changed = move_walks(state, G, x, params, **how)
    moved_there, n_there = move_walks(there, G.to(device), x.to(device), params, **how)
    assert moved_there.device.type == device.type and n_there == n_changed > 0
    assert torch.equal(moved_there.cpu(), moved)
    assert all(torch.equal(there[name].cpu(), tensor) for name, tensor in state.items())


def test_the_trust_ratio_bounds_what_a_step_changes() -> None:
    level, state, params = packed((64, 96), f"{LEVEL},feedback=none")
    before = compose.decompress(level, state, (64, 96), torch.float32)
    G = torch.randn(64, 96, generator=torch.Generator().manual_seed(5))
    move_walks(state, G, ones((64, 96)), params, max_change=1.0, trust=0.06)
    after = compose.decompress(level, state, (64, 96), torch.float32)
    assert 0.02 < float((after - before).norm() / before.norm()) < 0.065


@pytest.mark.parametrize("text", [LEVEL, CHANNELS])
def test_outputs_are_what_is_bounded_and_large_inputs_do_not_lead(text: str) -> None:
    """Two columns with a thousand times the inputs of others have all of the gradient's size."""
    level, state, params = packed((64, 96), f"{text},feedback=none")
    before = compose.decompress(level, state, (64, 96), torch.float32)
    generator = torch.Generator().manual_seed(5)
    x = torch.ones(96)
    x[:2] = 1e6
    G = torch.randn(64, 96, generator=generator) * x.sqrt()
    G[:, 40:48] *= 10  # of ordinary inputs these have the most to gain
    move_walks(state, G, x, params, max_change=1.0, trust=0.15)
    change = compose.decompress(level, state, (64, 96), torch.float32) - before
    size = (change.square() * x).sum().sqrt() / (before.square() * x).sum().sqrt()
    assert 0 < float(size) < 0.155
    along = -(change * G / x).sum(0)  # how far each column went downhill
    assert float(along[40:48].mean()) > 3 * float(along[48:].abs().mean())
    assert float((change * G).sum()) < 0


def test_no_gradient_changes_nothing() -> None:
    _, state, params = packed((32, 32), f"{LEVEL},feedback=none")
    before = {name: tensor.clone() for name, tensor in state.items()}
    how = {"max_change": 1.0, "trust": 1.0}
    moved, n_changed = move_walks(state, torch.zeros(32, 32), ones((32, 32)), params, **how)
    assert not moved.any() and n_changed == 0
    assert all(torch.equal(tensor, state[name]) for name, tensor in before.items())


def test_p_steps_alone_lower_the_loss_at_equal_bytes_and_reload(
    trained_llama: Any, model: Any, tokens: Tensor, text_tokens: Any, tmp_path: Path
) -> None:
    unseen = text_tokens(8, 48, seed=9)

    def loss(made: Any, ids: Tensor) -> Tensor:
        with torch.no_grad():
            targets = teacher_targets(trained_llama(input_ids=ids, use_cache=False).logits)
        return distillation_loss(made(input_ids=ids, use_cache=False).logits, *targets)

    def judged(made: Any) -> tuple[float, float]:
        with torch.no_grad():
            return float(loss(made, tokens)), float(loss(made, unseen))

    before = judged(model)
    optimizer = PVTuning(model, lr=1e-12, max_change=0.1, trust=0.05, every=2)  # floats stand still
    for i in range(30):
        loss(model, tokens[8 * (i % 4) : 8 * (i % 4) + 8]).backward()
        optimizer.step()
        optimizer.zero_grad()
    settle(model)
    after = judged(model)
    assert optimizer.n_changed > 0
    assert after[0] < 0.9 * before[0] and after[1] < 0.95 * before[1]
    model.save_pretrained(tmp_path / "moved")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "moved").state_dict()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    for layer in compressed_linears(model).values():
        bits = sum(8 * t.numel() * t.element_size() for t in layer.state.values())
        assert bits == compose.cost_bits(layer.level, layer.shape)


QUICK: dict[str, Any] = {
    "train": "codes", "teacher": "dense", "steps": 12, "batch": 8, "seq_len": 32, "sequences": 64,
    "save_steps": 4, "max_change": 0.1, "trust": 0.04, "every": 3,
}  # fmt: skip


@pytest.fixture
def there(place: Path, structured_text: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    (place / "text.txt").write_text(structured_text(600))
    monkeypatch.chdir(place)
    return place


class Killed(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 7:
            raise KeyboardInterrupt


def test_tune_moves_codes_and_a_killed_run_goes_on_to_the_same_bytes(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = tune("small", tmp_path / "a", Tuning(**QUICK), data=["text.txt"])
    assert straight.is_kept and straight.kl is not None and straight.kl[1] < straight.kl[0]

    def until_killed(trainer: Any, work: Path) -> None:
        trainer.add_callback(Killed())
        train(trainer, work)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hf_evopress.training.tune.train", until_killed)
        tune("small", tmp_path / "b", Tuning(**QUICK), data=["text.txt"])
    assert (tmp_path / "b.work/checkpoint-4").is_dir() and not (tmp_path / "b").exists()
    tune("small", tmp_path / "b", Tuning(**QUICK), data=["text.txt"])
    name = "model.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    made, start = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (tmp_path / "a", "small")
    )
    assert any(not torch.equal(made[n], start[n]) for n in start if n.endswith("codes"))


def test_levels_without_a_p_step_are_refused_by_name_before_any_text_is_read(
    there: Path, trained_llama: Any, write_model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = copy.deepcopy(trained_llama)
    folder = write_model(tmp_path, model, "lowrank:rank=4", tokens=tokens)
    with pytest.raises(ValueError, match="rtn, gptq and trellis levels.*lowrank:rank=4"):
        tune(str(folder / "small"), tmp_path / "out", Tuning(**QUICK), data=["missing.txt"])
    with pytest.raises(ValueError, match="got max_change=0.01, trust=0"):
        Tuning(train="codes", trust=0)
    with pytest.raises(
        ValueError, match="codes change every 8 steps, and the run has 5: .*--every"
    ):
        Tuning(train="codes", steps=5)
    with pytest.raises(ValueError, match="cannot train 'code'.*did you mean 'codes'"):
        Tuning(train="code")
    settings = json.loads((there / "small/config.json").read_text())["quantization_config"]
    assert LEVEL in settings["plan"]["levels"].values()  # the message's levels are a plan's


def test_without_a_teacher_walks_are_refused_before_any_text(there: Path, tmp_path: Path) -> None:
    alone = Tuning(**{**QUICK, "teacher": None})
    with pytest.raises(ValueError, match="moving the codes of trellis.*give --teacher DENSE"):
        tune("small", tmp_path / "out", alone, data=["missing.txt"])
