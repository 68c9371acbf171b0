"""Run a function as soon as another module has been imported, without importing it now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


def after_import(name: str, action: Callable[[], object]) -> None:
    """Call `action()` once: now if module `name` has been imported, else right after it is.

    This keeps `import hf_evopress` at milliseconds where `import transformers.quantizers` takes
    seconds. An error in `action` is that import's error.
    """
    if name in sys.modules:
        action()
    else:
        sys.meta_path.insert(0, _Watcher(name, action))


class _Watcher(MetaPathFinder):
    """Finds the module the way everyone else does, and adds the action to its loading."""

    def __init__(self, name: str, action: Callable[[], object]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)  # or the look-up below would come back here
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return None
        spec.loader = _ActingLoader(spec.loader, self)
        return spec


class _ActingLoader(Loader):
    def __init__(self, loader: Loader, watcher: _Watcher) -> None:
        self.loader = loader
        self.watcher = watcher

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # tools such as inspect and pkgutil ask the module for its own loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        sys.meta_path.insert(0, self.watcher)  # if the import fails, it may be tried again
        self.loader.exec_module(module)
        sys.meta_path.remove(self.watcher)
        self.watcher.action()
