"""Fitnesses by name, sums of them, and users' functions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_evopress.scoring import objective
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.scoring.fitness.perplexity import Perplexity
from hf_evopress.scoring.fitness.task import Task
from hf_evopress.scoring.objective import Mixture, fitness_of

G = torch.Generator().manual_seed(0)
DENSE, OTHER = torch.randn(300, 40, generator=G), torch.randn(300, 40, generator=G)
TOKENS = torch.randint(0, 40, (300,), generator=G)


def _loss(fitness: Mixture | KL | Perplexity | Task) -> float:
    return fitness.loss(OTHER, TOKENS, fitness.targets(DENSE, TOKENS))


def _lost_answers(dense: Tensor, compressed: Tensor, labels: Tensor, weight: float = 1) -> Tensor:
    was, now = dense.argmax(-1) == labels, compressed.argmax(-1) == labels
    return weight * (was & ~now).float().mean()


def test_a_sum_is_the_weighted_sum_of_its_terms() -> None:
    expected = 0.7 * _loss(KL(top_k=8)) + 0.3 * _loss(Perplexity())
    assert _loss(fitness_of("kl:top_k=8*0.7 + perplexity*0.3")) == pytest.approx(expected)


def test_one_name_is_the_fitness_itself() -> None:
    assert isinstance(fitness_of("kl"), KL) and isinstance(fitness_of("kl*2"), Mixture)


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ValueError, match="fitness kl cannot be made.*topk"):
        fitness_of("kl:topk=3")


def test_a_function_sees_the_logits_that_predict_and_the_tokens_that_follow() -> None:
    seen = []
    assert _loss(Task(lambda *given: seen.append(given) or 1.5)) == 1.5
    dense, compressed, labels = seen[0]
    assert torch.equal(dense, DENSE[:-1]) and torch.equal(compressed, OTHER[:-1])
    assert torch.equal(labels, TOKENS[1:])


def test_costs_need_not_be_symmetric() -> None:
    fitness = Task(_lost_answers)
    forth = fitness.loss(OTHER, TOKENS, fitness.targets(DENSE, TOKENS))
    back = fitness.loss(DENSE, TOKENS, fitness.targets(OTHER, TOKENS))
    right, other = (float((x[:-1].argmax(-1) == TOKENS[1:]).float().mean()) for x in (DENSE, OTHER))
    assert forth - back == pytest.approx(right - other, abs=1e-6)


def test_an_installed_function_is_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_evopress.recipes.mixture.names", lambda group: ["lost"])
    monkeypatch.setattr(objective, "load", lambda group, name: _lost_answers)
    assert _loss(fitness_of("lost:weight=2")) == pytest.approx(2 * _loss(Task(_lost_answers)))


def test_a_mixture_with_a_function_takes_whole_sequences() -> None:
    mixed = Mixture([(1.0, KL(top_k=8)), (2.0, Task(_lost_answers))])
    assert mixed.needs_whole and not mixed.keeps_targets
    assert _loss(mixed) == pytest.approx(_loss(KL(top_k=8)) + 2 * _loss(Task(_lost_answers)))


def test_task_without_a_function_says_how_to_give_one() -> None:
    with pytest.raises(ValueError, match="entry point"):
        fitness_of("task")


def test_a_function_that_gives_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="one number per sequence"):
        _loss(Task(lambda dense, compressed, labels: compressed))  # type: ignore[arg-type]
