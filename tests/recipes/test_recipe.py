"""Recipes are strict, lossless and say what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_evopress.recipes.recipe import Recipe

FULL = """
model: me/model
budget: {size: 90MB}
data: {sources: [a.txt, b.txt], seq_len: 512}
levels: ["gptq:bits=3,group_size=64"]
tie: [[q_proj, k_proj]]
pin: {"*.v_proj": "gptq:bits=4,group_size=64"}
search: {strategy: evopress, settings: {tokens: [1024, 4096]}}
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_survives_yaml(tmp_path: Path) -> None:
    recipe = Recipe.load(_write(tmp_path, FULL))
    assert recipe.data.sources == ("a.txt", "b.txt") and recipe.tie == (("q_proj", "k_proj"),)
    assert Recipe.load(_write(tmp_path, recipe.to_yaml())) == recipe


def test_defaults_are_left_out_of_the_yaml() -> None:
    recipe = Recipe.from_dict({"model": "m", "budget": {"bits": 3}})
    assert recipe.to_dict() == {"model": "m", "budget": {"bits": 3.0}}


def test_overrides_reach_into_groups(tmp_path: Path) -> None:
    recipe = Recipe.load(_write(tmp_path, FULL), ["search.seed=7", "out=x", "data.sources=[c.txt]"])
    assert recipe.search.seed == 7 and recipe.out == "x" and recipe.data.sources == ("c.txt",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: m\nbudgte: {bits: 3}", "did you mean 'budget'"),
        ("model: m\nbudget: {bitz: 3}", "budget.'bitz', did you mean 'bits'"),
        ("model: m", "no 'budget'"),
        ("model: m\nbudget: {}", "needs a budget"),
        ("model: m\nbudget: {bits: 3, ratio: 0.5}", "in one way"),
        ("model: m\nbudget: {bits: -1}", r"in \(0, 32\]"),
        ("model: m\nbudget: {size: 90XB}", "90XB"),
        ("model: m\nbudget: {bits: many}", "budget.bits is a float"),
        ("model: m\nbudget: {bits: 3}\nsearch: {strategy: evopres}", "did you mean 'evopress'"),
        ("model: m\nbudget: {bits: 3}\nsearch: {fitness: lk}", "unknown fitness 'lk'"),
        ("model: m\nbudget: {bits: 3}\nsearch: {settings: {genrations: 3}}", "'generations'"),
        ("model: m\nbudget: {bits: 3}\ndata: {calibration: 0}", "at least 1, got 0"),
        (
            "model: m\nbudget: {bits: 3}\nsearch: {strategy: knapsack, start: p.json}",
            r"knapsack begins with no plan.* p\.json; those that do: evolve",
        ),
        ("model: m\nbudget: {bits: 3}\ndata: {written: 8}", "written is 8.*say refine"),
        (
            "model: m\nbudget: {bits: 3}\ndistil: {steps: 9}",
            "distil is of .*say refine: end-to-end",
        ),
        ("model: m\nbudget: 3", "^[^:]*: budget is a mapping, got 3"),
        ("model: m\nbudget: {bits: 3}\ndata:\n  seed: 1\n  seed: 2", "'seed' is there twice.* 4"),
        ("model: m\nbudget: {bits: 3}\ndtype: float64", "unknown dtype 'float64'"),
        ("- just\n- a list", "is a mapping"),
        ("model: [", "not valid YAML"),
    ],
)
def test_bad_recipes_are_refused_with_a_reason(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        Recipe.load(_write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.yaml"):
        Recipe.load(tmp_path / "gone.yaml")


def test_a_malformed_override_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key=value, got 'seed'"):
        Recipe.load(_write(tmp_path, FULL), ["seed"])


def test_an_override_that_is_no_yaml_says_how_to_quote_it(tmp_path: Path) -> None:
    path = _write(tmp_path, "model: m\nbudget: {bits: 3}")
    with pytest.raises(ValueError, match=r"skip=\*\.v_proj: .* is no YAML value; .*quotes"):
        Recipe.load(path, ["skip=*.v_proj"])
    assert Recipe.load(path, ['skip="*.v_proj"']).skip == ("*.v_proj",)
