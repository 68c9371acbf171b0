"""after_import acts once, as soon as a module is there, and leaves no trace."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_evopress.base.after_import import after_import


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The path of a module `watched.inner` that is not imported yet."""
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "__init__.py").write_text("")
    (tmp_path / "watched" / "inner.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    finders = list(sys.meta_path)
    yield "watched.inner"
    sys.meta_path[:] = finders
    for name in ("watched", "watched.inner"):
        sys.modules.pop(name, None)


def test_it_acts_at_once_if_the_module_is_there() -> None:
    seen: list[int] = []
    after_import("sys", lambda: seen.append(1))
    assert seen == [1]


def test_it_acts_once_after_the_import_and_never_imports_by_itself(package: str) -> None:
    seen: list[int] = []
    after_import(package, lambda: seen.append(sys.modules[package].value))
    assert seen == [] and "watched" not in sys.modules
    import watched  # type: ignore[import-not-found]  # noqa: F401

    assert seen == []
    importlib.import_module(package)
    importlib.reload(sys.modules[package])
    assert seen == [1]


def test_two_actions_on_one_module_both_run(package: str) -> None:
    seen: list[str] = []
    after_import(package, lambda: seen.append("a"))
    after_import(package, lambda: seen.append("b"))
    importlib.import_module(package)
    assert sorted(seen) == ["a", "b"]


def test_the_module_looks_as_if_nobody_had_watched(package: str) -> None:
    finders = list(sys.meta_path)
    after_import(package, lambda: None)
    module = importlib.import_module(package)
    assert inspect.getsource(module) == "value = 1\n"
    assert type(module.__loader__).__module__ == "_frozen_importlib_external"
    assert sys.meta_path == finders


def test_a_module_that_does_not_exist_stays_missing(package: str) -> None:
    seen: list[int] = []
    after_import("watched.absent", lambda: seen.append(1))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("watched.absent")
    assert seen == []


def test_a_failed_import_can_be_tried_again(package: str, tmp_path: Path) -> None:
    path, seen = tmp_path / "watched" / "inner.py", []
    path.write_text("1 / 0\n")
    after_import(package, lambda: seen.append(1))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(package)
    assert seen == []
    path.write_text("value = 22\n")
    importlib.invalidate_caches()
    importlib.import_module(package)
    assert seen == [1]
