"""The probes find what changed from the dense model, and nothing where nothing did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hf_evopress.scoring.kick.choices import choose, mean_kl
from hf_evopress.scoring.kick.closed_book import judge
from hf_evopress.scoring.kick.in_context import answer_from_passages, prompt_of
from hf_evopress.scoring.kick.probes import kick
from hf_evopress.scoring.kick.questions import KickSet, Question
from hf_evopress.scoring.kick.speaker import AfterStop, Speaker
from hf_evopress.scoring.kick.summaries import rouge_l

QUESTIONS = tuple(
    Question(f"{i} and {i} is?", (str(2 * i),), (str(2 * i), "fox"), f"{i} and {i} is {2 * i}.")
    for i in range(3)
)
DATA = KickSet(QUESTIONS, ("the red fox sees the tower.",))


@pytest.fixture
def long_model() -> nn.Module:
    """A tiny model whose context holds the prompts, 1 byte a token."""
    from ...conftest import make_tiny_model

    return make_tiny_model("llama", max_position_embeddings=2048)


@pytest.fixture
def dense(long_model: nn.Module, byte_tokenizer: Any) -> Speaker:
    return Speaker(long_model, byte_tokenizer)


def test_a_model_agrees_with_itself_in_everything(dense: Speaker) -> None:
    found = kick(dense, dense, DATA, noise=(1,))
    assert list(found) == [
        *("closed book", "choices", "in context", "in context, 1 other passages"),
        *("answer tokens", "summaries"),
    ]
    assert all(row.get("changed", 0) == 0 for row in found.values())
    assert found["choices"]["kl_nats"] == found["answer tokens"]["kl_nats"] == 0
    assert found["answer tokens"]["top1_agreement"] == found["summaries"]["rouge_l"] == 1
    assert found["in context"]["gain"] == found["in context"]["dense_gain"]


def test_another_model_disagrees(dense: Speaker, byte_tokenizer: Any) -> None:
    other: Any = copy.deepcopy(dense.model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    found = kick(Speaker(other, byte_tokenizer), dense, DATA, noise=())
    assert found["answer tokens"]["kl_nats"] > 0 and found["choices"]["kl_nats"] > 0
    assert found["closed book"]["changed"] > 0 and found["summaries"]["rouge_l"] < 1


def test_without_a_dense_model_there_are_shares_only(dense: Speaker) -> None:
    found = kick(dense, None, DATA, noise=())
    assert list(found) == ["closed book", "choices", "in context"]
    assert set(found["closed book"]) == {"n_questions", "accuracy", "accuracy_standard_error"}


def test_probes_without_material_are_left_out(dense: Speaker) -> None:
    bare = KickSet((Question("Who?", ("me",)),))
    assert list(kick(dense, dense, bare)) == ["closed book", "answer tokens"]
    assert list(kick(dense, dense, KickSet((), ("a text",)))) == ["summaries"]


def test_the_likeliest_choice_is_taken(dense: Speaker) -> None:
    (answer, log_probs), *_ = choose(dense, QUESTIONS)
    by_hand = [dense.likelihood("x", "y"), dense.likelihood("x", "y")]
    assert by_hand[0] == by_hand[1] < 0
    assert answer.said in QUESTIONS[0].choices
    assert answer.said == QUESTIONS[0].choices[int(log_probs.argmax())]
    assert torch.isclose(log_probs.exp().sum(), torch.tensor(1.0))
    assert mean_kl([log_probs], [log_probs]) == 0


def test_likelihood_is_the_models_own(dense: Speaker, byte_tokenizer: Any) -> None:
    ids = byte_tokenizer("the fox", return_tensors="pt").input_ids
    log_probs = dense.model(input_ids=ids).logits[0].log_softmax(-1)
    by_hand = sum(float(log_probs.detach()[i - 1, ids[0, i]]) for i in range(4, 7))
    assert abs(dense.likelihood("the ", "fox") - by_hand) < 1e-4


def test_exact_match_forgives_case_articles_and_dots() -> None:
    question = Question("Which animal?", ("blue whale", "whale"))
    assert judge("The Blue Whale.", question).is_correct
    assert not judge("a blue whale shark", question).is_correct


def test_noise_is_of_other_questions_and_the_same_for_both_models(dense: Speaker) -> None:
    seen: list[str] = []

    class Listener(Speaker):
        def write(self, prompt: str, n_tokens: int, *, stop: str | None = "\n") -> str:
            seen.append(prompt)
            return "2"

    listener = Listener(dense.model, dense.tokenizer)
    answers = answer_from_passages(listener, QUESTIONS, 2)
    assert [a.is_correct for a in answers] == [False, True, False]
    first = list(seen)
    answer_from_passages(listener, QUESTIONS, 2)
    assert seen[3:] == first
    assert all(q.passage in prompt for q in QUESTIONS for prompt in first)
    assert first[0].endswith("Question: 0 and 0 is?\nAnswer:")
    assert prompt_of(["p"], "q").count("Passage:") == 3


def test_a_prompt_beyond_the_context_is_refused(tiny_model: Any, byte_tokenizer: Any) -> None:
    speaker = Speaker(tiny_model(max_position_embeddings=64), byte_tokenizer)
    with pytest.raises(ValueError, match="context of 64"):
        speaker.write("x" * 60, 16)


def test_writing_ends_where_the_answer_is_cut(dense: Speaker) -> None:
    steps: list[int] = []
    dense.model.register_forward_hook(lambda *_: steps.append(1))
    made = []
    for prompt in (f"a tale of {n} foxes:" for n in range(4)):
        whole = dense.write(prompt, 24, stop=None)
        for stop in sorted({c for c in whole if "!" <= c <= "~"}):
            steps.clear()
            assert dense.write(prompt, 24, stop=stop) == whole.partition(stop)[0].strip()
            made.append(len(steps))
    assert min(made) < 4 and max(made) <= 24


def test_blanks_before_an_answer_do_not_end_it(byte_tokenizer: Any) -> None:
    texts = ["xx\n Paris\n", "xx Paris\n\n", "xx\n\n\n\n\n  ", "xx\n Paris."]
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(byte_tokenizer(t, add_special_tokens=False).input_ids) for t in texts], True
    )
    ends = AfterStop("\n", lambda row: byte_tokenizer.decode(row, skip_special_tokens=True), 2)
    assert ends(ids, None).tolist() == [True, True, False, False]


def test_progress_counts_every_question_of_both_models(dense: Speaker, byte_tokenizer: Any) -> None:
    told: list[tuple[str, int, int]] = []
    other = Speaker(copy.deepcopy(dense.model), byte_tokenizer)
    kick(other, dense, DATA, noise=(1,), progress=lambda *told_now: told.append(told_now))
    n = 4 * 2 * 3 + 3 + 2 * 1  # four ways to ask, answer tokens of both at once, one document
    assert [done for _, done, _ in told] == [*range(1, n + 1), n]
    assert {total for *_, total in told} == {n}
    assert told[6][0] == "kick: choices" and told[-1][0] == "kick"


def test_a_model_is_asked_from_memory_once(dense: Speaker, byte_tokenizer: Any) -> None:
    asked: list[str] = []

    class Listener(Speaker):
        def write(self, prompt: str, n_tokens: int, *, stop: str | None = "\n") -> str:
            asked.append(prompt)
            return "2"

    found = kick(Listener(dense.model, byte_tokenizer), None, DATA, noise=())
    assert len(asked) == len(set(asked)) == 6
    assert found["in context"]["gain"] == 0


def test_rouge_l_is_the_share_of_a_common_subsequence() -> None:
    assert rouge_l("a b c d", "a b c d") == 1 and rouge_l("a b", "c d") == 0
    assert rouge_l("a b c d", "a c") == pytest.approx(2 * 2 / 6)
    assert rouge_l("", "") == 1 and rouge_l("a", "") == 0
