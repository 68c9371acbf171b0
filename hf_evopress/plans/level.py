"""A level: one setting for one unit, written as a canonical string.

    gptq:bits=3,group_size=64 + lowrank:rank=16

Terms add up: the first compresses the weight, each later one the error that is left.
This file knows the spelling only; which methods and parameters exist is the business of
`hf_evopress.methods`, so that plans can be read, compared and shown without importing torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

Value = bool | int | float | str

# Parameters print in this order, any others after them by name: one level, one spelling.
PARAM_ORDER = ("sparsity", "pattern", "rank", "bits", "group_size", "symmetric")

MAX_TERMS = 8  # each stores something; a file that asks for more means harm

_NAME = re.compile(r"[a-z][a-z0-9_]*\Z")
_WORD = re.compile(r"[A-Za-z0-9_.:/-]+\Z")
_EXAMPLE = "gptq:bits=3,group_size=64"


@dataclass(frozen=True)
class Term:
    """One method with its parameters, for example `gptq:bits=3,group_size=64`."""

    method: str
    params: tuple[tuple[str, Value], ...] = ()

    @classmethod
    def of(cls, method: str, **params: Value) -> Term:
        """Return the term in canonical parameter order."""
        return cls(method, tuple(sorted(params.items(), key=lambda item: _param_key(item[0]))))

    @property
    def kwargs(self) -> dict[str, Value]:
        """The parameters as keyword arguments."""
        return dict(self.params)

    def __str__(self) -> str:
        if not self.params:
            return self.method
        return f"{self.method}:" + ",".join(f"{k}={_print_value(v)}" for k, v in self.params)


@dataclass(frozen=True)
class Level:
    """One or more terms that add up to a compressed weight.

    >>> str(Level.parse("gptq:group_size=64,bits=3+lowrank:rank=16"))
    'gptq:bits=3,group_size=64 + lowrank:rank=16'
    """

    terms: tuple[Term, ...]

    @staticmethod
    def parse(text: str | Level) -> Level:
        """Return the level that `text` spells; spaces and parameter order do not matter."""
        if isinstance(text, Level):
            return text
        if not isinstance(text, str):
            raise TypeError(f"a level is a string such as {_EXAMPLE!r}, got {text!r:.200}")
        return _parse(text)

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))

    def __lt__(self, other: Level) -> bool:
        return str(self) < str(other)

    @property
    def is_dense(self) -> bool:
        return self == DENSE

    @property
    def is_drop(self) -> bool:
        return self == DROP


@lru_cache(maxsize=4096)
def _parse(text: str) -> Level:
    parts = re.split(r"\s\+\s|\+(?=[a-z])", text, maxsplit=MAX_TERMS)
    if len(parts) > MAX_TERMS:
        raise ValueError(f"a level has at most {MAX_TERMS} terms, got more: {text[:80]!r} ...")
    return Level(tuple(_parse_term(part, text) for part in parts))


def _parse_term(part: str, text: str) -> Term:
    method, colon, tail = part.strip().partition(":")
    if not _NAME.match(method):
        raise ValueError(
            f"level {text!r}: {method!r} is not a method name; a level looks like {_EXAMPLE!r}"
        )
    params: dict[str, Value] = {}
    for item in tail.split(",") if colon else ():
        key, equals, value = (s.strip() for s in item.partition("="))
        if not equals or not _NAME.match(key) or not _WORD.match(value):
            raise ValueError(
                f"level {text!r}: {item!r} is not parameter=value; a level looks like {_EXAMPLE!r}"
            )
        if key in params:
            raise ValueError(f"level {text!r}: {key!r} is given twice")
        params[key] = _parse_value(value)
    return Term.of(method, **params)


def _param_key(name: str) -> tuple[int, str]:
    return (PARAM_ORDER.index(name) if name in PARAM_ORDER else len(PARAM_ORDER), name)


def _parse_value(word: str) -> Value:
    if word in ("true", "false"):
        return word == "true"
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            pass
    return word


def _print_value(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


DENSE = Level.parse("dense")
DROP = Level.parse("drop")
