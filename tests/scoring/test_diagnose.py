"""The diagnostic names the units that a level breaks at single tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hf_evopress.calibration.input_moments import calibrate, load_stats
from hf_evopress.calibration.output_moments import TokenLoss, load_moments, output_moments
from hf_evopress.methods.menu import menus
from hf_evopress.models.units import find_units
from hf_evopress.scoring.diagnose import Finding, diagnose
from hf_evopress.store.level_store import LevelStore, Source

LEVEL = "rtn:bits=3,group_size=32"


def test_every_unit_is_judged_and_matches_its_prediction_in_order_of_magnitude(
    trained_llama: nn.Module, text_tokens: Callable[..., Tensor], tmp_path: Path
) -> None:
    model, tokens = copy.deepcopy(trained_llama), text_tokens(12, 48)
    units = find_units(model)
    calibrate(model, tokens, tmp_path)
    output_moments(model, tokens, tmp_path)
    source = Source({}, lambda b: load_stats(tmp_path, b), lambda b: load_moments(tmp_path, b))
    offered = menus({u.name: u.shape for u in units}, [LEVEL])
    store = LevelStore.build(tmp_path / "store", model, units, offered, source)
    found = diagnose(model, store, LEVEL, tokens)
    assert {f.unit for f in found} == {u.name for u in units}
    totals = [f.tokens.total for f in found]
    assert totals == sorted(totals, reverse=True) and min(totals) > 0
    ratios = torch.tensor([f.tokens.total / f.predicted for f in found if f.predicted])
    assert 0.1 < float(ratios.median()) < 10
    with pytest.raises(ValueError, match="the store has: rtn:bits=3"):
        diagnose(model, store, "rtn:bits=4,group_size=32", tokens)


@pytest.mark.parametrize(
    ("first", "rest", "predicted", "share", "is_alarm"),
    [
        (0.1, 1.0, 1.0, 0.1, False),
        (0.1, 11.0, 1.0, 0.1, True),  # far above the prediction
        (2.0, 1.0, 1.0, 0.1, True),  # most of it at position 0: an attention sink
        (2.0, 1.0, 1.0, 1e-5, False),  # too little of the whole to matter
        (0.1, 11.0, None, 0.1, False),
    ],
)
def test_alarms(
    first: float, rest: float, predicted: float | None, share: float, is_alarm: bool
) -> None:
    assert Finding("u", TokenLoss(first, rest), predicted, share).is_alarm is is_alarm
