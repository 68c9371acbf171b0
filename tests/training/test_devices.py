"""Steps of every training method on a second device, which refuses to mix with the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer

from hf_evopress import (
    GradualPruning,
    OrderedRanks,
    PVTuning,
    RankTruncation,
    StructuredPruning,
    make_quest,
)
from hf_evopress.base.devices import using
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.stitch import compress_model
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan
from hf_evopress.refine.distillation import Sequences
from hf_evopress.training.arguments import training_arguments
from hf_evopress.training.gradual_pruning import PQStop
from hf_evopress.training.ordered_ranks import make_ordered

from .. import second_device  # noqa: F401  registers the device

Made = tuple[Any, list[Any], Any]  # model, callbacks, optimizer or None


def quest(dense: Any, device: torch.device, **options: Any) -> Made:
    model = dense.to(device).requires_grad_(True)
    make_quest(model, bits=3, **options)
    return model, [], None


def pruned(dense: Any, device: torch.device) -> Made:
    model = dense.to(device).requires_grad_(True)
    unit = find_units(model)[0]
    inputs = {unit.name: torch.linspace(1, 2, unit.shape[1])}  # on the CPU, as they are read
    return model, [GradualPruning(0.5, every=1, end=2, inputs=inputs, stop=PQStop())], None


def at(dense: Any, level: str) -> Any:
    shapes = {unit.name: unit.shape for unit in find_units(dense)}
    plan = Plan(dict.fromkeys(shapes, level), shapes)
    compress_model(dense, plan, None)
    attach(dense, plan)
    return dense


def ranks(dense: Any, device: torch.device, callback: Any) -> Made:
    model = at(dense, "lowrank:rank=16,metric=plain").to(device)
    make_ordered(model)
    return model, [callback], None


def structured(dense: Any, device: torch.device) -> Made:
    torch.manual_seed(0)
    model = get_peft_model(dense, LoraConfig(r=4, target_modules="all-linear")).to(device)
    return model, [StructuredPruning(kv_groups=1, channels=96, end=2)], None


def pv(dense: Any, device: torch.device) -> Made:
    model = at(dense, "rtn:bits=3,group_size=32").to(device)
    return model, [], PVTuning(model, lr=1e-3, every=2, trust=0.05)


METHODS: dict[str, Callable[[Any, torch.device], Made]] = {
    "QuEST": quest,
    "QuEST, activations": lambda dense, device: quest(dense, device, activation_bits=4),
    "gradual pruning": pruned,
    "ordered ranks": lambda dense, device: ranks(dense, device, OrderedRanks(lasso=1e-3)),
    "rank truncation": lambda dense, device: ranks(dense, device, RankTruncation(every=2)),
    "structured pruning": structured,
    "PV-Tuning": pv,
}


def trained(made: Made, tokens: Tensor, out: Path, resume: str | None = None) -> dict[str, Tensor]:
    """Return what 3 steps leave of a model and of gates, on the CPU."""
    model, callbacks, optimizer = made
    trainer = Trainer(
        model,
        training_arguments(
            output_dir=str(out),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="steps",
            save_steps=2,
            disable_tqdm=True,
            seed=3,
        ),
        train_dataset=Sequences(tokens),
        callbacks=callbacks,
        optimizers=(optimizer, None),
    )
    trainer.train(resume_from_checkpoint=resume)
    state = model.state_dict()
    for callback in callbacks:
        for kind, gates in getattr(callback, "gates", {}).items():
            state |= {f"{kind} {name}": tensor for name, tensor in gates.state().items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items()}


@pytest.mark.parametrize("method", METHODS)
def test_steps_give_there_what_they_give_on_the_cpu(
    trained_llama: Any, text_tokens: Any, tmp_path: Path, method: str
) -> None:
    tokens, states = text_tokens(16, 32), []
    for name in ("cpu", "sim"):
        with using(name) as device:
            made = METHODS[method](copy.deepcopy(trained_llama), device)
            start = {n: t.detach().cpu().clone() for n, t in made[0].state_dict().items()}
            states.append(trained(made, tokens, tmp_path / name))
            assert {p.device.type for p in made[0].parameters()} == {name}
    here, there = states
    assert here.keys() == there.keys()
    moved = [n for n, t in start.items() if not torch.equal(t, there[n])]
    assert len(moved) >= len(find_units(trained_llama))
    assert method != "PV-Tuning" or any(n.endswith(".codes") for n in moved)
    for n, t in here.items():
        if not t.is_floating_point():
            assert torch.equal(t, there[n]), n
            continue
        change = (t - start[n]).norm() if n in start else t.norm()
        assert float((t - there[n]).norm()) <= 1e-3 * float(change), n


def test_gates_are_resumed_there(trained_llama: Any, text_tokens: Any, tmp_path: Path) -> None:
    tokens, states = text_tokens(16, 32), []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        with using("sim") as device:
            made = structured(copy.deepcopy(trained_llama), device)
            states.append(trained(made, tokens, tmp_path, resume))
    assert "kv mask" in states[0] and states[0].keys() == states[1].keys()
    assert all(torch.equal(t, states[1][name]) for name, t in states[0].items())
