"""PV-Tuning: codes and scales trained together, the bytes of the level unchanged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_evopress import PVTuning
from hf_evopress.loading.layers import CompressedLinear, compressed_linears
from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.refine.distillation import Sequences
from hf_evopress.training.settings import Tuning
from hf_evopress.training.trainer import DistillationTrainer
from hf_evopress.training.tunable import make_tunable, settle
from hf_evopress.training.tune import tune

LEVEL = "rtn:bits=2,group_size=32"


@pytest.fixture(scope="module")
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(32, 48)


@pytest.fixture(scope="module")
def folder(trained_llama: Any, tokens: Tensor, write_model: Any, tmp_path_factory: Any) -> Path:
    place = tmp_path_factory.mktemp("compressed")
    return write_model(place, copy.deepcopy(trained_llama), LEVEL, tokens=tokens) / "small"


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "report_to": "none",
        "logging_steps": 40,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return TrainingArguments(output_dir=str(out), **{**settings, **changes})


def codes(model: Any) -> dict[str, Tensor]:
    return {n: layer.codes.detach().clone() for n, layer in compressed_linears(model).items()}


def test_codes_and_scales_together_beat_scales_alone(
    trained_llama: Any, folder: Path, tokens: Tensor, text_tokens: Any, tmp_path: Path
) -> None:
    losses, data = {}, Sequences(text_tokens(128, 48, seed=1))
    unseen = Sequences(text_tokens(8, 48, seed=9))
    for name in ("scales", "codes"):
        made = AutoModelForCausalLM.from_pretrained(folder)
        before = codes(made)
        if name == "codes":
            optimizer: Any = PVTuning(made, lr=1e-3, every=2, trust=0.05)
        else:
            make_tunable(made)
            trained = [p for p in made.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
        DistillationTrainer(
            made,
            arguments(tmp_path, max_steps=60, per_device_train_batch_size=16),
            train_dataset=data,
            teacher=trained_llama,
            optimizers=(optimizer, None),
        ).train()
        settle(made)
        made.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        state = loaded.state_dict()
        assert all(torch.equal(t, state[n]) for n, t in made.state_dict().items())
        for layer in compressed_linears(loaded).values():
            bits = sum(8 * t.numel() * t.element_size() for t in layer.state.values())
            assert str(layer.level) == LEVEL and bits == compose.cost_bits(layer.level, layer.shape)
        judge = DistillationTrainer(
            _with_gradient(loaded),
            arguments(tmp_path),
            eval_dataset=unseen,
            teacher=trained_llama,
        )
        losses[name] = judge.evaluate()["eval_loss"]
        after = codes(loaded)
        changed = any(not torch.equal(t, after[n]) for n, t in before.items())
        assert changed == (name == "codes")
    assert losses["codes"] < losses["scales"]


def _with_gradient(model: Any) -> Any:
    make_tunable(model, ("norms",))  # a trainer wants something to train
    return model


def test_the_gradient_of_a_weight_is_that_of_the_dense_layer(model: Any, tokens: Tensor) -> None:
    optimizer = PVTuning(model)
    stock = copy.deepcopy(model)
    name = "model.layers.1.mlp.up_proj"
    weight = model.get_submodule(name).weight.detach().as_subclass(Tensor).clone()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = torch.nn.Parameter(weight)
    stock.set_submodule(name, linear)
    for made in (model, stock):
        for part in tokens[:4].split(2):  # two batches add up
            made(input_ids=part, labels=part, use_cache=False).loss.backward()
    assert torch.allclose(optimizer._seen[name][0], linear.weight.grad, atol=1e-6)


@pytest.mark.parametrize(
    "level", [LEVEL, f"{LEVEL} + lowrank:rank=4", "trellis:bits=2,state_bits=8"]
)
def test_floats_learn_from_the_same_gradients_without_moving_codes(level: str) -> None:
    torch.manual_seed(0)
    stats = Stats(torch.eye(64))
    state = compose.compress(compose.normalize(level), torch.randn(32, 64), stats)
    both, x = [], torch.randn(3, 5, 64)
    for moves_codes in (False, True):
        layer = CompressedLinear.from_state(level, state, torch.zeros(32), (32, 64))
        model = torch.nn.Sequential(copy.deepcopy(layer))
        kinds = ("scales", "factors") if "lowrank" in level else ("scales",)
        optimizer = PVTuning(model, kinds=kinds) if moves_codes else make_tunable(model, kinds)
        model[0].bias.requires_grad_(True)
        leaf = x.clone().requires_grad_()
        with Products() as products:
            model(leaf).square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        both.append({**grads, "x": leaf.grad})
    assert optimizer is not None and len(both[0]) == len(both[1]) > 2
    for name, grad in both[0].items():
        assert torch.allclose(grad, both[1][name], rtol=1e-4, atol=1e-4), name
    if level == LEVEL:
        assert products.n == 3  # the output, dL/dx and dL/dW


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    n = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.n += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_changes_few_codes_by_one_and_downhill(
    model: Any, tokens: Tensor, sign: int
) -> None:
    optimizer = PVTuning(model, max_change=0.02, trust=10.0, every=1)
    name, layer = next(iter(compressed_linears(model).items()))
    with torch.no_grad():
        layer.scales.mul_(sign)  # as training may leave them
    model(input_ids=tokens[:4], labels=tokens[:4], use_cache=False).loss.backward()
    gradient = optimizer._seen[name][0].clone()
    before, scales = layer.weight.clone(), layer.scales.detach().clone()
    optimizer.step()
    with torch.no_grad():
        layer.scales.copy_(scales)  # the V-step undone
    moved = (layer.weight - before).as_subclass(Tensor)
    share = float((moved != 0).double().mean())
    assert 0.015 < share <= 0.02 and optimizer.n_changed > 0
    step = scales.abs().repeat_interleave(32, dim=1)
    assert torch.allclose(moved[moved != 0].abs(), step[moved != 0], rtol=1e-5)
    assert bool((moved * gradient <= 0).all())


def test_the_trust_ratio_bounds_what_a_step_changes_of_outputs(model: Any, tokens: Tensor) -> None:
    optimizer = PVTuning(model, lr=1e-9, max_change=1.0, trust=0.05, every=1)
    layers = compressed_linears(model)
    before = {n: m.weight.detach().clone() for n, m in layers.items()}
    model(input_ids=tokens[:4], labels=tokens[:4], use_cache=False).loss.backward()
    inputs = {n: optimizer._seen[n][1].sqrt() for n in layers}
    optimizer.step()
    for name, layer in layers.items():
        change = (layer.weight.detach() - before[name]) * inputs[name]
        assert 0.035 < float(change.norm() / (before[name] * inputs[name]).norm()) <= 0.0501


def test_codes_change_every_so_many_steps_and_start_anew(model: Any, tokens: Tensor) -> None:
    optimizer = PVTuning(model, every=3)
    changes = []
    for batch in tokens[:12].split(2):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        changes.append(optimizer.n_changed)
    assert changes[:2] == [0, 0] and 0 < changes[2] == changes[4] < changes[5]


def test_a_resumed_run_equals_a_straight_one(folder: Path, tokens: Tensor, tmp_path: Path) -> None:
    results = []
    for resume in (None, str(tmp_path / "checkpoint-3")):
        made = AutoModelForCausalLM.from_pretrained(folder)
        args = arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
        optimizers = (PVTuning(made, lr=1e-3, every=2), None)  # stopped between two P-steps
        trainer = Trainer(made, args, train_dataset=Sequences(tokens), optimizers=optimizers)
        trainer.train(resume_from_checkpoint=resume)
        results.append(made.state_dict())
    assert all(torch.equal(t, results[1][n]) for n, t in results[0].items())


def test_the_best_step_on_held_out_text_can_be_kept(
    model: Any, tokens: Tensor, tmp_path: Path
) -> None:
    args = arguments(
        tmp_path,
        max_steps=6,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
    )
    wild = PVTuning(model, lr=1e-3, max_change=0.2, trust=10.0, every=1)  # gets worse at once
    before = codes(model)
    data = Sequences(tokens)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data, optimizers=(wild, None))
    trainer.train()
    seen = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(seen), rel=1e-4)
    assert any(not torch.equal(t, codes(model)[n]) for n, t in before.items())


def test_bad_requests_say_what_to_change(model: Any, tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="max_change=2"):
        PVTuning(model, max_change=2)
    with pytest.raises(ValueError, match="the model has none; its levels are all dense"):
        PVTuning(tiny_model("llama"))


def test_without_a_teacher_codes_are_refused_before_any_text(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="moving the codes of .*bits.*give --teacher DENSE"):
        tune(str(folder), tmp_path / "out", Tuning(train="codes"), data=["missing.txt"])
