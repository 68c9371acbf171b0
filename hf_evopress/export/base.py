"""What an export is: a plan and its packed tensors, written as a folder that others can load."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.own_code import is_trusted
from ..base.target import whole_folder
from ..methods.base import State
from ..models.classes import call, class_of
from ..models.plain import make_plain
from ..models.sounds import n_places
from ..plans.level import Level
from ..plans.plan import Plan
from .source_files import copy_source_files

logger = logging.getLogger(__name__)

States = Callable[[str, Level], State]  # the packed tensors of (unit, level)


class Export(ABC):
    """One format of the result."""

    name: ClassVar[str]
    can_requantise: ClassVar[bool] = False  # has a way to round levels that it cannot hold
    takes_any_class: ClassVar[bool] = False  # classifiers and the like, too
    keeps_cache: ClassVar[bool] = False  # the plan's settings for the key-value cache
    requantise = False  # whether to do that
    tokenizer: Any = None  # of the model, for formats that hold it

    @abstractmethod
    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        """Write `model`, dense and in the dtype to ship, with `plan` applied, into `folder`.

        `model` is changed by it. The folder exists and is empty.
        """

    def check(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        """Raise RuntimeError unless `folder`, loaded as its users will, computes what `plan` says.

        `model` is as `write` left it: here, dense and with the weights that were written.
        """
        make_plain(model)
        check_loads(folder, model, dtype=model.dtype)

    def shipped(self, plan: Plan) -> Plan:
        """Return the plan of what was written: another where levels were rounded."""
        return plan

    def save(
        self,
        model: Any,
        plan: Plan,
        states: States,
        folder: str | Path,
        *,
        tokenizer: Any = None,
        source: str | None = None,
        revision: str | None = None,
        with_code: bool = False,
    ) -> Path:
        """Write model, plan and tokenizer to `folder`, whole or not at all; return the folder.

        source, revision: where the model comes from; what lies there besides its weights comes
        along (`source_files`), Python files `with_code`.
        Of a folder that exists only what an earlier result wrote is replaced.
        """
        folder, self.tokenizer = Path(folder), tokenizer
        if plan.cache and not self.keeps_cache:
            logger.warning(
                "the plan's settings for the key-value cache are not part of a %s export: whoever "
                "loads it has a full cache",
                self.name,
            )
        with whole_folder(folder) as temporary:
            self.write(model, plan, states, temporary)
            self.shipped(plan).save(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            if source is not None:
                copy_source_files(source, temporary, revision=revision, with_code=with_code)
            self.check(model, plan, states, temporary)  # which may need the model's own code
        return folder


@torch.no_grad()
def check_loads(folder: Path, model: Any, *, dtype: torch.dtype) -> None:
    """Raise RuntimeError unless stock transformers loads `folder` as what `model` computes.

    model: in the plain form, in `dtype`. What was loaded runs as it is, and then in the plain
    form too, where both are the same computation and their logits have to be equal to the bit.
    """
    loader = class_of(model).loader
    trust = {"trust_remote_code": True} if is_trusted() else {}
    loaded, info = loader.from_pretrained(folder, dtype=dtype, output_loading_info=True, **trust)
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"]})
    if lost:
        raise RuntimeError(
            f"stock transformers lacks or does not know {', '.join(lost[:4])} of this export; use "
            "the evopress export, and please report this"
        )
    loaded = loaded.eval().to(model.device)
    n_tokens = model.get_input_embeddings().weight.shape[0]
    n = 16 + (n_places(model) if class_of(model).hears else 0)
    ids = torch.arange(1, n + 1, device=model.device)[None] % n_tokens
    _logits(loaded, ids)  # as it is
    make_plain(loaded)
    ours, theirs = _logits(model, ids), _logits(loaded, ids)
    if not torch.equal(ours, theirs):
        there = loaded.state_dict()
        wrong = [
            n for n, w in model.state_dict().items() if not torch.equal(w, there.get(n, w[:0]))
        ]
        raise RuntimeError(
            f"stock transformers loads another model from this export (logits differ by "
            f"{float((ours - theirs).abs().max()):.3g}; weights that differ: "
            f"{', '.join(wrong[:4]) or 'none'}); use the evopress export, and please report this"
        )


def _logits(model: Any, ids: Tensor) -> Tensor:
    return call(model, ids)
