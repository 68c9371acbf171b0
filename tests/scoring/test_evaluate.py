from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from hf_evopress.scoring import evaluate
from hf_evopress.scoring.evaluate import Report, compare, compare_many, perplexity


@pytest.fixture(scope="module")
def dense(tiny_model: Callable[..., nn.Module]) -> nn.Module:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def damaged(dense: nn.Module) -> nn.Module:
    """The dense model with rounded weights."""
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 20).round() / 20)
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(256, (100,), generator=torch.Generator().manual_seed(0))


def uniform(ids: Tensor) -> Tensor:
    return torch.zeros(*ids.shape, 256)


def test_perplexity_of_a_uniform_model_is_its_vocabulary(tokens: Tensor) -> None:
    assert perplexity(uniform, tokens, window=10) == pytest.approx(256, rel=1e-6)


def test_perplexity_is_exp_of_the_mean_loss_of_transformers(
    dense: nn.Module, tokens: Tensor
) -> None:
    windows = tokens[:96].view(3, 32)
    losses = [dense(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    expected = math.exp(sum(losses) / 3)
    assert perplexity(dense, tokens, window=32) == pytest.approx(expected, rel=1e-5)


def test_a_model_equals_itself(dense: nn.Module, tokens: Tensor) -> None:
    report = compare(dense, dense, tokens, window=32)
    assert report.kl_nats == 0
    assert report.top1_agreement == 1
    assert report.perplexity == report.dense_perplexity


def test_kl_is_that_of_torch(dense: nn.Module, damaged: nn.Module, tokens: Tensor) -> None:
    p, q = (m(input_ids=tokens[None, :50]).logits[0, :-1] for m in (dense, damaged))
    expected = torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    report = compare(damaged, dense, tokens, window=50, max_windows=1)
    assert report.kl_nats == pytest.approx(expected.item(), rel=1e-4)
    agree = (p.argmax(-1) == q.argmax(-1)).float().mean().item()
    assert report.top1_agreement == pytest.approx(agree)


def test_slices_do_not_change_the_result(
    dense: nn.Module, damaged: nn.Module, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(damaged, dense, tokens, window=50)
    monkeypatch.setattr(evaluate, "SLICE", 7)
    sliced = compare(damaged, dense, tokens, window=50)
    assert sliced.kl_windows == pytest.approx(whole.kl_windows, rel=1e-6)
    assert sliced.nll_windows == pytest.approx(whole.nll_windows, rel=1e-6)


def test_what_is_left_over_is_not_used(dense: nn.Module, tokens: Tensor) -> None:
    report = compare(dense, None, tokens, window=30)
    assert len(report.nll_windows) == 3
    assert report.n_tokens == 3 * 29
    other_end = torch.cat([tokens[:90], tokens[:10]])
    assert compare(dense, None, other_end, window=30) == report


def test_max_windows_takes_the_first(dense: nn.Module, tokens: Tensor) -> None:
    all_windows = compare(dense, None, tokens, window=20)
    first = compare(dense, None, tokens, window=20, max_windows=2)
    assert first.nll_windows == all_windows.nll_windows[:2]


def test_many_models_score_as_each_alone(
    dense: nn.Module, damaged: nn.Module, tokens: Tensor
) -> None:
    together = compare_many({"a": damaged, "b": uniform}, dense, tokens, window=32)
    assert together["a"] == compare(damaged, dense, tokens, window=32)
    assert together["b"] == compare(uniform, dense, tokens, window=32)


def test_dropout_is_off_during_and_back_on_after(
    tiny_model: Callable[..., nn.Module], tokens: Tensor
) -> None:
    model = tiny_model("llama", attention_dropout=0.5).train()
    one, two = (compare(model, None, tokens, window=32) for _ in range(2))
    assert one == two
    assert model.training


def test_without_a_dense_model_there_is_no_kl(dense: nn.Module, tokens: Tensor) -> None:
    report = compare(dense, None, tokens, window=32)
    assert report.kl_nats is None
    assert report.top1_agreement is None
    assert "kl_nats" not in report.to_dict()


def test_a_report_is_json(dense: nn.Module, damaged: nn.Module, tokens: Tensor) -> None:
    report = compare(damaged, dense, tokens, window=32)
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert found["kl_nats"] == report.kl_nats
    assert found["nll_windows"] == list(report.nll_windows)


def test_a_report_without_a_perplexity_says_nothing_of_it() -> None:
    report = Report(9, (), (), kl_windows=(0.5, 0.7))
    found = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert "perplexity" not in found and found["kl_nats"] == pytest.approx(0.6)


def test_paired_differences_have_smaller_errors_than_the_windows_they_come_from() -> None:
    a = Report(9, (), (), (0.5, 0.9, 0.7))
    b = Report(9, (), (), (0.4, 0.8, 0.6))
    mean, error = a.kl_difference(b)
    assert mean == pytest.approx(0.1)
    assert error is not None
    assert a.kl_standard_error is not None
    assert error < 1e-9 < a.kl_standard_error


def test_reports_on_other_windows_are_not_paired() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        Report(9, (), (), (0.5,)).kl_difference(Report(8, (), (), (0.5,)))
    with pytest.raises(ValueError, match="no KL"):
        Report(9, (1.0,)).kl_difference(Report(9, (1.0,)))


def test_one_window_has_no_standard_error(dense: nn.Module, tokens: Tensor) -> None:
    assert compare(uniform, dense, tokens, window=100).kl_standard_error is None


def test_a_token_that_neither_model_can_give_adds_nothing(tokens: Tensor) -> None:
    ids = tokens.clamp(max=254)

    def banned(x: Tensor) -> Tensor:
        logits = uniform(x)
        logits[..., 255] = -math.inf
        return logits

    assert compare(banned, banned, ids, window=10).kl_nats == 0


def test_text_shorter_than_a_window_is_refused(dense: nn.Module, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="has 100 tokens, one window needs 101"):
        perplexity(dense, tokens, window=101)


def test_a_window_beyond_the_context_is_refused(dense: nn.Module) -> None:
    with pytest.raises(ValueError, match="window=513 is longer than the model's context of 512"):
        perplexity(dense, torch.zeros(600, dtype=torch.long), window=513)


@pytest.mark.parametrize("bad", [{"window": 1}, {"max_windows": 0}])
def test_impossible_windows_are_refused(
    dense: nn.Module, tokens: Tensor, bad: dict[str, int]
) -> None:
    with pytest.raises(ValueError, match=f"got .*{next(iter(bad.values()))}"):
        perplexity(dense, tokens, **{"window": 10, **bad})


def test_batches_are_refused(dense: nn.Module) -> None:
    with pytest.raises(ValueError, match="one dimension"):
        perplexity(dense, torch.zeros(2, 50, dtype=torch.long), window=10)


def test_a_model_that_gives_nan_is_named(dense: nn.Module, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="broken gives NaN"):
        compare_many({"broken": lambda x: uniform(x) * math.nan}, dense, tokens, window=10)


def test_models_of_two_vocabularies_are_not_compared(dense: nn.Module, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="vocabulary of 300, the dense model of 256"):
        compare(lambda x: torch.zeros(*x.shape, 300), dense, tokens, window=10)


def test_a_hopeless_model_has_infinite_perplexity(tokens: Tensor) -> None:
    def certain(x: Tensor) -> Tensor:
        return uniform(x) - 1e6 * torch.nn.functional.one_hot(tokens[None, 1:11], 256)

    assert perplexity(certain, tokens, window=10, max_windows=1) == math.inf
