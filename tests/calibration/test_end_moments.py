"""What an error of the embedding or the head costs: predicted against measured."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from hf_evopress.calibration.end_moments import EndMoments, load_ends, smoothed_counts
from hf_evopress.calibration.output_moments import load_moments, output_moments
from hf_evopress.methods import compose
from hf_evopress.models.ends import find_ends
from hf_evopress.models.units import find_units


def kl(dense: Any, other: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        p, q = (F.log_softmax(m(tokens).logits.float(), -1) for m in (dense, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def untied(trained_llama: Any, text_tokens: Any) -> Any:
    model = copy.deepcopy(trained_llama)
    assert not model.config.tie_word_embeddings
    return model


def moments(model: Any, tokens: Tensor, folder: Path) -> dict[str, EndMoments]:
    units = find_ends(model)
    output_moments(model, tokens, folder, units=units)
    return dict(load_ends(folder, units))


@pytest.mark.parametrize("bits", [3, 4, 5])
@pytest.mark.parametrize("end", ["model.embed_tokens", "lm_head"])
def test_the_predicted_loss_is_near_the_measured(
    bits: int, end: str, untied: Any, text_tokens: Any, tmp_path: Path
) -> None:
    tokens = text_tokens(24, 64)
    found = moments(untied, tokens[:16], tmp_path)[end]
    level = compose.normalize(f"rtn:bits={bits},group_size=32")
    other = copy.deepcopy(untied)
    W = other.get_submodule(end).weight
    state = compose.compress(level, W.detach().clone(), None)
    rounded = compose.decompress(level, state, tuple(W.shape), torch.float32)
    predicted = found.loss(W.detach() - rounded)
    W.data.copy_(rounded)
    measured = kl(untied, other, tokens[16:])
    assert measured / 3 < predicted < 3 * measured


def test_a_shared_weight_adds_up_both_uses(
    tiny_model: Any, text_tokens: Any, tmp_path: Path
) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    (found,) = moments(model, text_tokens(4, 32), tmp_path).values()
    delta = torch.randn(256, 64, generator=torch.Generator().manual_seed(0)) * 0.01
    assert found.head_loss(delta) > 0 and found.embedding_loss(delta) > 0
    assert found.loss(delta) == pytest.approx(found.head_loss(delta) + found.embedding_loss(delta))
    assert torch.allclose(found.stats().gram, found.gram + found.gradient)


def test_the_head_estimate_is_the_variance_under_the_model(
    untied: Any, text_tokens: Any, tmp_path: Path
) -> None:
    tokens = text_tokens(8, 64)
    found = moments(untied, tokens, tmp_path)["lm_head"]
    delta = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)) * 0.05
    with torch.no_grad():
        hidden = untied.model(tokens).last_hidden_state.flatten(0, 1)
        p = untied.lm_head(hidden).softmax(-1)
        moved = hidden @ delta.T
        exact = 0.5 * ((p * moved.square()).sum(-1) - (p * moved).sum(-1).square()).mean()
    assert found.loss(delta) == pytest.approx(float(exact), rel=0.1)


def test_a_shift_of_all_rows_costs_the_head_nothing(
    untied: Any, text_tokens: Any, tmp_path: Path
) -> None:
    found = moments(untied, text_tokens(4, 64), tmp_path)["lm_head"]
    assert found.loss(torch.ones(256, 64)) == pytest.approx(0.0, abs=1e-6)


def test_a_cap_on_the_logits_counts(tiny_model: Any, text_tokens: Any, tmp_path: Path) -> None:
    tokens = text_tokens(4, 32)
    losses = []
    for i, cap in enumerate((None, 0.1)):
        model = tiny_model("gemma3_text", final_logit_softcapping=cap)
        (found,) = moments(model, tokens, tmp_path / str(i)).values()
        delta = torch.randn(256, 64, generator=torch.Generator().manual_seed(1)) * 0.01
        losses.append(found.head_loss(delta))
    assert losses[1] < losses[0]


def test_ends_are_gone_through_with_the_blocks_or_alone(
    untied: Any, text_tokens: Any, tmp_path: Path
) -> None:
    tokens, ends, units = text_tokens(4, 32), find_ends(untied), find_units(untied)
    output_moments(untied, tokens, tmp_path / "both", units=[*units, *ends])
    output_moments(untied, tokens, tmp_path / "late", units=units)
    output_moments(untied, tokens, tmp_path / "late", units=[*units, *ends])
    for end in ends:
        both, late = (load_ends(tmp_path / f, ends)[end.name] for f in ("both", "late"))
        delta = torch.ones(end.shape).cumsum(0)
        assert both.loss(delta) == late.loss(delta)
    for block in range(3):
        one, other = (load_moments(tmp_path / f, block) for f in ("both", "late"))
        assert all(torch.equal(one[k], other[k]) for k in one)


def test_moments_that_are_not_there_say_what_to_run(untied: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run output_moments"):
        load_ends(tmp_path, find_ends(untied))


def test_tokens_never_seen_share_what_those_seen_once_have() -> None:
    tokens = torch.tensor([[0] * 12, [1] * 6 + [2, 3, 4, 5, 0, 0]])
    counts = smoothed_counts(tokens, 10)
    assert float(counts.sum()) == pytest.approx(1.0)
    unseen = float(counts[6:].sum())
    assert 0.05 < unseen < 4 / 24
    assert counts[0] > counts[1] > counts[2] > counts[9] > 0


def test_an_embedding_that_one_answer_per_text_depends_on(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=32, num_labels=4, initializer_range=0.3,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    tokens = torch.randint(0, 64, (128, 16))
    found = moments(model, tokens[:64], tmp_path)["bert.embeddings.word_embeddings"]
    other = copy.deepcopy(model)
    W = other.get_input_embeddings().weight
    delta = 0.01 * torch.randn_like(W)
    W.data.add_(delta)
    measured = kl(model, other, tokens[64:])
    assert measured / 2 < found.loss(delta) < 2 * measured
