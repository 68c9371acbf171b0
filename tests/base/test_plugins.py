"""Methods, fitnesses and exports are found by name, and a near miss is helped."""

from __future__ import annotations

import sys
import textwrap
from importlib.metadata import EntryPoint

import pytest

from hf_evopress.base import plugins
from hf_evopress.methods import compose
from hf_evopress.methods.base import Method


@pytest.fixture
def foreign_method(tmp_path, monkeypatch):
    """An installed package that offers the method `halve` through an entry point."""
    (tmp_path / "foreign_halve.py").write_text(
        textwrap.dedent(
            '''
            """Keep half of every weight; for tests."""
            from hf_evopress.methods.base import Method

            class Halve(Method):
                name = "halve"
                def cost_bits(self, shape, **params):
                    return 32 * shape[0] * shape[1]
                def compress(self, W, stats, **params):
                    return {"weight": W / 2}
                def decompress(self, state, shape, dtype, **params):
                    return state["weight"].to(dtype)
                def empty(self, shape, dtype, **params):
                    return {}
            '''
        )
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    point = EntryPoint("halve", "foreign_halve:Halve", "hf_evopress.methods")
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: [point] if "methods" in group else []
    )
    caches = (
        plugins._entry_points,
        plugins.load,
        compose.method,
        compose.normalize,
        compose._resolved,
    )
    for cache in caches:
        cache.cache_clear()
    yield "halve"
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()
    sys.modules.pop("foreign_halve", None)


def test_every_file_in_the_folder_is_a_method():
    found = plugins.names("methods")
    assert {"dense", "gptq", "rtn"} <= set(found)
    assert "base" not in found and found == sorted(found)


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_the_class_has_the_name_of_its_file(name):
    made = plugins.load("methods", name)
    assert issubclass(made, Method) and made.name == name


def test_a_near_miss_is_answered_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown method 'gptp', did you mean 'gptq'"):
        plugins.load("methods", "gptp")


def test_a_far_miss_is_answered_with_all_names():
    with pytest.raises(ValueError, match=r"unknown method 'zzz'; known: .*dense.*gptq"):
        plugins.load("methods", "zzz")


def test_a_method_of_another_package_is_found_by_entry_point(foreign_method):
    assert foreign_method in plugins.names("methods")
    assert plugins.describe("methods", foreign_method).startswith("Keep half")
    assert str(compose.normalize("halve")) == "halve"


def test_descriptions_are_read_without_importing():
    assert plugins.describe("methods", "gptq").startswith("GPTQ")
