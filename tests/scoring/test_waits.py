"""A search on a GPU queues its work: the CPU waits for losses once per round, not per layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_evopress.base.placement import Place, put
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.store.level_store import LevelStore, Source

from ..conftest import make_tiny_model, make_tokens
from ..second_device import n_syncs

SIM = torch.device("sim", 0)
LEVELS = [Level.parse("rtn:bits=4,group_size=32"), Level.parse("rtn:bits=2,group_size=32")]


def waits(folder: Path, depth: int, n_plans: int, n_sequences: int) -> int:
    """Return how often a round of so many plans waits for the device, targets being made."""
    model = make_tiny_model("llama", num_hidden_layers=depth).to(SIM)
    put(model, Place(SIM))
    menus = {unit.name: LEVELS for unit in find_units(model)}
    store = LevelStore.build(folder, model, find_units(model), menus, Source({}, lambda block: {}))
    evaluator = Evaluator(model, store, make_tokens(6, 16), KL())
    plans = [dict.fromkeys(menus, LEVELS[0]) for _ in range(n_plans)]
    for plan, unit in zip(plans, menus, strict=False):
        plan[unit] = LEVELS[1]
    evaluator.losses(plans, range(n_sequences))
    before = n_syncs()
    evaluator.losses(plans, range(n_sequences))
    return n_syncs() - before


def test_a_round_waits_once_whatever_its_depth_plans_and_sequences(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers looks whether positions are those of several texts packed into one: once a call
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda _: None)
    sizes = [(1, 1, 1), (1, 3, 1), (1, 3, 3), (3, 3, 3)]
    assert [waits(tmp_path / str(size), *size) for size in sizes] == [1, 1, 1, 1]
