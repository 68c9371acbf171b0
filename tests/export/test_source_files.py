"""What lies beside a model's weights comes along, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_evopress.export.source_files import copy_source_files


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with files of every kind."""
    folder = tmp_path / "source"
    kept = ["preprocessor_config.json", "chat_template.jinja", "LICENSE", "merges.txt"]
    left = [
        "config.json",
        "README.md",
        "model.safetensors",
        "pytorch_model.bin",
        "evopress_plan.json",
    ]
    inside = ["1_Pooling/config.json", "2_Dense/model.safetensors", "onnx/model.json"]
    for name in [*kept, *left, *inside, "modeling_own.py"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    paths = ["", "1_Pooling", "2_Dense", "../outside"]
    (folder / "modules.json").write_text(json.dumps([{"path": path} for path in paths]))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.json").write_text("{}")
    return folder


def test_processors_templates_licences_and_modules_come_along(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "merges.txt").write_text("the tokenizer's own")
    copied = copy_source_files(source, target)
    assert copied == [
        "LICENSE",
        "chat_template.jinja",
        "modules.json",
        "preprocessor_config.json",
        "1_Pooling/config.json",
        "2_Dense/model.safetensors",
    ]
    assert (target / "merges.txt").read_text() == "the tokenizer's own"
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in copied)


def test_code_comes_only_where_it_was_trusted(source: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    assert "modeling_own.py" not in copy_source_files(source, tmp_path / "target")
    assert copy_source_files(source, tmp_path / "target", with_code=True) == ["modeling_own.py"]


def test_a_damaged_list_of_modules_is_named(source: Path, tmp_path: Path) -> None:
    (source / "modules.json").write_text("{")
    with pytest.raises(ValueError, match=r"modules\.json is damaged"):
        copy_source_files(source, tmp_path)
