"""Tasks of lm-evaluation-harness on models that are loaded, with flips and in the card."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from hf_evopress.cli import main
from hf_evopress.jobs.evaluate import evaluate_model, kick_questions
from hf_evopress.scoring.tasks import TaskRequest, check_tasks, run_tasks

pytest.importorskip("lm_eval", reason='needs pip install "hf-evopress[eval]"')

CHOICE = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 2.0}}
"""
WRITTEN = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 4, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    words = ["red", "tall", "quiet", "old"]
    nouns = ["fox", "river", "engine", "doctor", "planet"]
    rows = [
        {"question": f"the {a} fox sees the", "choices": [f" {b}", f" {c}"], "answer": i % 2}
        for i, (a, b, c) in enumerate(
            (a, b, c) for a in words[:4] for b, c in combinations(nouns, 2)
        )
    ]
    data = folder / "test.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "colours.yaml").write_text(CHOICE.format(data=data))
    (folder / "sums.yaml").write_text(WRITTEN.format(data=data))
    return folder


@pytest.fixture(scope="module")
def models(
    trained_llama: nn.Module,
    write_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    level = "rtn:bits=2,group_size=32"
    return write_model(tmp_path_factory.mktemp("models"), trained_llama, level)


def request_of(tasks: Path, *names: str, **settings: Any) -> TaskRequest:
    return TaskRequest(names, (str(tasks),), **settings)


def test_a_loaded_model_answers_tasks_of_ones_own(
    trained_llama: nn.Module, byte_tokenizer: Any, tasks: Path
) -> None:
    found = run_tasks(trained_llama, byte_tokenizer, request_of(tasks, "colours", "sums"))
    colours, sums = found["colours"], found["sums"]
    assert colours.n_questions == len(colours.answers) == 40
    assert (colours.dataset, colours.split, colours.version) == ("colours", "test", "2.0")
    right = sum(bool(a.is_correct) for a in colours.answers) / 40
    assert colours.metrics["acc"] == pytest.approx(right)
    assert colours.errors["acc"] > 0 and set(colours.metrics) == {"acc", "acc_norm"}
    assert {a.said for a in colours.answers} <= {"0", "1"}
    assert len(sums.answers) == 40 and 0 <= sums.metrics["exact_match"] <= 1


def test_the_command_compares_with_the_dense_model_and_fills_the_card(
    models: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = models / "small"
    words = ["evaluate", str(small), "--against", str(models / "dense"), "--tasks", "colours,sums"]
    words += ["--include-path", str(tasks), "--limit", "30", "--card"]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--json"])
    assert not ended.value.code, capsys.readouterr().err
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])["tasks"]
    flips = found["colours"]["flips"]
    gained = flips["wrong_to_correct"] - flips["correct_to_wrong"]
    metrics, dense = found["colours"]["metrics"], found["colours"]["dense_metrics"]
    assert metrics["acc"] - dense["acc"] == pytest.approx(gained)
    assert flips["n_answers"] == 30 and flips["changed"] > 0

    card = (small / "README.md").read_text()
    assert "## Tasks" in card and "answers changed" in card and "| colours | 30 |" in card
    metadata = yaml.safe_load(card.split("---")[1])
    from huggingface_hub.repocard_data import model_index_to_eval_results

    _, results = model_index_to_eval_results(metadata["model-index"])
    values = {(r.dataset_name, r.metric_type): r.metric_value for r in results}
    assert values["colours", "acc"] == pytest.approx(metrics["acc"], abs=1e-6)
    assert ("sums", "exact_match") in values and results[0].task_type == "text-generation"


def test_a_later_run_replaces_its_tasks_and_keeps_the_others(models: Path, tasks: Path) -> None:
    small = models / "small"
    request = request_of(tasks, "sums", limit=3)
    evaluate_model(str(small), tasks=request_of(tasks, "colours", limit=4), card=True)
    evaluate_model(str(small), tasks=request, card=True)
    kept = json.loads((small / "evopress_tasks.json").read_text())["tasks"]
    assert kept["colours"]["n_questions"] == 4 and kept["sums"]["n_questions"] == 3


def test_each_model_is_loaded_once_for_text_tasks_and_probes(
    models: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_evopress.jobs import evaluate

    loaded: list[str] = []
    load = evaluate.load
    monkeypatch.setattr(
        evaluate, "load", lambda name, **k: loaded.append(Path(name).name) or load(name, **k)
    )
    evaluate_model(
        str(models / "small"),
        against=str(models / "dense"),
        tasks=request_of(tasks, "colours", "sums", limit=2),
    )
    assert loaded == ["small", "dense"]


def test_an_unknown_task_and_a_path_are_told_what_to_do(tasks: Path) -> None:
    with pytest.raises(LookupError, match="did you mean 'colours'"):
        check_tasks(request_of(tasks, "colourz"))
    with pytest.raises(LookupError, match="--include-path"):
        check_tasks(request_of(tasks, str(tasks / "colours.yaml")))


def test_a_card_of_others_is_left_as_it_is(models: Path, tasks: Path, tmp_path: Path) -> None:
    request = request_of(tasks, "colours", limit=2)
    with pytest.raises((ValueError, FileNotFoundError)):
        evaluate_model(str(models / "dense"), tasks=request, card=True)
    import shutil

    mine = shutil.copytree(models / "small", tmp_path / "mine")
    (mine / "README.md").write_text("my words")
    with pytest.raises(ValueError, match="left as it is"):
        evaluate_model(str(mine), tasks=request, card=True)
    assert (mine / "README.md").read_text() == "my words"


def test_questions_come_from_multiple_choice_tasks(tasks: Path) -> None:
    data = kick_questions(["task:colours"], include_path=[str(tasks)], limit=3)
    assert [q.answers for q in data.questions] == [("fox",), ("engine",), ("fox",)]
    assert data.questions[0].choices == ("fox", "river")
    with pytest.raises(ValueError, match="sums is generate_until"):
        kick_questions(["task:sums"], include_path=[str(tasks)])
