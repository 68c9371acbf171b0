"""Names of models: a commit behind the name, and the commit that a plan was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn

from hf_evopress.adapters.by_name import dense_name, load, pinned, plan_of, tokenizer_of
from hf_evopress.jobs.evaluate import evaluate_model
from hf_evopress.models.source import read_config
from hf_evopress.plans.plan import Plan
from hf_evopress.training.datasets import datasets_of

from ..hub_server import Hub

WEIGHTS = "model.safetensors"
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def files(write_model: Any, trained_llama: nn.Module, tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("named")
    write_model(folder, trained_llama, "rtn:bits=3,group_size=32")
    return folder


@pytest.fixture
def moved(files: Path, hub: Hub, tmp_path: Path) -> Path:
    """A model whose plan names the first commit of me/dense, which has another head by now."""
    dense = {path.name: path.read_bytes() for path in (files / "dense").iterdir()}
    first = hub.put("me/dense", dense)
    other = load_file(files / "dense" / WEIGHTS)
    other[HEAD] = -other[HEAD]
    hub.put("me/dense", {**dense, WEIGHTS: save(other, {"format": "pt"})})
    small = load(str(files / "small"))
    config = small.hf_quantizer.quantization_config
    config.plan = config.plan.replace(revision=first)
    small.save_pretrained(tmp_path / "small")
    tokenizer_of(str(files / "small")).save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_name_may_end_in_a_commit(moved: Path) -> None:
    plan = plan_of(read_config(moved))
    assert plan is not None and plan.revision is not None
    first, newest = load(f"me/dense@{plan.revision}"), load("me/dense")
    torch.testing.assert_close(first.lm_head.weight, -newest.lm_head.weight)
    assert len(tokenizer_of(f"me/dense@{plan.revision}")) == 256


def test_a_model_is_compared_with_the_commit_that_it_was_made_from(
    moved: Path, files: Path, structured_text: Any
) -> None:
    text = moved / "text.txt"
    text.write_text(structured_text(60, seed=9))
    here: dict[str, Any] = {"data": str(text), "window": 64, "max_windows": 4}
    found = evaluate_model(str(moved), against="me/dense", **here)
    local = evaluate_model(str(moved), against=str(files / "dense"), **here)
    newest = evaluate_model(str(moved), against="me/dense@main", **here)
    assert found["kl_nats"] == local["kl_nats"] < newest["kl_nats"] / 10


def test_a_teacher_is_of_the_commit_that_its_student_was_made_from(
    moved: Path, files: Path, structured_text: Any, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(structured_text(60, seed=9))
    said: dict[str, Any] = {"sequences": 2, "heldout": 1, "written": 0, "seq_len": 32, "seed": 0}
    said |= {"column": "text", "progress": None}
    made = {}
    for teacher in ("me/dense", str(files / "dense"), "me/dense@main"):
        where = tmp_path / str(len(made))
        train, _ = datasets_of(str(moved), [str(text)], where, teacher=teacher, **said)
        made[teacher] = train[0]
    ours, local, newest = made.values()
    for key, value in ours.items():
        assert torch.equal(value, local[key])
    assert any(not torch.equal(value, newest[key]) for key, value in ours.items())


@pytest.mark.parametrize(
    "named, plan, whole",
    [
        ("me/dense", Plan({"a": "dense"}, base_model="me/dense", revision="v1"), "me/dense@v1"),
        ("me/dense", Plan({"a": "dense"}, base_model="me/dense"), "me/dense"),
        ("me/other", Plan({"a": "dense"}, base_model="me/dense", revision="v1"), "me/other"),
        ("me/dense@v2", Plan({"a": "dense"}, base_model="me/dense", revision="v1"), "me/dense@v2"),
        ("me/dense", None, "me/dense"),
    ],
)
def test_only_the_plan_s_own_model_is_pinned(named: str, plan: Plan | None, whole: str) -> None:
    assert pinned(named, plan) == whole


def test_a_plan_without_a_model_says_how_to_name_one() -> None:
    with pytest.raises(ValueError, match=r"small does not say .* give --model MODEL"):
        dense_name(Plan({"a": "dense"}), "small", option="--model")


def test_a_folder_with_an_at_sign_is_a_folder(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dense@main"
    folder.symlink_to(files / "dense")
    assert load(str(folder)).config.hidden_size == 64
    with pytest.raises(FileNotFoundError, match="there is no folder .*none@main"):
        load(str(tmp_path / "none@main"))
