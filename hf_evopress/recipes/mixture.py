"""Parse a fitness expression: one name, or a weighted sum such as `kl*0.7 + perplexity*0.3`.

Each term is [weight*]name[:key=value,...][*weight], with a plug-in's name and its options:
`kl:top_k=64`. Needs no torch: a recipe with a wrong name fails before anything is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ..base.plugins import did_you_mean, names

_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_TERM = re.compile(
    rf"(?:(?P<before>{_NUMBER})\s*\*\s*)?(?P<name>[A-Za-z_]\w*)"
    rf"(?::(?P<options>[^*]*?))?(?:\s*\*\s*(?P<after>{_NUMBER}))?"
)


@dataclass(frozen=True)
class Term:
    """One fitness of a sum, with its weight and the options of its class."""

    name: str
    weight: float = 1.0
    options: dict[str, int | float | str] = field(default_factory=dict)


def parse(text: str) -> list[Term]:
    """Return the terms of a fitness; ValueError says which one is wrong and what is known.

    >>> [(term.name, term.weight) for term in parse("kl*0.7 + perplexity*0.3")]
    [('kl', 0.7), ('perplexity', 0.3)]
    """
    return [_term(part.strip(), text) for part in text.split("+")]


def _term(part: str, text: str) -> Term:
    match = _TERM.fullmatch(part)
    if match is None or (match["before"] and match["after"]):
        raise ValueError(
            f"a fitness is a name or a sum such as kl*0.7 + perplexity*0.3; got {part!r} in "
            f"{text!r}"
        )
    name, known = match["name"], names("fitness")
    if name not in known:
        raise ValueError(f"unknown fitness {name!r}{did_you_mean(name, known)}")
    weight = float(match["before"] or match["after"] or 1)
    if weight <= 0:
        raise ValueError(f"weights of a fitness are above 0, got {weight:g} in {text!r}")
    return Term(name, weight, _options(match["options"], part))


def _options(text: str | None, part: str) -> dict[str, int | float | str]:
    if text is None:
        return {}
    found: dict[str, int | float | str] = {}
    for item in text.split(","):
        key, equals, value = (word.strip() for word in item.partition("="))
        if not (key and equals and value) or key in found:
            raise ValueError(f"options of a fitness are key=value, once each; got {part!r}")
        found[key] = _value(value)
    return found


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
