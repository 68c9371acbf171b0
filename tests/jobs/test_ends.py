"""The whole file under the budget: embedding and head are searched, fixed or left dense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_evopress.jobs.ends import choose_ends
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.pipeline import compress
from hf_evopress.jobs.problem import pose
from hf_evopress.loading.embedding import CompressedEmbedding
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.models.size import stored_bytes
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe

SMALL = {"seq_len": 64, "calibration": 12, "search": 8, "heldout": 2, "test": 4}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"


def recipe(home: Path, out: Path, **changes: Any) -> Recipe:
    said = {
        "model": str(home / "dense"),
        "budget": {"size": "240kB"},
        "data": {"sources": [str(home / "text.txt")], **SMALL},
        "search": {"settings": {"generations": 2}, "sensitivity_tokens": 512},
        "out": str(out),
        **changes,
    }
    return Recipe.from_dict(said)


@pytest.fixture(scope="module")
def made(home: Path) -> Any:
    return compress(recipe(home, home / "small"), window=64)


def test_a_file_size_bends_the_ends_too(made: Any) -> None:
    assert stored_bytes(made.folder) <= 240_000
    assert {EMBEDDING, HEAD} < set(made.plan)
    assert not made.plan[EMBEDDING].is_dense and not made.plan[HEAD].is_dense
    assert set(made.plan.budget["ends_bytes"]) == {EMBEDDING, HEAD}


def test_what_was_searched_is_what_loads(made: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(made.folder)
    assert isinstance(model.model.embed_tokens, CompressedEmbedding)
    assert isinstance(model.lm_head, CompressedLinear)
    assert model.model.embed_tokens.level == made.plan[EMBEDDING]
    names = [row.name for row in made.rows]
    assert names[0] == "dense" and names[-1] == "searched"
    assert 0 < made.rows[-1].report.kl_nats < 3


def test_bits_are_those_of_the_decoder(made: Any, home: Path) -> None:
    plan = made.plan
    weights = {u: r * c for u, (r, c) in plan.shapes.items() if u not in (EMBEDDING, HEAD)}
    from hf_evopress.methods import compose

    bits = sum(compose.cost_bits(compose.normalize(plan[u]), plan.shapes[u]) for u in weights)
    assert plan.budget["bits_per_weight"] == pytest.approx(bits / sum(weights.values()), rel=1e-4)


def test_a_budget_of_bits_counts_the_ends_where_it_is_told_to(home: Path) -> None:
    alone = Job(recipe(home, home / "x", budget={"bits": 4.0}, ends="dense"))
    counted = Job(recipe(home, home / "x", budget={"bits": 4.0}, ends="budget"))
    assert counted.space.n_weights == alone.space.n_weights + 2 * 256 * 64
    assert counted.budget.limit == 4 * counted.space.n_weights
    assert "embedding and head counted" in counted.budget.text


def test_ends_at_a_level_lie_outside_a_budget_of_bits(home: Path) -> None:
    level = "rtn:bits=6,group_size=32"
    job = Job(recipe(home, home / "x", budget={"bits": 4.0}, ends=level))
    dense = Job(recipe(home, home / "x", budget={"bits": 4.0}, ends="dense"))
    assert job.budget == dense.budget and job.space.genes == dense.space.genes
    levels = job.levels(job.space.cheapest)
    assert str(levels[EMBEDDING]) == str(levels[HEAD]) == level
    assert job.genome(levels) == job.space.cheapest
    saved = dense.space.fixed_bits - job.space.fixed_bits
    assert 0.8 * 2 * 256 * 64 * (16 - 6.7) < saved < 2 * 256 * 64 * (16 - 6.6)


def test_ends_take_8_bits_beside_a_budget_of_bits_unless_told_otherwise(home: Path) -> None:
    job = Job(recipe(home, home / "x", budget={"bits": 4.0}))
    levels = job.levels(job.space.cheapest)
    assert str(levels[EMBEDDING]) == str(levels[HEAD]) == "rtn:bits=8,group_size=64"
    skipped = Job(recipe(home, home / "x", budget={"bits": 4.0}, skip=[HEAD, EMBEDDING]))
    dense = Job(recipe(home, home / "x", budget={"bits": 4.0}, ends="dense"))
    assert skipped.space == dense.space and skipped.units == dense.units


def test_a_pin_gives_one_end_another_level(home: Path) -> None:
    pin = {"*embed_tokens": "rtn:bits=5,group_size=64"}
    job = Job(
        recipe(home, home / "x", budget={"bits": 4}, ends="rtn:bits=8,group_size=64", pin=pin)
    )
    levels = job.levels(job.space.cheapest)
    assert levels[EMBEDDING].terms[0].kwargs["bits"] == 5
    assert levels[HEAD].terms[0].kwargs["bits"] == 8


def test_skipped_ends_stay_dense_and_a_line_says_what_that_costs(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(recipe(home, home / "x", budget={"size": "300kB"}, skip=["*embed_tokens"]))
    levels = job.levels(job.space.cheapest)
    assert EMBEDDING not in levels and HEAD in levels
    ends = job.problem.ends.size_bytes(levels)
    assert ends[EMBEDDING] == 2 * 256 * 64 > ends[HEAD]
    said = f"{EMBEDDING} is skipped and stays dense: 0.0328 MB of 16 bits, of which 8 bits would"
    assert said in caplog.text and HEAD not in caplog.text


def test_a_size_that_cannot_be_says_what_the_least_is_made_of(home: Path) -> None:
    with pytest.raises(ValueError, match=r"decoder .*, embedding and head .*, all else .*"):
        Job(recipe(home, home / "x", budget={"size": "40kB"}))


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"drop": 0.4}])
def test_other_budgets_leave_the_ends_dense(budget: dict[str, float], home: Path) -> None:
    job = Job(recipe(home, home / "x", budget=budget))
    assert not [unit for unit in job.units if unit.is_end]
    with pytest.raises(ValueError, match="stay dense"):
        Job(recipe(home, home / "x", budget=budget, ends="budget"))


def test_a_word_that_is_no_level_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'budget'"):
        recipe(home, home / "x", ends="budgt")


def test_a_plan_without_ends_starts_a_search_with_8_bits_for_them(
    home: Path, tmp_path: Path
) -> None:
    job = Job(recipe(home, home / "x", budget={"size": "300kB"}))
    levels = {u: x for u, x in job.levels(job.space.cheapest).items() if u not in (EMBEDDING, HEAD)}
    plan = Plan(levels)
    genome = job.genome(plan.levels)
    assert str(job.levels(genome)[HEAD]) == "rtn:bits=8,group_size=64"


def test_the_dense_export_writes_what_was_measured(made: Any, tmp_path: Path) -> None:
    from hf_evopress.jobs.convert import convert

    folder = convert(str(made.folder), tmp_path / "dense", format="dense")
    ids = torch.arange(32)[None]
    with torch.no_grad():
        packed, dense = (
            AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16)(ids).logits.float()
            for f in (made.folder, folder)
        )
    assert torch.allclose(packed, dense, atol=0.1)


def test_refinement_goes_on_from_the_compressed_embedding(home: Path) -> None:
    same = {"budget": {"size": "240kB"}, "work": str(home / "small.work"), "refine": "fast"}
    result = compress(recipe(home, home / "refined", **same), window=64)
    notes = result.plan.results["refined"]
    assert notes["before"] > 0 and notes["after"] > 0
    assert stored_bytes(result.folder) <= 240_000


def test_a_plan_with_ends_is_applied_with_the_same_tensors(made: Any, home: Path) -> None:
    from safetensors.torch import load_file

    from hf_evopress.jobs.apply import apply_plan

    counts = {"n_sequences": 12, "seq_len": 64, "seed": 0}
    folder = apply_plan(str(made.folder), home / "applied", data=[str(home / "text.txt")], **counts)
    one, other = (load_file(f / "model.safetensors") for f in (made.folder, folder))
    ends = [key for key in one if key.startswith((EMBEDDING, HEAD))]
    assert ends and one.keys() == other.keys()
    assert all(one[key].shape == other[key].shape for key in ends)


def test_an_embedding_is_offered_only_what_it_can_look_rows_up_in(tiny_model: Any) -> None:
    levels = ["gptq:bits=4,group_size=16", "trellis:bits=4,state_bits=8", "lowrank:rank=8"]
    recipe = Recipe.from_dict({"model": "m", "budget": {"ratio": 0.5}, "levels": levels})
    tied = choose_ends(tiny_model("llama", tie_word_embeddings=True), recipe)
    offered = {str(x) for x in tied.menus["model.embed_tokens"]}
    assert {*levels} - offered == {"trellis:bits=4,state_bits=8"}
    apart = choose_ends(tiny_model("llama", tie_word_embeddings=False), recipe)
    assert {*levels} <= {str(x) for x in apart.menus["lm_head"]}


def test_an_embedding_is_offered_2_bits_only_where_a_file_is_that_small(tiny_model: Any) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    n_weights = sum(p.numel() for p in model.parameters())

    def offered(**budget: Any) -> set[int]:
        recipe = Recipe.from_dict({"model": "m", "budget": budget, "ends": "budget"})
        menu = choose_ends(model, recipe).menus["model.embed_tokens"]
        return {x.terms[0].kwargs["bits"] for x in menu}

    small, large = f"{n_weights * 2.9 / 8:.0f}B", f"{n_weights * 3.1 / 8:.0f}B"
    assert 2 in offered(size=small) and 2 not in offered(size=large)
    assert 2 in offered(ratio=0.18) and 2 not in offered(ratio=0.19)
    assert 2 in offered(bits=2.9) and 2 not in offered(bits=3.0)


def test_the_least_size_that_is_said_can_be_had(tiny_model: Any) -> None:
    """A file of so few bytes is mostly headers and norms, at more than 3 bits per weight."""
    model = tiny_model("llama", tie_word_embeddings=True)

    def posed(size: str) -> Any:
        return pose(model, Recipe.from_dict({"model": "m", "budget": {"size": size}}))

    with pytest.raises(ValueError, match=r"smallest possible is \d+B") as caught:
        posed("5kB")
    least = str(caught.value).partition("possible is ")[2].partition("B")[0]
    assert 8 * int(least) / sum(p.numel() for p in model.parameters()) > 3
    assert posed(f"{least}B").budget.limit
