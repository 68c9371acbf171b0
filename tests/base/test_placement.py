"""Models compute where they are put, block by block, and are whole again after."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_evopress.base.devices import available, find_device, find_offload, using
from hf_evopress.base.placement import Place, decide, dtype_of, place_of, put
from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.calibration.output_moments import load_moments, output_moments
from hf_evopress.models.stream import BlockStream
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.refine.block_tuning import Tuning
from hf_evopress.refine.blockwise import Settings, refine
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.store.level_store import LevelStore, Source

from ..conftest import make_tiny_model, make_tokens
from ..second_device import live_bytes, memory_of, peak_bytes, reset_peak

CPU, SIM = torch.device("cpu"), torch.device("sim", 0)
TOKENS = make_tokens(6, 16)
LEVELS = [Level.parse("rtn:bits=4,group_size=32"), Level.parse("rtn:bits=2,group_size=32")]


def test_a_device_that_is_not_there_is_named_with_those_that_are() -> None:
    for name in ("cuda:7", "nonsense", "sim:9"):
        with pytest.raises(ValueError, match=rf"no device '{name}'.*cpu.*sim:0, sim:1"):
            find_device(name)
    assert set(available()) >= {"cpu", "sim:0", "sim:1"}


def test_auto_is_the_device_in_use() -> None:
    outside = find_device()
    with using("sim:1", offload="cpu"):
        assert find_device() == torch.device("sim:1") and find_offload() == "cpu"
        with using("cpu"):
            assert find_device("auto") == CPU
    assert find_device() == outside and find_offload() == "auto"
    assert outside.type != "sim"  # the second device is taken only where it is asked for


def test_a_model_that_fits_moves_and_one_that_does_not_is_visited() -> None:
    place = Place(SIM, None)
    model = make_tiny_model("llama")
    with memory_of(live_bytes() + 100_000):  # of the 400 kB that it takes
        assert decide(model, place).rest == CPU
    assert model.device == CPU
    assert decide(model, place) == place
    assert model.device == SIM


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_visits_give_the_logits_of_a_model_that_lies_there(dtype: torch.dtype | None) -> None:
    model = make_tiny_model("qwen3").to(torch.bfloat16)
    there = copy.deepcopy(model).to(SIM)
    there = there if dtype is None else there.to(dtype)
    put(model, Place(SIM, dtype, CPU))
    kept = dict(model.named_parameters())
    before = live_bytes()
    with torch.no_grad(), BlockStream(model) as stream:
        hidden = stream.embed(TOKENS)
        for block in range(stream.n_blocks):
            hidden = stream.place.let_rest(stream.run_block(block, hidden))
            assert hidden.device == CPU
        logits = stream.head(TOKENS, hidden)
        with stream.whole() as whole:
            plain = whole(input_ids=TOKENS.to(SIM)).logits
    wanted = there(input_ids=TOKENS.to(SIM)).logits
    assert torch.equal(logits, wanted) and torch.equal(plain, wanted)
    assert dtype_of(model) == wanted.dtype
    del hidden, logits, plain, wanted, stream, whole
    assert live_bytes() == before  # all went home
    assert all(kept[name] is parameter for name, parameter in model.named_parameters())


def _steps(model: nn.Module, folder: Path) -> dict[str, Callable[[], Any]]:
    units = [u for u in find_units(model) if u.name.endswith(("q_proj", "down_proj"))]
    menus = {unit.name: LEVELS for unit in units}
    source = Source({}, lambda b: load_stats(folder, b), lambda b: load_moments(folder, b))
    plans = [dict.fromkeys(menus, level) for level in LEVELS]
    settings = Settings("best", tuning=Tuning(steps=2, looks=1, attempts=1))

    def store() -> LevelStore:
        return LevelStore.build(folder / "store", model, units, menus, source)

    def evaluator() -> Evaluator:
        return Evaluator(model, store(), TOKENS, KL())

    return {
        "calibrate": lambda: calibrate(model, TOKENS, folder, units=units),
        "sensitivities": lambda: output_moments(model, TOKENS, folder, units=units),
        "store": store,
        "search": lambda: evaluator().losses(plans, range(4)),
        "logits": lambda: evaluator().logits(plans[0], TOKENS[:2].to(SIM)),
        "refine": lambda: refine(
            model,
            store(),
            plans[1],
            TOKENS[:4],
            TOKENS[4:6],
            folder / "refined",
            settings=settings,
            moments=lambda b: load_moments(folder, b),
        ),
    }


def test_the_peak_of_every_step_does_not_grow_with_depth(tmp_path: Path) -> None:
    peaks: dict[int, dict[str, int]] = {}
    for depth in (4, 16):
        model = make_tiny_model("llama", num_hidden_layers=depth)
        put(model, Place(SIM, None, CPU))
        peaks[depth] = {}
        for name, step in _steps(model, tmp_path / str(depth)).items():
            before = live_bytes()
            reset_peak()
            made = step()
            peaks[depth][name] = peak_bytes() - before
            del made
            assert live_bytes() == before, name
    assert peaks[4] == peaks[16]


def test_a_placed_copy_is_placed() -> None:
    model = put(make_tiny_model("llama"), Place(SIM, torch.float32, CPU))
    assert place_of(copy.deepcopy(model)) == place_of(model)
