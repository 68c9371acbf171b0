"""A tokenizer in the header of a GGUF file: byte-level BPE here, pieces in pieces.py.

Tokens, their kinds, merges and special tokens. llama.cpp has the rules that cut a text into words
built in, by name; a tokenizer with other rules is refused, it would give other tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from typing import Any

from .pieces import add_pieces, is_of_pieces

_BYTES = {"type": "ByteLevel", "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_BEHIND = {"type": "ByteLevel", "use_regex": False}
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# what llama.cpp calls a rule -> the steps of tokenizer.json, and whether whole words skip merges
RULES: Mapping[str, tuple[list[dict[str, Any]], bool]] = {
    "gpt-2": ([_BYTES], False),
    "smollm": ([_DIGITS, _BYTES], False),
    "llama-bpe": ([{"type": "Split", "pattern": _WORDS % r"\p{N}{1,3}"}, _BEHIND], True),
    "qwen2": ([{"type": "Split", "pattern": _WORDS % r"\p{N}"}, _BEHIND], False),
}


def add_tokenizer(writer: Any, tokenizer: Any, n_rows: int) -> None:
    """Write `tokenizer` into the header of a file of a model with `n_rows` embedded tokens."""
    from gguf import SpecialVocab

    spec = _json_of(tokenizer)
    last = max(*spec["model"]["vocab"].values(), *(a["id"] for a in spec.get("added_tokens", ())))
    if last >= n_rows:
        raise ValueError(f"gguf: the tokenizer has token {last}, the model embeds {n_rows} tokens")
    if is_of_pieces(spec):
        add_pieces(writer, spec, n_rows)
    else:
        _add_bytes(writer, spec, n_rows)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        special = SpecialVocab(folder, load_merges=not is_of_pieces(spec), n_vocab=n_rows)
    # what transformers adds to a text is what counts, whatever its files say
    bos = getattr(tokenizer, "bos_token_id", None)
    ids = tokenizer("a").input_ids
    special.add_special_token = {"bos": bool(ids) and bos is not None and ids[0] == bos}
    special.add_to_gguf(writer, quiet=True)


def _add_bytes(writer: Any, spec: Mapping[str, Any], n_rows: int) -> None:
    from gguf import TokenType

    rule = rule_of(spec)
    tokens = {i: token for token, i in spec["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, TokenType.NORMAL)
    for added in spec.get("added_tokens", ()):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    # rows of the embedding beyond the tokenizer, as models pad theirs
    writer.add_token_list([tokens.get(i, f"[PAD{i}]") for i in range(n_rows)])
    writer.add_token_types([int(kinds.get(i, TokenType.UNUSED)) for i in range(n_rows)])


def rule_of(spec: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer.json cuts text, or raise ValueError."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ValueError(
            f"gguf: the tokenizer is {model.get('type')}; only byte-level BPE, as of Llama 3, "
            "SmolLM and Qwen, and BPE of pieces, as of Llama 2 and Mistral, can be written"
        )
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    for rule, (wanted, skips) in RULES.items():
        same = len(steps) == len(wanted) and all(map(_agrees, steps, wanted))
        if same and bool(model.get("ignore_merges")) == skips:
            return rule
    raise ValueError(
        "gguf: llama.cpp knows no rule that cuts text as this tokenizer does "
        f"({json.dumps(steps)[:300]}); known are those of {', '.join(RULES)}"
    )


def _agrees(step: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    found = dict(step)
    pattern = found.get("pattern")
    if isinstance(pattern, Mapping):
        found["pattern"] = pattern.get("Regex")
    if step.get("type") == "Split" and (step.get("invert") or step.get("behavior") != "Isolated"):
        return False
    return not step.get("add_prefix_space") and all(found.get(k) == v for k, v in wanted.items())


def _json_of(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"gguf: {type(tokenizer).__name__} has no tokenizer.json; only fast tokenizers can be "
            "written"
        )
    return json.loads(backend.to_str())
