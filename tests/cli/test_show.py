"""`show --plot` draws the bits that are stored where they can be known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_evopress.cli import main


@pytest.mark.parametrize(
    ("level", "said"),
    [
        ("rtn:bits=3,group_size=32", "stored bits per weight, mean 3.59"),
        ("of_another_package:bits=3", "bits named by the level, mean 3.00"),
    ],
)
def test_the_picture_says_which_bits_it_shows(level: str, said: str, tmp_path: Path) -> None:
    import matplotlib

    unit = "model.layers.0.mlp.up_proj"
    plan = {"format_version": 1, "levels": {unit: level}, "shapes": {unit: [64, 64]}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    drawn = tmp_path / "plan.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}), pytest.raises(SystemExit) as ended:
        main(["show", str(tmp_path / "plan.json"), "--plot", str(drawn)])
    assert ended.value.code == 0
    assert said in drawn.read_text()
