"""The bench measures every runtime and the dense model, and says what is held and read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hf_evopress.cli import main
from hf_evopress.cli.bench import bench as command
from hf_evopress.jobs import bench as job
from hf_evopress.jobs.bench import DENSE, bench

LEVEL = "rtn:bits=4,group_size=32"


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable, write_model: Callable
) -> Path:
    return write_model(tmp_path_factory.mktemp("bench"), tiny_model("llama"), LEVEL)


def test_every_runtime_has_its_figures(folders: Path) -> None:
    found = bench(
        str(folders / "small"),
        against=str(folders / "dense"),
        runtimes=("auto", "expanded"),
        batches=(1, 2),
        prompt=20,
        repeats=1,
    )
    assert [one.name for one in found.speeds] == [DENSE, "auto", "expanded"]
    dense, auto, expanded = found.speeds
    assert auto.held_bytes < dense.held_bytes < expanded.held_bytes
    assert auto.read_bytes == expanded.read_bytes < dense.read_bytes
    assert all(set(one.decode) == {1, 2} and one.prefill > 0 for one in found.speeds)
    assert all((one.prompt_bytes or 0) >= 0 for one in found.speeds)
    assert found.bandwidth > 0 and "PyTorch" in found.machine


def test_a_tied_head_is_read_and_held_once(tiny_model: Callable) -> None:
    model = tiny_model("llama")
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert job.read_bytes(model) == sum(m.weight.nbytes for m in linears)
    before = job.held_bytes(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert job.held_bytes(model) == before - model.lm_head.weight.nbytes


def test_what_the_model_cannot_do_is_refused_before_it_is_loaded(folders: Path) -> None:
    small = str(folders / "small")
    with pytest.raises(ValueError, match="int4' computes in bfloat16 and the model is loaded in"):
        bench(small, runtimes=("int4",), dtype="float32", prompt=8)
    with pytest.raises(ValueError, match="prompt 5000 is longer than the model's context of"):
        bench(small, prompt=5000)
    with pytest.raises(ValueError, match="what so many repeats generate, 20017 is longer than"):
        bench(small, prompt=8, repeats=5000)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt": 0}, "prompt must be at least 1, got 0"),
        ({"batches": (1, 0)}, "batch must be at least 1, got 0"),
        ({"runtimes": ("fast",)}, "no runtime 'fast'; known: auto, packed"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(options: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        bench("no-such-model", **options)


def test_a_dense_model_is_refused(folders: Path) -> None:
    with pytest.raises(ValueError, match="is no compressed model"):
        bench(str(folders / "dense"), batches=(1,), prompt=4, repeats=1)


def test_a_compressed_model_is_no_dense_one(folders: Path) -> None:
    small = str(folders / "small")
    with pytest.raises(ValueError, match="is compressed itself; --against takes the dense model"):
        bench(small, against=small, batches=(1,), prompt=4, repeats=1)


def test_the_runtime_is_that_of_the_command_not_of_the_environment(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_EVOPRESS_RUNTIME", "triton")  # which no CPU has
    found = bench(str(folders / "small"), batches=(1,), prompt=4, repeats=1)
    assert [one.name for one in found.speeds] == ["auto"]


def test_a_picture_of_another_kind_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a picture ends in"):
        command("no-such-model", png=tmp_path / "speed.txt")


def test_the_command_prints_a_table_and_draws_it(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "speed.png"
    words = ["bench", folders / "small", "--against", folders / "dense", "--batch", "1"]
    words += ["--prompt", "20", "--repeats", "1", "--plot", picture]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    out = " ".join(capsys.readouterr().out.split())  # lines break where the processor's name ends
    assert not ended.value.code and "dense" in out and "auto" in out and "memory reads" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_show_says_what_each_level_computes_with(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["show", str(folders / "small"), "--runtime"])
    assert "by CPU kernels" in capsys.readouterr().out
