"""Rows at two bit-widths: which rows get more, and what that is worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_evopress.calibration.end_moments import EndMoments
from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats

LEVEL = compose.normalize("rows:bits=3,top_bits=8,top=0.25,group_size=32")


@pytest.fixture
def W() -> Tensor:
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0))


def errors(W: Tensor, stats: Stats) -> Tensor:
    """Return the squared error of each row."""
    state = compose.compress(LEVEL, W, stats)
    made = compose.decompress(LEVEL, state, (48, 64), torch.float32)
    return (made - W).square().sum(1)


def test_rows_that_matter_most_get_more_bits(W: Tensor) -> None:
    matters = torch.rand(48, generator=torch.Generator().manual_seed(1))
    top = matters.argsort(descending=True)[:12]
    found = errors(W, Stats(torch.eye(64), rows=matters))
    assert set(found.argsort()[:12].tolist()) == set(top.tolist())
    assert found[top].max() < 0.05 * found.mean()


def test_rows_of_a_layer_are_judged_by_the_gradients_at_its_outputs(W: Tensor) -> None:
    G = torch.diag(torch.arange(48.0))
    found = errors(W, Stats(torch.eye(64)).with_outputs([G]))
    assert set(found.argsort()[:12].tolist()) == set(range(36, 48))


def test_rows_are_judged_by_their_size_where_nothing_else_is_known(W: Tensor) -> None:
    W[5:17] *= 10
    relative = errors(W, Stats(torch.eye(64))) / W.square().sum(1)
    assert set(relative.argsort()[:12].tolist()) == set(range(5, 17))


def test_tokens_past_the_last_that_was_asked_for_are_of_the_rest(W: Tensor) -> None:
    found = errors(W, Stats(torch.eye(64), rows=torch.arange(20.0)))
    assert set(found.argsort()[:12].tolist()) == set(range(8, 20))


def test_a_head_counts_what_it_is_asked_for_and_an_embedding_what_comes() -> None:
    drawn = torch.tensor([[0, 1, 1, 3]], dtype=torch.int32)
    of_head = {"hidden": torch.ones(1, 2), "drawn": drawn, "gram": torch.eye(2)}
    counts = torch.tensor([0.0, 0.0, 0.5, 0.5])
    of_embedding = {"gradient": 4 * torch.eye(2), "counts": counts}
    head, embedding = EndMoments(**of_head).rows(), EndMoments(**of_embedding).rows()
    assert torch.equal(head, 2 * torch.tensor([0.25, 0.5, 0.0, 0.25]))
    assert torch.equal(embedding, 8 * counts)
    assert torch.equal(EndMoments(**of_head, **of_embedding).rows(), head + embedding)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (
            "rows:bits=4,top_bits=4,group_size=8",
            "more bits than the .*bits=4, top_bits=4",
        ),
        (
            "rows:bits=4,top_bits=6,top=1.0,group_size=8",
            r"top, a share.*\(0, 1\); got 1.0",
        ),
        ("rows:bits=4,group_size=64", "needs top_bits"),
    ],
)
def test_what_makes_no_sense_is_refused(words: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        compose.normalize(words)


def test_a_weight_of_one_row_is_refused() -> None:
    with pytest.raises(ValueError, match="two rows or more"):
        compose.compress(LEVEL, torch.randn(1, 64), Stats(torch.eye(64)))
