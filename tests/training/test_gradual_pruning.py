"""Gradual magnitude pruning under Trainer: schedule, masks, stop rule, sparse levels."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_evopress import GradualPruning
from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.methods import compose
from hf_evopress.models.units import find_units
from hf_evopress.refine.distillation import Sequences
from hf_evopress.training.gradual_pruning import PQStop, to_sparse
from hf_evopress.training.trainer import DistillationTrainer

from . import short_runs
from .short_runs import student


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    return short_runs.arguments(out, **{"max_steps": 12, **changes})


@pytest.fixture(scope="module")
def tokens(text_tokens: Any) -> Tensor:
    return text_tokens(32, 48)


class Zeros(TrainerCallback):
    """Notes the share of zeros after each optimiser step, and at which step it was 0 -> other."""

    def __init__(self, pruning: GradualPruning) -> None:
        self.pruning, self.shares, self.grown = pruning, [], 0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = {n: kwargs["model"].get_submodule(n).weight for n in self.pruning.masks}
        self.grown += sum(int((w[~self.pruning.masks[n]] != 0).sum()) for n, w in weights.items())
        total = sum(w.numel() for w in weights.values())
        self.shares.append(sum(int((w == 0).sum()) for w in weights.values()) / max(total, 1))


def test_the_share_of_zeros_follows_the_schedule(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = student(trained_llama)
    pruning = GradualPruning(0.6, begin=2, end=8, every=3)
    zeros = Zeros(pruning)
    Trainer(
        model,
        arguments(tmp_path, weight_decay=0.1),
        train_dataset=Sequences(tokens),
        callbacks=[pruning, zeros],
    ).train()
    wanted = {2: 0.0, 5: 0.6 - 0.6 * 0.5**3, 8: 0.6}
    assert [step for step, _ in pruning.history] == [*wanted]
    assert all(share == pytest.approx(wanted[step], abs=1e-3) for step, share in pruning.history)
    assert zeros.shares[-1] == pytest.approx(0.6, abs=1e-3) and not zeros.grown
    assert set(pruning.sparsities) == {u.name for u in find_units(model)}
    assert all(s == pytest.approx(0.6, abs=1e-3) for s in pruning.sparsities.values())


def test_masks_only_lose_weights(trained_llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append({n: m.clone() for n, m in pruning.masks.items()})

    pruning = GradualPruning(0.5, every=2)
    data = Sequences(tokens)
    made = student(trained_llama)
    Trainer(made, arguments(tmp_path), train_dataset=data, callbacks=[pruning, Watch()]).train()
    for before, after in pairwise(seen):
        assert all(not bool((after[n] & ~mask).any()) for n, mask in before.items())


def test_a_saved_model_holds_exactly_the_zeros_at_sparse_levels(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = student(trained_llama)
    names = [u.name for u in find_units(model)]
    pruning = GradualPruning({names[0]: 0.7, names[3]: 0.31}, every=2)
    data = Sequences(tokens)
    Trainer(model, arguments(tmp_path / "run"), train_dataset=data, callbacks=[pruning]).train()
    weights = {n: model.get_submodule(n).weight.detach().clone() for n in names}
    plan = to_sparse(model)
    assert str(plan[names[0]].terms[0]).startswith("magnitude:sparsity=0.7")
    assert all(plan[n].is_dense for n in names if n not in pruning.masks)
    model.save_pretrained(tmp_path / "sparse")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sparse")
    for name, mask in pruning.masks.items():
        layer = loaded.get_submodule(name)
        assert torch.equal(layer.weight, weights[name].half().float())
        assert torch.equal(layer.weight != 0, mask)
        bits = sum(8 * t.numel() * t.element_size() for t in layer.state.values())
        assert bits == compose.cost_bits(layer.level, layer.shape)


def test_after_equal_healing_gradual_pruning_is_nearer_than_pruning_at_once(
    trained_llama: Any, tokens: Tensor, text_tokens: Any, tmp_path: Path
) -> None:
    found = []
    healing = 24
    for ramp, options in ((24, {"every": 4}), (0, {"every": 1, "start": 0.8})):
        model = student(trained_llama)
        pruning = GradualPruning(0.8, end=ramp, **options)
        trainer = DistillationTrainer(
            model,
            arguments(tmp_path, max_steps=ramp + healing, lr_scheduler_type="constant"),
            train_dataset=Sequences(tokens),
            eval_dataset=Sequences(text_tokens(8, 48, seed=9)),
            teacher=trained_llama,
            callbacks=[pruning],
        )
        trainer.train()
        assert pruning.history[-1] == (ramp, pytest.approx(0.8, abs=1e-3))
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] < 0.9 * found[1]


@pytest.mark.parametrize("step", [6, 8])  # between two updates, and right after one
@pytest.mark.parametrize("stop", [None, PQStop(gamma=0.5)])
def test_a_resumed_run_has_the_weights_and_masks_of_a_straight_one(
    trained_llama: Any, tokens: Tensor, tmp_path: Path, step: int, stop: PQStop | None
) -> None:
    results = []
    for resume in (None, str(tmp_path / f"checkpoint-{step}")):
        pruning = GradualPruning(0.5, every=4, stop=stop)
        model = student(trained_llama)
        args = arguments(tmp_path, save_strategy="steps", save_steps=step, weight_decay=0.1)
        Trainer(model, args, train_dataset=Sequences(tokens), callbacks=[pruning]).train(
            resume_from_checkpoint=resume
        )
        results.append((pruning.masks, model.state_dict()))
    (masks, weights), (again, resumed) = results
    assert masks and all(torch.equal(m, again[n]) for n, m in masks.items())
    assert all(torch.equal(t, resumed[n]) for n, t in weights.items())
    assert all(bool((weights[f"{n}.weight"] != 0).eq(m).all()) for n, m in masks.items())
    before = trained_llama.state_dict()
    assert all(
        not torch.equal(weights[f"{n}.weight"], before[f"{n}.weight"] * masks[n]) for n in masks
    )


def test_the_pq_index_stops_a_layer_of_equal_weights(
    trained_llama: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = student(trained_llama)
    names = [u.name for u in find_units(model)]
    with torch.no_grad():
        W = model.get_submodule(names[1]).weight
        W.copy_(0.05 * W.sign())
    pruning = GradualPruning(0.8, every=1, end=10, stop=PQStop(gamma=0.5))
    data = Sequences(tokens)
    args = arguments(tmp_path, learning_rate=1e-6)
    Trainer(model, args, train_dataset=data, callbacks=[pruning]).train()
    shares = pruning.sparsities
    assert shares[names[1]] < 0.01 < 0.2 < shares[names[0]] < 0.8
    assert PQStop(beta=0.1).most(torch.randn(1000) ** 9) == 100


def test_inputs_say_which_weights_count(trained_llama: Any, tokens: Tensor, tmp_path: Path) -> None:
    model = student(trained_llama)
    unit = find_units(model)[0]
    calibrate(model, tokens[:4], tmp_path)
    moments = {unit.name: load_stats(tmp_path, 0)[unit.name].gram.diagonal()}
    W = model.get_submodule(unit.name).weight.detach().abs()
    pruning = GradualPruning({unit.name: 0.5}, start=0.5, end=0, inputs=moments)
    args = arguments(tmp_path / "run", max_steps=1, learning_rate=0.0)
    Trainer(model, args, train_dataset=Sequences(tokens), callbacks=[pruning]).train()
    scores, mask = W * moments[unit.name].sqrt(), pruning.masks[unit.name]
    assert scores[mask].min() >= scores[~mask].max()
    assert W[mask].min() < W[~mask].max()


def test_bad_requests_say_what_to_change(
    trained_llama: Any, tokens: Tensor, tmp_path: Path, write_model: Any
) -> None:
    with pytest.raises(ValueError, match=r"share of zeros in \[0, 1\), got 60"):
        GradualPruning(60)
    with pytest.raises(ValueError, match="begin=5, every=10, end=2"):
        GradualPruning(0.5, begin=5, end=2)
    with pytest.raises(ValueError, match="gamma=0"):
        PQStop(gamma=0)
    data = Sequences(tokens)
    for pruning, model, words in (
        (GradualPruning({"model.nothing": 0.5}), student(trained_llama), "no linear layer"),
        (GradualPruning(0.5), trained_llama, "is frozen"),
        (GradualPruning(0.5, begin=99), student(trained_llama), "begins at step 99 of 12"),
    ):
        state: Any = type("State", (), {"max_steps": 12, "global_step": 0})
        with pytest.raises(ValueError, match=words):
            pruning.on_train_begin(None, state, None, model=model)
    folder = write_model(tmp_path, trained_llama, "rtn:bits=4,group_size=32")
    packed = AutoModelForCausalLM.from_pretrained(folder / "small")
    with pytest.raises(ValueError, match="codes cannot be pruned"):
        pruning.on_train_begin(None, state, None, model=packed)
    with pytest.raises(ValueError, match="nothing to pack"):
        to_sparse(student(trained_llama))
    assert len(data) == 32
