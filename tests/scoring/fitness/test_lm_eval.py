"""The harness judges a model; without it, the error names the command that installs it."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hf_evopress.scoring.fitness import lm_eval
from hf_evopress.scoring.fitness.lm_eval import LMEval
from hf_evopress.scoring.objective import fitness_of

RESULTS = {
    "a": {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "a"},
    "b": {"acc,none": 0.9, "acc_norm,none": 0.7, "alias": "b"},
}


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in with the two names that are used of lm-eval; the list has the calls."""
    calls: list[dict[str, Any]] = []
    fakes = {n: ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    fakes["lm_eval.models.huggingface"].HFLM = SimpleNamespace  # type: ignore[attr-defined]

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        calls.append(given)
        return {"results": RESULTS}

    fakes["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(lm_eval, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda x: x))
    return calls


MODEL = SimpleNamespace(config=SimpleNamespace(_name_or_path="me/model"))


def test_the_loss_is_one_minus_the_mean_accuracy(harness: list[dict[str, Any]]) -> None:
    fitness = fitness_of("lm_eval:tasks=a|b,limit=50")
    assert fitness.of_model(MODEL) == pytest.approx(1 - (0.5 + 0.9) / 2)
    assert harness[0]["tasks"] == ["a", "b"] and harness[0]["limit"] == 50
    assert harness[0]["model"].pretrained is MODEL


def test_a_metric_that_a_task_lacks_is_named(harness: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=r"task a has no metric 'acc_norm'; it has: \['acc'\]"):
        LMEval(tasks="a|b", metric="acc_norm").of_model(MODEL)


def test_it_cannot_be_mixed(harness: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match="judges whole models"):
        fitness_of("kl + lm_eval:tasks=a")


def test_without_the_harness_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"hf-evopress\[lm-eval\]"):
        LMEval(tasks="a")
