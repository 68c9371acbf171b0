"""GGUF files, run in llama.cpp itself: the same tokens, logits and greedy text as ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hf_evopress.export.gguf import FILE, GGUFExport, nearest_kind
from hf_evopress.export.gguf_format.architecture import architecture_of
from hf_evopress.export.gguf_format.pieces import puts_space_first, scores_of
from hf_evopress.export.gguf_format.tokenizer import RULES, rule_of
from hf_evopress.methods import compose
from hf_evopress.models.ends import find_ends
from hf_evopress.models.units import find_units
from hf_evopress.plans.plan import Plan

from ..conftest import make_structured_text, make_tiny_model
from ..llama_cpp import LlamaCpp, complete, serve

pytest.importorskip("xllamacpp", reason="an extra: hf-evopress[gguf]")
gguf = pytest.importorskip("gguf", reason="an extra: hf-evopress[gguf]")

N_TOKENS = 304  # of most models, four more than the tokenizer has
TEXT = "the old fox sees the red garden. 7 and 7 is 14; the fox knows."
NASTY = (
    "Don't  stop\t\tme now!\n\n\n  x=[1234567]; naïve café — Ünïcode №5 "
    "日本語 👍🏽 it's  I'LL 3.14\r\n "
)
TYPES = ("q4_0", "q8_0", "q5_1", "iq4_nl", "q4_1", "q5_0")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied, with biases": ("llama", {"attention_bias": True, "tie_word_embeddings": True}),
    "rotary of Llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
}


def tokenizer_by(steps: list[Any], *, skips: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 300 tokens that cuts text by `steps`."""
    made = Tokenizer(models.BPE(ignore_merges=skips))
    made.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "<sep>"], initial_alphabet=alphabet
    )
    made.train_from_iterator([make_structured_text(100), NASTY * 20], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


def by_rule(rule: str) -> PreTrainedTokenizerFast:
    steps, skips = RULES[rule]
    made = {
        "ByteLevel": lambda s: pre_tokenizers.ByteLevel(False, use_regex=s["use_regex"]),
        "Digits": lambda s: pre_tokenizers.Digits(individual_digits=True),
        "Split": lambda s: pre_tokenizers.Split(Regex(s["pattern"]), "isolated"),
    }
    return tokenizer_by([made[step["type"]](step) for step in steps], skips=skips)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return by_rule("gpt-2")


def make(arch: str, **settings: Any) -> Any:
    """Return a random model whose norms and biases matter."""
    model = make_tiny_model(arch, vocab_size=N_TOKENS, **settings)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.3, generator=generator)
        elif "norm" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.mul_(4)
    return model


class Written:
    """A model, written with levels that go round, and what it computes after that."""

    def __init__(self, model: Any, tokenizer: Any, out: Path, *levels: str, **options: Any) -> None:
        units = find_units(model) + find_ends(model)
        self.plan = Plan(
            {u.name: levels[i % len(levels)] for i, u in enumerate(units)},
            shapes={u.name: u.shape for u in units},
            base_model="me/dense",
        )
        self.states = {
            name: compose.compress(level, model.get_submodule(name).weight.detach().float(), None)
            for name, level in self.plan.items()
            if not (level.is_dense or level.is_drop)
        }
        exporter = GGUFExport()
        for key, value in options.items():
            setattr(exporter, key, value)
        exporter.save(model, self.plan, lambda u, _: self.states[u], out, tokenizer=tokenizer)
        self.model, self.tokenizer, self.path = model, tokenizer, out / FILE

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


@pytest.fixture
def run() -> Iterator[Callable[[Path], LlamaCpp]]:
    """run(path) -> the file loaded by llama.cpp."""
    loaded: list[LlamaCpp] = []

    def load(path: Path) -> LlamaCpp:
        loaded.append(LlamaCpp(path, n_context=128))
        return loaded[-1]

    yield load
    for model in loaded:
        model.close()


@pytest.mark.parametrize("case", list(CASES))
def test_llama_cpp_computes_what_the_dense_model_does(
    case: str, words: Any, tmp_path: Path, run: Any
) -> None:
    arch, settings = CASES[case]
    made = Written(make(arch, **settings), words, tmp_path / "out", "dense")
    llama = run(made.path)
    ids = words(TEXT).input_ids
    assert llama.tokenize(TEXT) == ids
    ours, theirs = made.logits(ids), llama.logits(ids)
    # llama.cpp keeps keys and values in half precision
    assert (ours - theirs).abs().max() < 1e-2 * ours.std()


@pytest.mark.parametrize("case", list(CASES))
def test_llama_cpp_computes_what_the_plan_says(
    case: str, words: Any, tmp_path: Path, run: Any
) -> None:
    arch, settings = CASES[case]
    levels = [f"gguf:type={t},feedback=false" for t in TYPES]
    made = Written(make(arch, **settings), words, tmp_path / "out", *levels)
    types = {str(t.tensor_type.name).lower() for t in gguf.GGUFReader(made.path).tensors}
    assert types >= set(TYPES)
    ids = words(TEXT).input_ids
    ours, theirs = (x.log_softmax(-1) for x in (made.logits(ids), run(made.path).logits(ids)))
    # llama.cpp rounds what it multiplies by such weights to 8 bits
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 3e-4


def test_blocks_of_256_run_too(words: Any, tmp_path: Path, run: Any) -> None:
    model = make("llama", hidden_size=256, intermediate_size=512)
    levels = [f"gguf:type={t},feedback=false" for t in ("q2_k", "q3_k", "q4_k", "q6_k", "iq4_xs")]
    made = Written(model, words, tmp_path / "out", *levels)
    ids = words(TEXT).input_ids
    ours, theirs = (x.log_softmax(-1) for x in (made.logits(ids), run(made.path).logits(ids)))
    assert float((ours.exp() * (ours - theirs)).sum(-1).mean()) < 5e-3


def test_its_server_writes_our_greedy_text(trained_words: Any, tmp_path: Path) -> None:
    model, words = trained_words
    made = Written(model, words, tmp_path / "out", "gguf:type=q8_0,feedback=false")
    server = serve(made.path)
    for prompt in ("the old fox", "the tall tower builds"):
        ids = words(prompt, return_tensors="pt").input_ids
        ours = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
        assert complete(server, prompt, 24) == words.decode(ours, skip_special_tokens=True)


@pytest.fixture(scope="module")
def trained_words(words: Any) -> tuple[Any, Any]:
    """A model that has learnt the structured text in the tokens of `words`."""
    model = make_tiny_model("llama", vocab_size=N_TOKENS, tie_word_embeddings=True).train()
    data = torch.tensor(words(make_structured_text(1500)).input_ids)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        starts = torch.randint(len(data) - 65, (8,), generator=generator)
        batch = torch.stack([data[s : s + 64] for s in starts.tolist()])
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.requires_grad_(False).eval(), words


@pytest.mark.parametrize("rule", list(RULES))
def test_llama_cpp_cuts_text_as_the_tokenizer_does(rule: str, tmp_path: Path, run: Any) -> None:
    tokenizer = by_rule(rule)
    made = Written(make("llama", num_hidden_layers=1), tokenizer, tmp_path / "out", "dense")
    llama = run(made.path)
    for text in (TEXT, NASTY, "a<sep>b 12 <eos>", " lead", "x\n"):
        assert llama.tokenize(text) == tokenizer(text).input_ids, text


def test_what_a_tokenizer_puts_before_a_text_is_put_there(tmp_path: Path, run: Any) -> None:
    words = by_rule("gpt-2")
    words.bos_token = "<sep>"
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<sep> $A", pair="<sep> $A $B", special_tokens=[("<sep>", 1)]
    )
    made = Written(make("llama", num_hidden_layers=1), words, tmp_path / "out", "dense")
    assert run(made.path).tokenize(TEXT) == words(TEXT).input_ids
    assert words(TEXT).input_ids[0] == 1


def test_tokenizers_that_llama_cpp_cuts_otherwise_are_refused() -> None:
    import json

    plain = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False}
    with pytest.raises(ValueError, match="no rule that cuts text.*gpt-2, smollm"):
        rule_of({"model": {"type": "BPE"}, "pre_tokenizer": plain})
    with pytest.raises(ValueError, match="the tokenizer is Unigram"):
        rule_of({"model": {"type": "Unigram"}})
    words = json.loads(by_rule("gpt-2").backend_tokenizer.to_str())
    words["pre_tokenizer"]["add_prefix_space"] = True
    with pytest.raises(ValueError, match="no rule that cuts text"):
        rule_of(words)


def pieces(*, prepend: str = "normalizer") -> PreTrainedTokenizerFast:
    """Return a tokenizer of pieces as Llama 2's: every way to make a piece is a merge."""
    learnt = trainers.BpeTrainer(vocab_size=200, special_tokens=[])
    source = Tokenizer(models.BPE())
    source.pre_tokenizer = pre_tokenizers.Metaspace()
    source.train_from_iterator([make_structured_text(100)], learnt)
    found = sorted(source.get_vocab(), key=source.get_vocab().get)  # type: ignore[arg-type]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    chars = [t for t in found if len(t) == 1]
    made = [t for t in found if len(t) > 1][: N_TOKENS - len(tokens) - len(chars)]
    vocab = {t: i for i, t in enumerate([*tokens, *made, *chars])}
    merges = [
        (t[:i], t[i:]) for t in made for i in range(1, len(t)) if {t[:i], t[i:]} <= vocab.keys()
    ]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("prepend", ["normalizer", "first", "never"])
def test_pieces_are_merged_as_the_tokenizer_does(prepend: str, tmp_path: Path, run: Any) -> None:
    tokenizer = pieces(prepend=prepend)
    made = Written(make("mistral", num_hidden_layers=1), tokenizer, tmp_path / "out", "dense")
    llama = run(made.path)
    texts = (TEXT, NASTY, "knows knows", "two  spaces", "x\n", "  lead")
    for text in texts[:-1] if prepend == "first" else texts:
        assert llama.tokenize(text) == tokenizer(text).input_ids, text


def test_pieces_whose_merges_no_scores_can_say_are_refused() -> None:
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "vocab": dict.fromkeys(("a", "b", "ab", "aba", "ba"), 0),
    }
    lists = ("a b", "ab a", "b a"), ("b a", "a ba", "a b", "ab a")
    with pytest.raises(ValueError, match="does not merge 'a' and 'ba' into 'aba'"):
        scores_of({"model": {**model, "merges": list(lists[0])}})
    with pytest.raises(ValueError, match="make 'aba' are not listed together"):
        scores_of({"model": {**model, "merges": list(lists[1])}})
    with pytest.raises(ValueError, match="changes text in another way.*NFKC"):
        puts_space_first({"model": model, "normalizer": {"type": "NFKC"}})


def test_architectures_that_cannot_be_written_are_refused_by_name() -> None:
    for arch in ("gpt_neox", "phi3", "gemma3_text"):
        with pytest.raises(ValueError, match=f"no model of type '{arch}'.*(known|did you mean)"):
            architecture_of(make_tiny_model(arch).config)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="'yarn' cannot be written for llama"):
        architecture_of(make_tiny_model("llama", rope_parameters=yarn).config)
    with pytest.raises(ValueError, match="silu, this one has gelu"):
        architecture_of(make_tiny_model("llama", hidden_act="gelu").config)


def test_levels_that_a_file_cannot_hold_are_refused_by_name(words: Any, tmp_path: Path) -> None:
    level = "rtn:bits=3,group_size=32"
    with pytest.raises(ValueError, match=r"'rtn:bits=3,group_size=32' of model.*--requantise"):
        Written(make("llama"), words, tmp_path / "out", level, "dense")
    assert not (tmp_path / "out").exists()


def test_or_rounded_to_the_next_type_with_their_bits(words: Any, tmp_path: Path) -> None:
    level = "rtn:bits=3,group_size=32"
    made = Written(make("llama"), words, tmp_path / "out", level, requantise=True)
    types = {t.tensor_type.name for t in gguf.GGUFReader(made.path).tensors}
    assert types == {"F32", "IQ4_NL"}
    saved = Plan.load(tmp_path / "out")
    assert {str(x) for x in saved.levels.values()} == {"gguf:feedback=false,type=iq4_nl"}


def test_the_nearest_type_has_at_least_the_bits_where_there_is_one() -> None:
    names = [nearest_kind(round(b * 4 * 256), (4, 256)) for b in (2.0, 3.3, 4.5, 4.6, 7.0, 16.0)]
    assert [k and k.name for k in names] == ["q2_k", "q3_k", "iq4_nl", "q5_0", "q8_0", "q8_0"]
    assert nearest_kind(4 * 100 * 4, (4, 100)) is None


def test_dropped_sub_blocks_are_refused(words: Any, tmp_path: Path) -> None:
    model = make("llama")
    plan = Plan({"model.layers.1.mlp": "drop"}, shapes={}, base_model="me/dense")
    with pytest.raises(ValueError, match="layers.1.mlp is dropped.*every sub-block"):
        GGUFExport().save(model, plan, lambda u, x: {}, tmp_path / "out", tokenizer=words)


def test_a_file_without_tokenizer_is_refused(tmp_path: Path) -> None:
    plan = Plan({"model.layers.0.mlp.up_proj": "dense"}, shapes={}, base_model="me/dense")
    with pytest.raises(ValueError, match="holds the tokenizer"):
        GGUFExport().save(make("llama"), plan, lambda u, x: {}, tmp_path / "out")
