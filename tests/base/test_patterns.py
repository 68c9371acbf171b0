"""Patterns are globs or, after `re:`, regular expressions of whole names."""

from __future__ import annotations

import pytest

from hf_evopress.base.patterns import matches


@pytest.mark.parametrize(
    ("pattern", "is_match"),
    [
        ("*.v_proj", True),
        ("*.V_proj", False),
        ("re:.*[.](3|4)[.].*", True),
        ("re:model", False),
        ("re:.*up_proj", False),
    ],
)
def test_a_pattern_matches_whole_names(pattern: str, is_match: bool) -> None:
    assert matches("model.layers.3.self_attn.v_proj", pattern) is is_match


def test_a_broken_expression_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'re:\(' is no regular expression"):
        matches("a", "re:(")
