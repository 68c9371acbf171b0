from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hf_evopress.plans.plan import Plan
from hf_evopress.sharing.plots import convergence_plot, heat_map_plot, pareto_plot, speed_plot

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
PLAN = Plan({f"model.layers.{b}.mlp.up_proj": f"rtn:bits={2 + b}" for b in range(4)})

DRAW: dict[str, Callable[[Path], Path]] = {
    "heat map": lambda path: heat_map_plot(PLAN, path, title="a plan"),
    "convergence": lambda path: convergence_plot(
        [{"generation": i, "loss": 1 / (i + 1)} for i in range(5)], path, references={"a": 0.5}
    ),
    "speed": lambda path: speed_plot({"dense": {1: 10.0, 4: 30.0}, "auto": {1: 25.0}}, path),
    "pareto": lambda path: pareto_plot({"a": [(3.0, 0.5), (2.0, 1.0)], "b": [(3.0, 0.0)]}, path),
}


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
@pytest.mark.parametrize("ending", MAGIC)
def test_the_ending_chooses_the_format(
    draw: Callable[[Path], Path], ending: str, tmp_path: Path
) -> None:
    path = draw(tmp_path / f"picture{ending}")
    assert path.read_bytes().startswith(MAGIC[ending])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
@pytest.mark.parametrize("ending", MAGIC)
def test_the_same_input_draws_the_same_bytes(
    draw: Callable[[Path], Path], ending: str, tmp_path: Path
) -> None:
    one, two = (draw(tmp_path / f"{n}{ending}").read_bytes() for n in (1, 2))
    assert one == two


@pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)
def test_other_endings_are_refused(draw: Callable[[Path], Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png, \.svg, \.pdf; got .*picture\.bmp"):
        draw(tmp_path / "picture.bmp")


def test_every_value_is_written_in_its_cell(tmp_path: Path) -> None:
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        text = heat_map_plot(PLAN, tmp_path / "map.svg").read_text()
    for bits in (2, 3, 4, 5):
        assert f">{bits}.0</text>" in text
    assert "bits named by the level, mean 3.50" in text


def test_there_must_be_something_to_draw(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no generations"):
        convergence_plot([], tmp_path / "a.png")
    with pytest.raises(ValueError, match="row 1 .* lacks"):
        convergence_plot([{"generation": 0, "loss": 1.0}, {"loss": 1.0}], tmp_path / "a.png")
    with pytest.raises(ValueError, match="empty: uniform"):
        pareto_plot({"uniform": []}, tmp_path / "a.png")
