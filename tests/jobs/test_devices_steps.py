"""Refinement, adapters, training, export and loading on the second device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_evopress.adapters.repair import adapt, merge
from hf_evopress.base.devices import using
from hf_evopress.jobs import pipeline
from hf_evopress.jobs.convert import convert
from hf_evopress.jobs.evaluate import evaluate_model
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.jobs.refine_existing_model import refine_end_to_end
from hf_evopress.jobs.refine_existing_plan import refine_plan
from hf_evopress.jobs.stack import menu, sizes_of, stack
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.refine.block_tuning import Tuning as BlockTuning
from hf_evopress.refine.blockwise import Settings
from hf_evopress.scoring.kick.questions import KickSet, Question
from hf_evopress.training.settings import Tuning
from hf_evopress.training.tune import tune

from .. import second_device

SIM = torch.device("sim", 0)
# where the line is run as a whole: the second device takes 0.1 ms for each small step
SKIPPED = ["model.layers.1.*", "*.[qvo]_proj", "*.gate_proj"]


@pytest.fixture(autouse=True)
def sim() -> Any:
    """All that says auto computes on the second device."""
    with using("sim") as device:
        yield device


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are tuned for some steps only: where tensors lie is what counts here."""
    tuning = BlockTuning(steps=4, looks=1, attempts=1, bfloat16=True)
    settings = lambda job, mode: Settings(mode, tuning=tuning)  # noqa: E731
    monkeypatch.setattr("hf_evopress.jobs.refinement.refine_settings", settings)


def recipe(home: Path, out: str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "model": str(home / "dense"),
        "out": str(home / out),
        "work": str(home / f"{out}.work"),
        "budget": {"bits": 4.0},
        "levels": ["rtn:bits=2,group_size=32,clip=false", "gptq:bits=4,group_size=32"],
        "data": {
            "sources": [str(home / "text.txt")],
            "seq_len": 32,
            "calibration": 8,
            "search": 8,
            "heldout": 2,
            "test": 4,
        },
        "search": {
            "sensitivity_tokens": 128,
            "settings": {"generations": 1, "tokens": [64, 128]},
        },
    }
    return Recipe.from_dict({**values, **changes})


@pytest.fixture(scope="module")
def made(home: Path) -> pipeline.Result:
    """A model compressed on the second device."""
    with using("sim"):
        return pipeline.compress(recipe(home, "made"))


@pytest.mark.slow
@pytest.mark.parametrize("offload, outputs", [("none", ",outputs=false"), ("cpu", "")])
def test_refinement_of_every_kind(home: Path, offload: str, outputs: str) -> None:
    words = recipe(
        home,
        f"refined-{offload}",
        offload=offload,
        skip=SKIPPED,
        refine="best+end-to-end",
        refine_levels=["gptq:bits=2*"],
        distil={"steps": 2},
        levels=[f"gptq:bits={b},group_size=32{outputs}" for b in (2, 4)],
        data={**recipe(home, "x").to_dict()["data"], "written": 2},
    )
    result = pipeline.compress(words)
    assert {"refined", "distilled"} <= set(result.plan.results)


@pytest.mark.slow
def test_a_plan_is_refined_and_its_model_distilled(home: Path, made: pipeline.Result) -> None:
    common: dict[str, Any] = {"data": [str(home / "text.txt")], "seq_len": 32, "n_sequences": 8}
    fast = refine_plan(str(made.folder), home / "fast", mode="fast", **common)
    assert "refined" in fast.plan.results
    whole = refine_end_to_end(
        str(made.folder), home / "whole", steps=2, test=str(home / "text.txt"), window=64, **common
    )
    assert "distilled" in whole.plan.results and whole.rows


@pytest.mark.parametrize("how", [{"rank": 4}, {"rank": 4, "prefix": True}, {"size": "40KB"}])
def test_an_adapter_is_made_and_merged(
    home: Path, made: pipeline.Result, how: dict[str, Any]
) -> None:
    name = "-".join(how)
    common: dict[str, Any] = {"data": [str(home / "text.txt")], "seq_len": 32, "n_sequences": 8}
    folder = adapt(str(made.folder), home / f"eora-{name}", sensitivity_tokens=128, **common, **how)
    for exact in (True, False):
        merged = merge(
            str(made.folder),
            str(folder),
            home / f"merged-{name}-{exact}",
            exact=exact,
            against=str(home / "dense"),
            window=32,
            **common,
        )
        assert set(merged.reports) >= {"without adapter", "merged"}


@pytest.mark.parametrize("train", ["lora", "scales,norms"])
def test_a_model_is_tuned(home: Path, made: pipeline.Result, train: str) -> None:
    settings = Tuning(
        train=train,
        steps=2,
        batch=1,
        rank=4,
        seq_len=32,
        sequences=4,
        heldout=2,
        teacher=str(home / "dense"),
        **({"target": "kappa:0.3"} if train == "lora" else {}),
    )
    done = tune(str(made.folder), home / f"tuned-{train}", settings, data=[str(home / "text.txt")])
    assert done.kl is not None


def test_training_and_repair_go_on_with_smaller_batches(
    home: Path, made: pipeline.Result, caplog: pytest.LogCaptureFixture
) -> None:
    text = [str(home / "text.txt")]
    settings = Tuning(steps=1, batch=8, rank=4, seq_len=64, sequences=8)
    model = str(made.folder)
    steps: dict[str, Callable[[Path], Any]] = {
        "training": lambda out: tune(model, out, settings, data=text),
        "the adapter": lambda out: adapt(model, out, data=text, rank=4, n_sequences=64, seq_len=64),
    }
    for name, step in steps.items():
        before = second_device.live_bytes()
        second_device.reset_peak()
        step(home / f"{name}, whole")
        needed = second_device.peak_bytes() - before
        assert "out of memory" not in caplog.text
        with second_device.memory_of(before + needed * 3 // 4):
            step(home / f"{name}, in parts")
        assert f"{name}: out of memory on sim:0, now" in caplog.text
        with (
            second_device.memory_of(before + needed // 40),
            pytest.raises(RuntimeError, match=rf"{name} does not fit .*--|out of memory"),
        ):
            step(home / f"{name}, not at all")
        caplog.clear()


def test_export_and_evaluation(home: Path, made: pipeline.Result) -> None:
    folder = convert(str(made.folder), home / "stock", format="dense")
    report = evaluate_model(
        str(made.folder), str(home / "text.txt"), against=str(folder), window=64, max_windows=2
    )
    assert report["kl_nats"] < 1e-2


def test_one_file_of_many_sizes_is_made_and_loaded_there(home: Path) -> None:
    words = recipe(home, "sizes", levels=menu(3, 1), budget={"bits": 32.0})
    before = second_device.live_bytes()
    folder, plan = stack(words)
    assert second_device.live_bytes() == before
    assert {str(plan[unit]) for unit in plan if ".layers." in unit} == {"bitstack:blocks=3"}
    least, most = sizes_of(folder)
    ids = torch.arange(12)[None] + 97
    logits = []
    for where in ("cpu", "sim"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=EvoPressConfig(size=(2 * least + most) // 3),
            dtype=torch.float32,
            device_map={"": where},
        )
        held = {str(m.level) for name, m in compressed_linears(model).items() if "_proj" in name}
        assert len(held) > 1  # some layers have more of their blocks than others
        with torch.no_grad():
            logits.append(model(input_ids=ids.to(where), use_cache=False).logits.cpu())
    assert torch.allclose(*logits, atol=1e-4)


def test_the_probes_of_kick_find_there_what_they_find_on_the_cpu(
    tmp_path: Path, tiny_model: Callable[..., Any], write_model: Callable[..., Path]
) -> None:
    long = tiny_model(max_position_embeddings=2048)  # holds the prompts, 1 byte a token
    folder = write_model(tmp_path, long, "rtn:bits=4,group_size=32")
    questions = KickSet(
        (Question("1 and 1 is?", ("2",), ("2", "fox"), "1 and 1 is 2."),), ("the fox sees.",)
    )
    before = second_device.live_bytes()
    found = []
    for device in ("cpu", "sim"):
        with using(device):
            dense = str(folder / "dense")
            report = evaluate_model(str(folder / "small"), against=dense, questions=questions)
            found.append(report["kick"])
    assert {"closed book", "choices", "in context", "answer tokens", "summaries"} <= set(found[0])
    assert list(found[0]) == list(found[1])
    for probe, figures in found[0].items():
        assert found[1][probe] == pytest.approx(figures, abs=1e-4)
    assert second_device.live_bytes() == before


MAPS: dict[str, Any] = {
    "one card": {"": "sim:0"},
    "two cards": {
        "model.embed_tokens": "sim:0",
        "model.rotary_emb": "sim:0",
        "model.layers.0": "sim:0",
        "model.layers.1": "sim:1",
        "model.layers.2": "sim:1",
        "model.norm": "sim:1",
        "lm_head": "sim:0",  # tied to the embedding: device_map="auto" keeps both together
    },
    "card and CPU": {
        "model.embed_tokens": "sim:0",
        "model.rotary_emb": "sim:0",
        "model.layers.0": "sim:0",
        "model.layers.1": "cpu",
        "model.layers.2": "sim:0",
        "model.norm": "sim:0",
        "lm_head": "sim:0",
    },
}


@pytest.mark.parametrize("where", MAPS)
def test_a_checkpoint_is_loaded_onto_devices_and_generates(
    made: pipeline.Result, where: str
) -> None:
    ids = torch.arange(12)[None] + 97
    here = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    there = AutoModelForCausalLM.from_pretrained(
        made.folder, dtype=torch.float32, device_map=MAPS[where]
    )
    wanted = here.generate(ids, max_new_tokens=4, do_sample=False)
    found = there.generate(ids.to("sim"), max_new_tokens=4, do_sample=False)
    assert found.cpu().tolist() == wanted.tolist()


@pytest.mark.parametrize("where", ["one card", "two cards", "no map"])
def test_a_plan_is_applied_while_a_model_loads(
    home: Path, made: pipeline.Result, where: str
) -> None:
    plan = made.plan
    if where == "two cards":  # autograd knows one of this device: no moments of outputs
        levels = {unit: str(level) for unit, level in plan.levels.items()}
        levels = {u: f"{x},outputs=false" if x[:4] == "gptq" else x for u, x in levels.items()}
        plan = Plan(levels, shapes=plan.shapes)
    config = EvoPressConfig(plan, data=[str(home / "text.txt")], n_sequences=8, seq_len=32)
    model = AutoModelForCausalLM.from_pretrained(
        home / "dense",
        quantization_config=config,
        dtype=torch.float32,
        **({} if where == "no map" else {"device_map": MAPS[where]}),
    )
    ids = torch.arange(12)[None] + 97
    logits = model(ids if where == "no map" else ids.to("sim")).logits
    assert bool(logits.isfinite().all())
    layer = model.model.layers[0].mlp.up_proj
    expected = "cpu" if where == "no map" else "sim"
    assert {tensor.device.type for tensor in layer.state.values()} == {expected}


def test_search_on_the_cpu_and_there_agree(home: Path) -> None:
    plans = []
    for device in ("cpu", "sim"):
        search = {"strategy": "knapsack"}
        words = recipe(home, f"on-{device}", device=device, skip=SKIPPED, search=search)
        job = Job(words)
        plans.append(find_plan(job, build_levels(job)))
    assert plans[0].levels.keys() == plans[1].levels.keys()
    same = sum(plans[0].levels[u] == plans[1].levels[u] for u in plans[0].levels)
    assert same > 0.8 * len(plans[0].levels)


def test_a_plan_that_needs_data_is_not_applied_to_weights_that_are_lent(
    home: Path, made: pipeline.Result
) -> None:
    config = EvoPressConfig(made.plan, data=[str(home / "text.txt")], n_sequences=8, seq_len=32)
    with pytest.raises(ValueError, match="load it without device_map, save it"):
        AutoModelForCausalLM.from_pretrained(
            home / "dense", quantization_config=config, device_map=MAPS["card and CPU"]
        )
