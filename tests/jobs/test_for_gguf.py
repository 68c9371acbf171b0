"""compress --for gguf and export --format gguf: budgets in bytes of the file, what it can hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hf_evopress.cli import main
from hf_evopress.export.gguf import FILE
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.pipeline import compress
from hf_evopress.methods.maths.ggml.types import KINDS
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe

from ..conftest import make_structured_text, make_tiny_model
from ..export.test_gguf import N_TOKENS, by_rule
from ..llama_cpp import LlamaCpp

pytest.importorskip("xllamacpp", reason="an extra: hf-evopress[gguf]")
gguf = pytest.importorskip("gguf", reason="an extra: hf-evopress[gguf]")

NARROW = ["gguf:type=q4_1", "gguf:type=q5_1", "gguf:type=q8_0,feedback=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model in dense/ and a text."""
    folder = tmp_path_factory.mktemp("gguf")
    model: Any = make_tiny_model("llama", vocab_size=N_TOKENS, tie_word_embeddings=True)
    model.to(torch.bfloat16).save_pretrained(folder / "dense")
    by_rule("gpt-2").save_pretrained(folder / "dense")
    (folder / "text.txt").write_text(make_structured_text(1500, seed=5))
    return folder


def cli(words: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


def recipe(place: Path, out: Path, **more: Any) -> Recipe:
    base: dict[str, Any] = {
        "model": str(place / "dense"),
        "out": str(out),
        "export": "gguf",
        "budget": {"ratio": 0.55},
        "levels": NARROW,
        "data": {
            "sources": [str(place / "text.txt")],
            "seq_len": 64,
            "calibration": 12,
            "search": 4,
            "heldout": 1,
            "test": 2,
        },
        "search": {"strategy": "knapsack", "sensitivity_tokens": 256},
    }
    return Recipe.from_dict(base | more)


def test_the_file_keeps_the_budget_and_holds_the_plan(place: Path, tmp_path: Path) -> None:
    made = recipe(place, tmp_path / "small")
    result = compress(made)
    assert result.gguf == tmp_path / "small-gguf"
    path = result.gguf / FILE
    job = Job(made)
    size, limit = path.stat().st_size, job.space.dense_bits * 0.55 / 8
    assert size <= job.space.size_bytes(job.genome(result.plan)) <= limit
    assert job.space.size_bytes(job.genome(result.plan)) - size < 64 * 40  # the padding, at most
    by_name = {t.name: t.tensor_type.name.lower() for t in gguf.GGUFReader(path).tensors}
    plan = Plan.load(result.gguf)
    assert dict(plan.levels) == dict(result.plan.levels)
    embedding = plan["model.embed_tokens"].terms[0].kwargs["type"]
    assert by_name["token_embd.weight"] == embedding and "output.weight" not in by_name
    assert by_name["blk.1.ffn_up.weight"] in KINDS
    llama = LlamaCpp(path, n_context=64)
    assert torch.isfinite(llama.logits(list(range(20)))).all()
    llama.close()


def test_a_budget_of_bits_leaves_the_ends_at_8_bits(place: Path, tmp_path: Path) -> None:
    made = recipe(place, tmp_path / "small", budget={"bits": 5.5}, levels=None)
    job = Job(made)
    assert {str(x) for x in job.menus["model.embed_tokens"]} == {"gguf:type=q8_0"}
    offered = {str(x) for x in job.menus["model.layers.0.mlp.up_proj"]}
    assert offered >= {"gguf:type=q5_1", "gguf:type=q8_0"} and all("gguf" in x for x in offered)
    assert not any("_k" in x for x in offered), "64 inputs are no multiple of 256"


def test_a_unit_is_offered_those_of_the_levels_that_its_rows_take(
    place: Path, tmp_path: Path
) -> None:
    model: Any = make_tiny_model("llama", vocab_size=N_TOKENS, intermediate_size=256)
    model.save_pretrained(tmp_path / "wide")
    by_rule("gpt-2").save_pretrained(tmp_path / "wide")
    levels = ["gguf:type=q4_k", "gguf:type=q5_0"]
    job = Job(recipe(place, tmp_path / "out", model=str(tmp_path / "wide"), levels=levels))
    offered = {u: [str(x) for x in menu] for u, menu in job.menus.items()}
    assert offered["model.layers.0.mlp.down_proj"] == levels
    assert offered["model.layers.0.mlp.up_proj"] == levels[1:]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"families": ["quant"], "levels": None}, "has its own levels; leave families"),
        ({"drop": {"kinds": ["mlp"]}}, "holds every weight and every sub-block"),
        ({"budget": {"sparsity": 0.5}, "levels": None}, "holds every weight and every sub-block"),
        ({"export": "ggml"}, "gguf"),
        ({"levels": ["rtn:bits=4,group_size=32"]}, "which a GGUF file cannot hold"),
        ({"levels": ["gguf:type=q4_k"]}, "blocks of 256.*types that fit: q4_0"),
        ({"levels": ["gguf:type=q4_9"]}, "takes type from q4_0"),
    ],
)
def test_what_no_file_can_hold_is_refused_before_any_work(
    place: Path, tmp_path: Path, more: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        Job(recipe(place, tmp_path / "small", **more))


def test_a_folder_of_others_where_the_file_goes_is_refused(place: Path, tmp_path: Path) -> None:
    (tmp_path / "small-gguf").mkdir()
    (tmp_path / "small-gguf" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"mine\.txt"):
        compress(recipe(place, tmp_path / "small"))


def test_the_command_exports_what_was_compressed_for_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = compress(recipe(place, tmp_path / "small"))
    assert cli(["export", str(result.folder), "--format", "gguf", "-o", str(tmp_path / "f")]) == 0
    assert result.gguf is not None
    assert (tmp_path / "f" / FILE).read_bytes() == (result.gguf / FILE).read_bytes()
    assert "f:" in capsys.readouterr().out


def test_the_command_rounds_other_levels_and_says_what_that_cost(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = ["rtn:bits=4,group_size=32", "rtn:bits=8,group_size=64"]
    budget = {"bits": 6}
    result = compress(
        recipe(place, tmp_path / "o", export="evopress", levels=levels, budget=budget)
    )
    command = ["export", str(result.folder), "--format", "gguf", "-o", str(tmp_path / "f")]
    assert cli(command) != 0
    assert "--requantise" in capsys.readouterr().err
    assert cli([*command, "--requantise", "--data", str(place / "text.txt")]) == 0
    told = capsys.readouterr().out
    assert "requantised: KL 0." in told and (tmp_path / "f" / FILE).is_file()
    assert cli([*command[:2], "--format", "dense", "-o", str(tmp_path / "d"), "--requantise"]) != 0
    assert "only gguf takes --requantise" in capsys.readouterr().err
