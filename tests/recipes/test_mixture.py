"""Words for fitnesses are read strictly and without torch."""

from __future__ import annotations

import pytest

from hf_evopress.recipes.mixture import Term, parse


@pytest.mark.parametrize(
    ("words", "terms"),
    [
        ("kl", [Term("kl")]),
        ("kl*0.7+perplexity*0.3", [Term("kl", 0.7), Term("perplexity", 0.3)]),
        ("0.5 * kl:top_k=64 + perplexity", [Term("kl", 0.5, {"top_k": 64}), Term("perplexity")]),
        ("kl:top_k=64*2", [Term("kl", 2.0, {"top_k": 64})]),
    ],
)
def test_names_weights_and_options_are_read(words: str, terms: list[Term]) -> None:
    assert parse(words) == terms


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("kll", "did you mean 'kl'"),
        ("kl*", "a name or a sum"),
        ("2*kl*2", "a name or a sum"),
        ("kl + ", "a name or a sum"),
        ("kl-perplexity", "a name or a sum"),
        ("kl*0", "above 0"),
        ("kl:top_k", "key=value"),
        ("kl:top_k=1,top_k=2", "once each"),
    ],
)
def test_what_is_wrong_is_named(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(words)
