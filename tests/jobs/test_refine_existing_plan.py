"""A refined plan ships like any other: same bytes, scored states, an ordinary checkpoint."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_evopress.cli import main
from hf_evopress.cli.results import show_result
from hf_evopress.jobs import measure, pipeline, refinement
from hf_evopress.jobs.refine_existing_model import refine_end_to_end
from hf_evopress.jobs.refine_existing_plan import refine_plan
from hf_evopress.models.size import stored_bytes
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.after_search import Distil
from hf_evopress.recipes.recipe import Recipe

LEVEL = "gptq:bits=2,group_size=32"
DATA = {"seq_len": 64, "calibration": 24, "search": 16, "heldout": 4, "test": 12}


def recipe(home: Path, out: str, refine: str) -> Recipe:
    return Recipe.from_dict(
        {
            "model": str(home / "dense"),
            "out": str(home / out),
            "work": str(home / "work"),
            "budget": {"bits": 2.6},
            "levels": [LEVEL],
            "data": {"sources": [str(home / "text.txt")], **DATA},
            "search": {"strategy": "knapsack", "sensitivity_tokens": 512},
            "refine": refine,
        }
    )


@pytest.fixture(scope="module")
def plain(home: Path) -> pipeline.Result:
    return pipeline.compress(recipe(home, "plain", "none"))


@pytest.fixture(scope="module")
def refined(home: Path) -> pipeline.Result:
    return pipeline.compress(recipe(home, "refined", "fast"))


def test_compress_with_refine_ships_a_closer_model_of_the_same_plan_and_size(
    plain: pipeline.Result, refined: pipeline.Result
) -> None:
    assert refined.plan.levels == plain.plan.levels
    tensors = [(r.folder / "model.safetensors").stat().st_size for r in (plain, refined)]
    assert tensors[0] == tensors[1]
    kl = {row.name: row.report.kl_nats for row in refined.rows}
    assert kl["searched"] < kl[measure.UNREFINED]
    assert kl[measure.UNREFINED] == pytest.approx(
        next(row.report.kl_nats for row in plain.rows if row.name == "searched"), rel=1e-5
    )


def test_the_plan_notes_the_loss_before_and_after(refined: pipeline.Result) -> None:
    notes = Plan.load(refined.folder).results["refined"]
    assert notes["is_kept"] and notes["after"] < notes["before"] and notes["mode"] == "fast"


def test_stopped_in_its_second_stage_it_says_what_stands_in_the_folder(
    home: Path,
    refined: pipeline.Result,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "distil", stop)
    with pytest.raises(KeyboardInterrupt):
        pipeline.compress(recipe(home, "stopped", "fast+end-to-end"))
    said = f"{home / 'stopped'} holds the whole model as it was before end-to-end training"
    assert said in caplog.text and "the same command goes on" in caplog.text
    files = [folder / "model.safetensors" for folder in (home / "stopped", refined.folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_one_command_refines_block_by_block_and_end_to_end(
    home: Path, refined: pipeline.Result
) -> None:
    wanted = recipe(home, "both", "fast+end-to-end")
    wanted = replace(
        wanted,
        distil=Distil(steps=90, learning_rate=2e-4),
        data=replace(wanted.data, written=8),
    )
    result = pipeline.compress(wanted)
    assert result.plan.levels == refined.plan.levels
    stages = [result.plan.results[key] for key in ("refined", "distilled")]
    assert [notes["mode"] for notes in stages] == ["fast", "end-to-end"]
    assert all(notes["is_kept"] and notes["after"] < notes["before"] for notes in stages)
    assert all(notes["written"] == 8 for notes in stages)
    (kept,) = (home / "work").glob("written-*/written_*.safetensors")
    assert load_file(kept)["input_ids"].shape == (8, DATA["seq_len"])
    kl = [{row.name: row.report.kl_nats for row in r.rows} for r in (refined, result)]
    assert kl[1]["searched"] < kl[0]["searched"]
    assert kl[1][measure.UNREFINED] == kl[0][measure.UNREFINED]
    files = [r.folder / "model.safetensors" for r in (refined, result)]
    assert files[0].stat().st_size == files[1].stat().st_size
    assert Recipe.load(result.folder / "evopress_recipe.yaml") == wanted
    card = (result.folder / "README.md").read_text()
    assert "mode fast)" in card and "mode end-to-end)" in card
    before = files[1].read_bytes()
    assert pipeline.compress(wanted).plan.results["distilled"]["after"] == stages[1]["after"]
    assert files[1].read_bytes() == before  # run again, it is all there


def test_codes_move_end_to_end_where_the_recipe_says_so(home: Path, plain: pipeline.Result) -> None:
    distil = Distil(steps=40, learning_rate=2e-4, codes=True)
    wanted = replace(recipe(home, "moved", "end-to-end"), distil=distil)
    result = pipeline.compress(wanted)
    notes = result.plan.results["distilled"]
    assert notes["is_kept"] and notes["after"] < notes["before"]
    assert Recipe.load(result.folder / "evopress_recipe.yaml") == wanted
    old, new = (load_file(r.folder / "model.safetensors") for r in (plain, result))
    moved = [k for k in new if k.endswith("codes") and not torch.equal(old[k], new[k])]
    assert moved and {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in old.items()}
    with pytest.raises(ValueError, match="codes change every 8 steps, and distil.steps is 8"):
        Distil(steps=8, codes=True)


def test_refinement_that_does_not_help_is_not_kept(
    home: Path, plain: pipeline.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([0.5, 0.6])
    monkeypatch.setattr(refinement, "loss", lambda *_: next(losses))
    result = pipeline.compress(recipe(home, "kept", "fast"))
    assert not result.plan.results["refined"]["is_kept"]
    assert {row.name for row in result.rows} == {row.name for row in plain.rows}


def test_a_plan_with_dropped_and_dense_units_is_refined_without_a_search(
    home: Path, plain: pipeline.Result
) -> None:
    levels = {u: str(x) for u, x in plain.plan.levels.items() if "layers.1.self_attn" not in u}
    levels |= {"model.layers.1.self_attn": "drop", "model.layers.0.mlp.up_proj": "dense"}
    del levels["model.layers.2.self_attn.q_proj"]  # as plans are that were made with skip
    plan = Plan(levels, base_model=str(home / "dense"))
    plan.save(home / "some.json")
    result = refine_plan(
        home / "some.json", home / "some", mode="fast", data=[str(home / "text.txt")],
        n_sequences=24, seq_len=64,
    )  # fmt: skip
    assert {u: str(x) for u, x in result.plan.levels.items()} == levels
    assert result.plan.results["refined"]["after"] < result.plan.results["refined"]["before"]


def test_a_refined_plan_says_what_was_done_to_it_and_measured_on_what(
    home: Path, plain: pipeline.Result
) -> None:
    notes = {"mode": "end-to-end", "fitness": "kl", "before": 0.5, "after": 0.4, "is_kept": True}
    plain.plan.replace(results={"distilled": notes}).save(home / "distilled.json")
    text = str(home / "text.txt")
    result = refine_plan(
        home / "distilled.json", home / "anew", mode="fast", data=[text], test=text, window=64,
        n_sequences=24, seq_len=64,
    )  # fmt: skip
    assert {*result.plan.results} == {"refined", "evaluation", "text"}  # its levels are new
    assert result.plan.results["text"] == "text.txt"
    assert result.plan.budget["asked"] == "2.6 bits per weight"
    assert [row.name for row in result.rows] == ["dense", "searched", measure.UNREFINED]
    about = (home / "anew" / "README.md").read_text().partition("## What each layer got")[0]
    assert "of text.txt." in about and "budget of\n2.6 bits per weight" in about
    assert "mode fast)" in about and "mode end-to-end" not in about


def test_plans_that_cannot_be_refined_are_refused_by_the_unit(
    home: Path, plain: pipeline.Result
) -> None:
    given: dict[str, Any] = {"data": [str(home / "text.txt")], "seq_len": 64, "n_sequences": 24}
    units = list(plain.plan.levels)
    wrong = plain.plan.replace(levels={**plain.plan.levels, units[0]: "rtn:bits=3.5"})
    wrong.save(home / "wrong.json")
    with pytest.raises(ValueError, match=f"^{re.escape(units[0])}: .*bits"):
        refine_plan(home / "wrong.json", home / "not", mode="fast", **given)
    levels = {"model.layers.77.mlp.up_proj": "rtn:bits=3,group_size=32"}
    Plan(levels, {"model.layers.77.mlp.up_proj": (64, 64)}).save(home / "alien.json")
    with pytest.raises(ValueError, match=r"(?s)does not fit.*layers\.77"):
        refine_plan(
            home / "alien.json", home / "not", model=str(home / "dense"), mode="fast", **given
        )


def test_the_command_refines_a_compressed_model(
    home: Path, plain: pipeline.Result, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["refine", plain.folder, "--mode", "fast", "--data", home / "text.txt", "--out"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), str(home / "by"), "--calibration", "24", "--seq-len", "64"])
    assert not ended.value.code, capsys.readouterr().err
    assert measure.UNREFINED in capsys.readouterr().out
    assert abs(stored_bytes(home / "by") - stored_bytes(plain.folder)) < 20_000  # card and plan


def test_the_command_refines_a_compressed_model_end_to_end(
    home: Path, plain: pipeline.Result, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["refine", plain.folder, "--mode", "end-to-end", "--data", home / "text.txt"]
    small = ["--calibration", "24", "--seq-len", "64", "--steps", "20", "--learning-rate", "2e-4"]
    small += ["--written", "4", "--codes"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words), *small, "--test", str(home / "text.txt"), "--out", str(home / "e")])
    assert not ended.value.code, capsys.readouterr().err
    assert measure.UNREFINED in capsys.readouterr().out
    old, new = Plan.load(plain.folder), Plan.load(home / "e")
    assert new.levels == old.levels and "end-to-end" in (home / "e" / "README.md").read_text()
    notes, rows = new.results["distilled"], new.results["evaluation"]
    assert notes["is_kept"] and notes["after"] < notes["before"] and notes["written"] == 4
    assert rows["searched"]["kl_nats"] < rows[measure.UNREFINED]["kl_nats"]
    sizes = [(f / "model.safetensors").stat().st_size for f in (plain.folder, home / "e")]
    assert sizes[0] == sizes[1]


def test_a_result_without_test_text_is_shown(
    plain: pipeline.Result, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = {"mode": "end-to-end", "fitness": "kl", "before": 0.5, "after": 0.4, "is_kept": True}
    plan = plain.plan.replace(results={"distilled": notes})
    show_result(replace(plain, plan=plan, rows=()))
    shown = capsys.readouterr().out
    assert "Refined (end-to-end): kl on held-out text 0.5000 -> 0.4000" in shown
    assert str(plain.folder) in shown.replace("\n", "")


def test_end_to_end_takes_a_compressed_model_only(home: Path, plain: pipeline.Result) -> None:
    for model in (home / "dense", plain.folder / "evopress_plan.json"):
        with pytest.raises(ValueError, match="refines a compressed model.*hf-evopress apply"):
            refine_end_to_end(str(model), home / "not", data=[str(home / "text.txt")])
    with pytest.raises(FileNotFoundError):  # before any training
        refine_end_to_end(
            str(plain.folder),
            home / "not",
            data=[str(home / "text.txt")],
            test="nowhere.txt",
            seq_len=64,
        )
    with pytest.raises(ValueError, match="seq_len 1024 is longer than the model's context of 512"):
        refine_end_to_end(str(plain.folder), home / "not", data=[str(home / "text.txt")])
    assert not (home / "not.work").exists()


@pytest.mark.parametrize(
    ("mode", "words"), [("none", "changes nothing"), ("bset", "did you mean 'best'")]
)
def test_an_unknown_mode_is_refused(
    home: Path, plain: pipeline.Result, mode: str, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        refine_plan(plain.folder, home / "no", mode=mode)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--mode", "end-to-ent"], "did you mean 'end-to-end'"),
        (["--mode", "bets+end-to-end"], "did you mean 'best+end-to-end'"),
        (["--mode", "fast", "--steps", "9"], "mode fast takes no --steps"),
        (["--mode", "best", "--codes"], "mode best takes no --codes"),
        (["--mode", "end-to-end", "--work", "w"], "mode end-to-end takes no --work"),
    ],
)
def test_the_command_refuses_what_a_mode_would_pass_over(
    words: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["refine", "nowhere", "--out", "nowhere-refined", *words])
    assert ended.value.code == 2
    assert answer in " ".join(capsys.readouterr().err.replace("\u2502", " ").split())
