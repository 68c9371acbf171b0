"""Questions come from the built-in file and from files of others, checked line by line."""

from pathlib import Path

import pytest

from hf_evopress.jobs.evaluate import kick_questions
from hf_evopress.scoring.kick.questions import KickSet, Question, read_questions


def test_the_built_in_set_is_whole() -> None:
    data = read_questions()
    assert len(data.questions) == 40 and len(data.documents) == 6
    assert len({q.question for q in data.questions}) == 40
    for question in data.questions:
        assert len(question.choices) == 4 and len(set(question.choices)) == 4
        assert any(a.lower() in (question.passage or "").lower() for a in question.answers)


def test_the_right_choice_stands_everywhere() -> None:
    places = [q.choices.index(q.answers[0]) for q in read_questions().questions]
    assert all(places.count(i) >= 6 for i in range(4))  # guessing one place is no better


def test_a_file_may_hold_questions_without_choices_and_documents(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"question": "Who?", "answers": "me"}\n\n{"document": "A text."}\n')
    assert read_questions(path) == KickSet((Question("Who?", ("me",)),), ("A text.",))
    assert read_questions(path).first(1) == read_questions(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "Who?", "answer": "me"}', "did you mean 'answers'"),
        ('{"question": "Who?"}', "answers is a list of texts"),
        ('{"question": "Who?", "answers": []}', "needs text and answers"),
        ('{"question": "Who?", "answers": ["a"], "choices": ["b", "c"]}', "is not in"),
        ('{"question": 3, "answers": ["a"]}', "are texts"),
        ('{"document": "a", "question": "b"}', "on a line of its own"),
        ("[1]", "a line is a JSON object"),
        ("{", "line 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"document": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=message) as raised:
        read_questions(path)
    assert "mine.jsonl, line 2" in str(raised.value)


def test_no_file_and_an_empty_one_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="neither a question nor a document"):
        read_questions(tmp_path / "empty.jsonl")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_named(limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit needs to be 1 or more, got {limit}"):
        kick_questions([], limit=limit)
