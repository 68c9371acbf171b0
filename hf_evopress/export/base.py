"""What an export is: a plan and its packed tensors, written as a folder that others can load."""

from __future__ import annotations

import os
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from ..methods.base import State
from ..plans.level import Level
from ..plans.plan import Plan

States = Callable[[str, Level], State]  # the packed tensors of (unit, level)


class Export(ABC):
    """One format of the result."""

    name: ClassVar[str]

    @abstractmethod
    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        """Write `model`, dense and in the dtype to ship, with `plan` applied, into `folder`.

        `model` is changed by it. The folder exists and is empty.
        """

    def save(
        self,
        model: Any,
        plan: Plan,
        states: States,
        folder: str | Path,
        *,
        tokenizer: Any = None,
    ) -> Path:
        """Write model, plan and tokenizer to `folder`, whole or not at all; return the folder.

        A folder that exists is replaced only if it is empty or holds an earlier export.
        """
        folder = Path(folder)
        with whole_folder(folder) as temporary:
            self.write(model, plan, states, temporary)
            plan.save(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        return folder


def check_target(folder: str | Path) -> None:
    """Raise ValueError where `folder` holds files that an export did not write."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder to write to")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} holds files but no model; it would be replaced: give another folder"
        )


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when all went well, and is gone if not."""
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        for file in temporary.rglob("*"):
            _fsync(file)
        old = temporary.with_suffix(".old")
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fsync(path: Path) -> None:
    if path.is_file():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
