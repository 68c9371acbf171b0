"""Find methods, fitnesses and exports by file name or entry point, without importing them.

A new method is one file in `hf_evopress/methods`, a new fitness one in
`hf_evopress/scoring/fitness`, a new export one in `hf_evopress/export`; or, in another package,
one entry point in the group `hf_evopress.methods`, `hf_evopress.fitness` or `hf_evopress.export`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

# Where each group's plug-ins live: a folder of the package, and the modules in it that are none.
_FOLDERS = {
    "methods": ("methods", {"base", "compose", "menu"}),
    "fitness": ("scoring/fitness", {"base"}),
    "export": ("export", {"base", "linears", "source_files", "vllm_limits"}),
}
_PACKAGE = Path(__file__).parent.parent


def names(group: str) -> list[str]:
    """Return the sorted names available in `group`: "methods", "fitness" or "export"."""
    return sorted({*_files(group), *_entry_points(group)})


@lru_cache(maxsize=None)
def load(group: str, name: str) -> type:
    """Return the plug-in class `name` of `group`.

    The class is the one whose attribute `name` equals `name` in the module of that name.
    Raises ValueError that names the nearest known name.
    """
    if name in _entry_points(group):
        return _entry_points(group)[name].load()
    if name not in _files(group):
        raise ValueError(f"unknown {_singular(group)} {name!r}{did_you_mean(name, names(group))}")
    folder = _FOLDERS[group][0].replace("/", ".")
    module = importlib.import_module(f"hf_evopress.{folder}.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and vars(value).get("name") == name:
            return value
    raise ValueError(f"{module.__name__} has no class with name = {name!r}")


def describe(group: str, name: str) -> str:
    """Return the docstring of the module that holds `name`, read without running it."""
    if name in _entry_points(group):
        spec = find_spec(_entry_points(group)[name].module)
        path = Path(spec.origin) if spec and spec.origin else None
    else:
        path = _PACKAGE / _FOLDERS[group][0] / f"{name}.py"
    return _docstring(path)


def describe_module(module: str, name: str | None = None) -> str:
    """Return the docstring of a module of the package, such as "training.quest", without a run.

    name: of a class or function in it, whose own docstring is returned.
    """
    path = _PACKAGE.joinpath(*module.split("."))
    return _docstring(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"), name)


def _docstring(path: Path | None, name: str | None = None) -> str:
    tree: ast.AST | None = ast.parse(path.read_text(encoding="utf-8")) if path else None
    if tree is not None and name is not None:
        tree = next((node for node in ast.walk(tree) if getattr(node, "name", None) == name), None)
    return (ast.get_docstring(tree) or "") if tree is not None else ""  # type: ignore[arg-type]


def did_you_mean(name: str, known: list[str]) -> str:
    """Return ", did you mean 'x'?" for a near miss, else the list of known names."""
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"


@lru_cache(maxsize=None)
def _files(group: str) -> tuple[str, ...]:
    folder, others = _FOLDERS[group]
    found = pkgutil.iter_modules([str(_PACKAGE / folder)])
    return tuple(m.name for m in found if not m.ispkg and m.name not in others)


@lru_cache(maxsize=None)
def _entry_points(group: str) -> dict[str, EntryPoint]:
    return {e.name: e for e in entry_points(group=f"hf_evopress.{group}")}


def _singular(group: str) -> str:
    return {"methods": "method"}.get(group, group)
