"""The recipes of the repository and the schema that editors read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_evopress.base.plugins import names
from hf_evopress.base.resources import bundled
from hf_evopress.plans.level import Level
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.recipes.schema import recipe_schema, write_schema

FILES = sorted(bundled("recipes").glob("*.yaml"))
RUN = {f"smollm2-135m-{bits}bit" for bits in (2.8, 3.3, 3.8, 4.3)} | {
    f"smollm2-135m-{task}"
    for task in ("30mb", "90mb", "sparse50", "joint-2.8bit", "joint-3.3bit", "drop25", "lowrank80")
}
every_recipe = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


@every_recipe
def test_a_recipe_loads(path: Path) -> None:
    recipe = Recipe.load(path)
    assert {Level.parse(x).terms[0].method for x in recipe.levels or ()} <= set(names("methods"))


@every_recipe
def test_a_recipe_is_found_by_its_name(path: Path) -> None:
    assert Recipe.load(path.stem) == Recipe.load(path)


@every_recipe
def test_a_recipe_that_was_not_run_says_so(path: Path) -> None:
    assert ("not run here" in path.read_text(encoding="utf-8")) != (path.stem in RUN)


@every_recipe
def test_a_recipe_names_the_schema_and_keeps_to_it(path: Path) -> None:
    import yaml

    text = path.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    _check(yaml.safe_load(text), recipe_schema(), path.stem)


def _check(value: object, schema: dict, where: str) -> None:
    """A few lines of JSON Schema: what recipe_schema() uses of it."""
    if "anyOf" in schema:
        array, item = schema["anyOf"]
        return _check(value, array if isinstance(value, list) else item, where)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    python = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    numbers = (int, float)
    assert any(isinstance(value, python.get(k, numbers)) for k in kinds), (where, value, kinds)
    assert value in schema.get("enum", [value]), where
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value), where
        for key, inner in value.items():
            known = schema.get("properties", {})
            assert key in known or schema.get("additionalProperties") is not False, f"{where}.{key}"
            if key in known:
                _check(inner, known[key], f"{where}.{key}")
    if isinstance(value, list):
        for inner in value:
            _check(inner, schema["items"], where)
    return None


def test_the_schema_of_the_repository_is_that_of_the_code() -> None:
    stored = json.loads((bundled("recipes") / "schema.json").read_text(encoding="utf-8"))
    assert stored == recipe_schema(), (
        "recipe.py changed: python -c 'from hf_evopress.recipes.schema import write_schema; "
        "write_schema()'"
    )


def test_the_schema_is_written_as_json(tmp_path: Path) -> None:
    assert json.loads(write_schema(tmp_path / "s.json").read_text()) == recipe_schema()


def test_the_schema_knows_every_key_and_choice() -> None:
    schema = recipe_schema()
    assert schema["required"] == ["model", "budget"]
    assert "evolve" in schema["properties"]["search"]["properties"]["strategy"]["enum"]
    assert schema["properties"]["budget"]["properties"]["bits"]["description"].startswith("stored")


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(FileNotFoundError, match="did you mean 'smollm2-135m-3.3bit'"):
        Recipe.load("smollm2-135m-3.3")
