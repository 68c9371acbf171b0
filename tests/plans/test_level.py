"""Level strings: one level, one spelling."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_evopress.plans.level import DENSE, DROP, Level, Term

NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True)
VALUES = st.one_of(
    st.booleans(),
    st.integers(-5, 500),
    st.floats(0.001, 100).map(lambda x: round(x, 4)),
    st.sampled_from(["float16", "2:4", "top-k"]),
)
TERMS = st.builds(
    lambda method, params: Term.of(method, **params),
    NAMES,
    st.dictionaries(NAMES.filter(lambda n: n != "method"), VALUES, max_size=4),
)


@given(st.lists(TERMS, min_size=1, max_size=3))
def test_a_level_survives_its_own_string(terms):
    level = Level(tuple(terms))
    assert Level.parse(str(level)) == level
    assert str(Level.parse(str(level))) == str(level)


@pytest.mark.parametrize(
    "text",
    [
        "gptq:bits=3,group_size=64 + lowrank:rank=16",
        "gptq:group_size=64,bits=3+lowrank:rank=16",
        "  gptq: group_size = 64 , bits=3  +  lowrank:rank=16 ",
    ],
)
def test_spaces_and_order_do_not_matter(text):
    assert str(Level.parse(text)) == "gptq:bits=3,group_size=64 + lowrank:rank=16"


@pytest.mark.parametrize(
    "word, value",
    [("3", 3), ("-1", -1), ("0.5", 0.5), ("1e-3", 0.001), ("true", True), ("2:4", "2:4")],
)
def test_values_take_the_type_they_look_like(word, value):
    (term,) = Level.parse(f"x:a={word}").terms
    assert term.kwargs == {"a": value} and type(term.kwargs["a"]) is type(value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is not a method name"),
        ("GPTQ:bits=3", "'GPTQ' is not a method name"),
        ("gptq:bits", "'bits' is not parameter=value"),
        ("gptq:", "is not parameter=value"),
        ("gptq:bits=3,", "is not parameter=value"),
        ("gptq:bits=3,bits=4", "'bits' is given twice"),
        ("gptq:bits=3 + ", "is not"),
        ("gptq:bits=../../x y", "is not parameter=value"),
    ],
)
def test_malformed_levels_are_refused_with_an_example(text, message):
    with pytest.raises(ValueError, match=message):
        Level.parse(text)


def test_something_else_than_a_string_is_a_type_error():
    with pytest.raises(TypeError, match="a level is a string such as"):
        Level.parse(3)


def test_dense_and_drop_know_themselves():
    assert DENSE.is_dense and not DENSE.is_drop
    assert DROP.is_drop and not DROP.is_dense
    assert not Level.parse("gptq:bits=3").is_dense


def test_levels_sort_by_their_string():
    levels = [Level.parse(x) for x in ("rtn:bits=4", "dense", "gptq:bits=3")]
    assert [str(x) for x in sorted(levels)] == ["dense", "gptq:bits=3", "rtn:bits=4"]


def test_levels_are_read_without_torch():
    code = "import sys, hf_evopress.plans.level, hf_evopress.base.plugins"
    code += "; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
