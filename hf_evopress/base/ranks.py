"""Several processes that share one job, as `torchrun` or `accelerate launch` start them.

Every process runs the same deterministic search; only the work is divided. What they exchange
are losses, a few kilobytes, so gloo serves on GPUs as well. A process that ends unexpectedly
ends the others with it; what was finished is on disk, and the same command goes on from there.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .devices import take_own_card

# A process that dies is noticed at once, by its sockets; this is for one that hangs.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among `world` of them; the default is one that works alone.

    Work is divided by number, in ways that do not change results: the same job gives the same
    bytes on any number of ranks with the same number of threads each.
    """

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Return whether the piece of work `number` is this process's."""
        return number % self.world == self.rank

    def shares(self, n_plans: int, n_batches: int) -> tuple[range, range]:
        """Return which plans, on which batches, are this process's.

        Neighbouring plans stay together: sorted, they share work. Where plans are fewer than
        ranks, several ranks share a plan and divide its batches.
        """
        if n_plans >= self.world or not n_plans:
            start, stop = (n_plans * r // self.world for r in (self.rank, self.rank + 1))
            return range(start, stop), range(n_batches)
        plan = self.rank % n_plans
        helpers = len(range(plan, self.world, n_plans))
        return range(plan, plan + 1), range(self.rank // n_plans, n_batches, helpers)

    def add_up(self, table: Tensor) -> None:
        """Replace `table`, on the CPU, by its sum over all ranks: exact where others hold 0."""
        if self.world > 1:
            with _all_alive():
                dist.all_reduce(table, group=self.group)

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.world > 1:
            with _all_alive():
                dist.barrier(group=self.group)

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Let the first process run the body before the others do."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def check_same(self, what: str, value: object) -> None:
        """Raise RuntimeError where processes do not agree on `value`, by its repr."""
        if self.world > 1:
            seen = torch.zeros(self.world, dtype=torch.int64)
            seen[self.rank] = zlib.crc32(repr(value).encode())
            self.add_up(seen)
            if len(set(seen.tolist())) > 1:
                raise RuntimeError(
                    f"the processes do not agree on {what}: start all with the same recipe, data, "
                    "versions and work folder"
                )


ALONE = Ranks()


def is_in_group() -> bool:
    """Return whether this process has joined others, whoever started them."""
    return dist.is_available() and dist.is_initialized()


def mean_over_group(tensor: Tensor) -> Tensor:
    """Replace `tensor` by its mean over the processes that train together, and return it."""
    if is_in_group() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensor


def wait_for_group() -> None:
    """Return once all processes that train together have come here."""
    if is_in_group():
        dist.barrier()


def start() -> Ranks:
    """Return this process among those of its launcher; alone where there is none.

    Reads what `torchrun` and `accelerate launch` put in the environment, or takes part in the
    process group that a program has already made. Takes the GPU of LOCAL_RANK, where there are.
    """
    if dist.is_initialized():
        if dist.get_world_size() == 1:
            return ALONE
        group = None if dist.get_backend() == "gloo" else _gloo_group()
    elif "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo", timeout=TIMEOUT)
        group = None
    else:
        return ALONE
    take_own_card()
    return Ranks(dist.get_rank(), dist.get_world_size(), group)


_groups: list[Any] = []


def _gloo_group() -> Any:
    """Return a group of all processes that talks between CPUs, made once."""
    if not _groups:
        _groups.append(dist.new_group(backend="gloo", timeout=TIMEOUT))
    return _groups[0]


@contextmanager
def _all_alive() -> Iterator[None]:
    """Say in plain words what a broken connection means."""
    try:
        yield
    except RuntimeError as error:  # dist.DistBackendError and what gloo itself raises
        raise RuntimeError(
            "another process of this job has ended; what was finished is kept, and the same "
            f"command goes on from there ({str(error).splitlines()[0]})"
        ) from error
