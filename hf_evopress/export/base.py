"""What an export is: a plan and its packed tensors, written as a folder that others can load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from ..base.target import whole_folder
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

        Of a folder that exists only what an earlier result wrote is replaced.
        """
        folder = Path(folder)
        with whole_folder(folder) as temporary:
            self.write(model, plan, states, temporary)
            plan.save(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        return folder
