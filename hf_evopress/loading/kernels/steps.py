"""Products in steps, so that those of several matrices run in one call of the compiled kernels.

A product is a generator: it yields a task when that is ready to run, goes on when it has run, and
returns the result. Most have one step; low-rank terms and sums of levels have several.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any

from torch import Tensor

from .cpu.compiled import run

Steps = Generator[Any, None, Tensor]  # of tasks


def finish(steps: Steps) -> Tensor:
    """Do a product step by step."""
    try:
        while True:
            run([next(steps)])
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def finish_all(products: Iterable[Steps]) -> list[Tensor]:
    """Do several products, whose n-th steps run in one call."""
    running, results = dict(enumerate(products)), dict[int, Tensor]()
    while True:
        tasks = []
        for i, steps in list(running.items()):
            try:
                tasks.append(next(steps))
            except StopIteration as end:
                results[i] = end.value
                del running[i]
        if not tasks:
            return [results[i] for i in sorted(results)]
        run(tasks)
