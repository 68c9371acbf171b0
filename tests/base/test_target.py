"""Nothing of the user's is written over: results replace what this package wrote, and only that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hf_evopress.base.target import (
    FILES,
    check_file,
    check_target,
    claimed,
    whole_folder,
    work_beside,
)


def write(out: Path, **files: str) -> None:
    with whole_folder(out) as folder:
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / "dense"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    return folder


def test_a_folder_of_the_user_is_refused_even_if_it_holds_a_model(model: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json, notes.txt.*--overwrite"):
        write(model, config__json="new")
    assert (model / "config.json").read_text() == "{}"


def test_an_earlier_result_is_replaced_and_what_was_added_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, config__json="old", shard1="a")
    (out / "notes.txt").write_text("mine")
    (out / "more").mkdir()
    (out / "more" / "deep.txt").write_text("mine, too")
    (out / "link").symlink_to(out / "notes.txt")
    (out / "evopress_recipe.yaml").write_text("written later by us")
    write(out, config__json="new")
    assert (out / "config.json").read_text() == "new"
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "more" / "deep.txt").read_text() == "mine, too"
    assert (out / "link").is_symlink()
    assert not (out / "shard1").exists() and not (out / "evopress_recipe.yaml").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_file_that_the_user_added_is_not_written_over(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, config__json="old")
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(ValueError, match="tokenizer.json, which hf-evopress did not write"):
        write(out, config__json="new", tokenizer__json="ours")
    assert (out / "tokenizer.json").read_text() == "mine"
    assert (out / "config.json").read_text() == "old"


def test_overwrite_replaces_all_but_never_what_is_read(model: Path) -> None:
    with pytest.raises(ValueError, match="which is read"):
        check_target(model, reads=[str(model)], overwrite=True)
    with claimed(model, overwrite=True):
        write(model, config__json="new")
    assert sorted(p.name for p in model.iterdir()) == ["config.json", FILES]
    with pytest.raises(ValueError, match="no folder for one result"):
        check_target(Path.home(), overwrite=True)


@pytest.mark.parametrize("way", ["itself", "slash", "dots", "link", "parent", "relative"])
def test_what_is_read_is_never_a_target_however_it_is_written(
    model: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = model.parent / "link"
    link.symlink_to(model)
    monkeypatch.chdir(model.parent)
    out = {
        "itself": str(model),
        "slash": f"{model}/",
        "dots": f"{model}/../dense",
        "link": str(link),
        "parent": str(model.parent),
        "relative": "dense",
    }[way]
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="which is read"):
            check_target(out, reads=[None, "owner/name-on-the-hub", model], overwrite=overwrite)


def test_a_link_to_an_earlier_result_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", config__json="old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", config__json="new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "new"


def test_the_folder_that_the_process_is_in_is_filled_not_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write(Path("."), config__json="old", gone="x")
    Path("notes.txt").write_text("mine")
    write(Path("."), config__json="new")
    assert sorted(os.listdir()) == ["config.json", FILES, "notes.txt"]
    assert Path("config.json").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["here"]


def test_what_a_killed_process_left_is_put_right(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out, config__json="old")
    os.replace(out, tmp_path / ".out.evopress-old")  # killed between two renames
    (tmp_path / ".out.evopress-new-abc").mkdir()
    with claimed(out):
        assert (out / "config.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_an_error_leaves_the_earlier_result(tmp_path: Path) -> None:
    write(tmp_path / "out", config__json="old")
    with pytest.raises(OSError, match="no space"), whole_folder(tmp_path / "out") as folder:
        (folder / "config.json").write_text("part")
        raise OSError("no space")
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


@pytest.mark.parametrize("out", ["smol", "smol/", "a/smol", "./smol//"])
def test_the_work_folder_lies_beside_the_result(out: str) -> None:
    assert work_beside(out) == Path(out).parent / "smol.work"


def test_the_work_folder_of_here_lies_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert work_beside(".") == tmp_path.parent / f"{tmp_path.name}.work"


def test_a_file_is_replaced_only_where_it_bears_our_mark(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    check_file(file, b"mark")
    file.write_text("")
    check_file(file, b"mark")
    file.write_text("with the mark in it")
    check_file(file, b"mark")
    file.write_text("another")
    with pytest.raises(ValueError, match="--overwrite"):
        check_file(file, b"mark")
    check_file(file, b"mark", overwrite=True)
    with pytest.raises(ValueError, match="is a folder"):
        check_file(tmp_path, b"mark")


def test_files_of_a_result_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "out") as folder:
            for name, mode in (("weights", 0o600), ("tool", 0o700)):
                (folder / name).write_text("x")
                (folder / name).chmod(mode)
    finally:
        os.umask(before)
    modes = {n: (tmp_path / "out" / n).stat().st_mode & 0o777 for n in ("weights", "tool")}
    assert modes == {"weights": 0o640, "tool": 0o740}
