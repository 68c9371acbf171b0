"""A tokenizer of pieces, as Llama 2's and Mistral's: merges by score, other characters as bytes.

llama.cpp merges the pair whose piece has the highest score. A tokenizer.json lists merges in order
instead; both are the same where it lists every way to make a piece, and those of one piece
together, as all do that were converted from SentencePiece. Others are refused. One difference is
left: a tokenizer that splits by Metaspace puts no space before a text that begins with one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
_LAST = -1e6  # of a piece that no merge makes


def is_of_pieces(spec: Mapping[str, Any]) -> bool:
    """Return whether a tokenizer.json is of pieces with bytes to fall back on."""
    model = spec["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def scores_of(spec: Mapping[str, Any]) -> dict[str, float]:
    """Return piece -> score for the pieces that merges make, or raise ValueError."""
    vocab: Mapping[str, int] = spec["model"]["vocab"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in spec["model"]["merges"]]
    scores: dict[str, float] = {}
    known, last = set(merges), ""
    for rank, (left, right) in enumerate(merges):
        piece = left + right
        if piece in scores and piece != last:
            raise ValueError(
                f"gguf: the merges that make {piece!r} are not listed together, so that no scores "
                "of pieces say the same; llama.cpp would cut text otherwise"
            )
        scores.setdefault(piece, -float(rank))
        last = piece
    for piece in scores:
        ways = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        if lost := [w for w in ways if w[0] in vocab and w[1] in vocab and w not in known]:
            raise ValueError(
                f"gguf: the tokenizer does not merge {lost[0][0]!r} and {lost[0][1]!r} into "
                f"{piece!r}, and llama.cpp, which goes by scores of pieces, would"
            )
    return scores


def puts_space_first(spec: Mapping[str, Any]) -> bool:
    """Return whether a space is put before a text, or raise ValueError for other rules."""
    normalizer, cut = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    spaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    is_replaced = not cut and kinds in (["Replace"], ["Prepend", "Replace"])
    if is_replaced and steps[-1] == spaced and steps[0].get("prepend", _SPACE) == _SPACE:
        return len(kinds) == 2
    is_cut = cut.get("type") == "Metaspace" and not kinds and not cut.get("split", True)
    if is_cut and cut.get("replacement") == _SPACE:
        return cut.get("prepend_scheme", "always") != "never"
    raise ValueError(
        "gguf: this tokenizer of pieces changes text in another way than putting a space before "
        f"it ({(normalizer or cut)!r:.200})"
    )


def add_pieces(writer: Any, spec: Mapping[str, Any], n_rows: int) -> None:
    """Write the pieces of a tokenizer.json into the header of a file."""
    from gguf import TokenType

    scores, unknown = scores_of(spec), spec["model"].get("unk_token")
    tokens = {i: token for token, i in spec["model"]["vocab"].items()}
    kinds = {
        i: TokenType.BYTE
        if _BYTE.fullmatch(token)
        else TokenType.UNKNOWN
        if token == unknown
        else TokenType.NORMAL
        for i, token in tokens.items()
    }
    for added in spec.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        if added["content"] != unknown:
            kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
            kinds[added["id"]] = kind
    listed = [tokens.get(i, f"[PAD{i}]") for i in range(n_rows)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(listed)
    writer.add_token_scores([scores.get(token, _LAST) for token in listed])
    writer.add_token_types([int(kinds.get(i, TokenType.UNUSED)) for i in range(n_rows)])
    writer.add_add_space_prefix(puts_space_first(spec))
