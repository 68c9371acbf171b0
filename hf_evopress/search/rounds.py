"""Messages between a search strategy and the evaluator: candidates, their losses, progress."""

from __future__ import annotations

import logging
import random
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .budget import Budget
from .knapsack import check_table
from .space import Genome, SearchSpace, Table

logger = logging.getLogger(__name__)

Losses = list[list[float]]  # per genome, per sequence: mean loss per token, in nats


@dataclass(frozen=True)
class Round:
    """Genomes to evaluate on the same sequences, those numbered `sequences` in the pool.

    The answer is one list per genome with one loss per sequence, in this order. `seed` names the
    draw; `is_held_out` marks sequences that no decision of the search has seen.
    """

    genomes: tuple[Genome, ...]
    sequences: tuple[int, ...]
    seq_len: int
    seed: int
    stage: str
    is_held_out: bool = False

    @property
    def n_sequences(self) -> int:
        return len(self.sequences)

    @property
    def n_tokens(self) -> int:
        """Tokens per genome."""
        return self.n_sequences * self.seq_len


Strategy = Generator[Round, Losses, None]


@dataclass
class Run:
    """One search under way: the problem, its random numbers, and what has been found.

    table: predicted loss per gene and option, or None; starts: plans to begin with besides the
    strategy's own. The pool has n_sequences sequences of seq_len tokens; the last quarter is
    held out from every decision but the last.
    """

    space: SearchSpace
    budget: Budget
    table: Table | None
    starts: tuple[Genome, ...]
    n_sequences: int
    seq_len: int
    seed: int
    best: Genome | None = None
    best_loss: float | None = None
    evaluated_tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.n_sequences < 1 or self.seq_len < 1:
            raise ValueError(
                f"a search needs sequences to evaluate on, got {self.n_sequences} of {self.seq_len}"
            )
        if self.table is not None:
            check_table(self.space, self.table)
        for start in self.starts:
            if not self.budget.allows(self.space, start):
                raise ValueError(
                    f"a start plan takes {self.space.bits_per_weight(start):.3f} bits per weight, "
                    f"over the budget of {self.budget.text}"
                )
        self.rng = random.Random(self.seed)
        self._is_short = False

    @property
    def limit(self) -> int:
        return self.budget.limit

    @property
    def n_held_out(self) -> int:
        """Sequences kept for the last comparison; 0 where the pool is too small to spare any."""
        return self.n_sequences // 4

    def uniform(self) -> list[Genome]:
        """Return the uniform plans within the budget, the dearest first."""
        plans = {self.space.canonical(plan): None for plan in self.space.uniform().values()}
        fitting = [plan for plan in plans if self.budget.allows(self.space, plan)]
        return sorted(fitting, key=self.space.cost, reverse=True)

    def round(
        self,
        genomes: Iterable[Genome],
        n_tokens: int,
        stage: str,
        *,
        fresh_from: Sequence[int] = (),
    ) -> Round:
        """Return a round on newly drawn sequences, none of `fresh_from` while others are left."""
        seed = self.rng.getrandbits(32)
        pool = range(self.n_sequences - self.n_held_out)
        order = random.Random(seed).sample(pool, len(pool))
        order.sort(key=lambda number: number in fresh_from)  # stable: fresh ones first
        drawn = order[: self._n_sequences(n_tokens, len(pool))]
        return Round(tuple(genomes), tuple(sorted(drawn)), self.seq_len, seed, stage)

    def held_out_round(self, genomes: Iterable[Genome], stage: str) -> Round:
        """Return a round on the held-out sequences; on all where none could be spared."""
        first = self.n_sequences - self.n_held_out if self.n_held_out else 0
        sequences = tuple(range(first, self.n_sequences))
        spared = self.n_held_out > 0
        return Round(tuple(genomes), sequences, self.seq_len, self.seed, stage, spared)

    def _n_sequences(self, n_tokens: int, available: int) -> int:
        wanted = -(-n_tokens // self.seq_len)
        if wanted > available and not self._is_short:
            self._is_short = True
            logger.warning(
                "rounds of %d tokens are asked for, the search pool has %d; give more search "
                "data for surer decisions",
                n_tokens,
                available * self.seq_len,
            )
        return max(1, min(available, wanted))

    def found(self, genome: Genome, loss: float | None) -> None:
        """Note the best plan so far and its last measured loss."""
        self.best, self.best_loss = genome, loss

    def record(self, generation: int, **more: Any) -> None:
        """Add a line to the history: the best plan's loss and bits, tokens spent, and `more`."""
        if self.best is None:
            raise ValueError("a generation is recorded after its best plan is known")
        bits = self.space.bits_per_weight(self.best)
        loss = "not measured" if self.best_loss is None else f"{self.best_loss:.4f} nats"
        tokens = self.evaluated_tokens
        logger.info("generation %d: %s, %.3f bits, %d tokens", generation, loss, bits, tokens)
        self.history.append(
            {
                "generation": generation,
                "loss": self.best_loss,
                "bits_per_weight": bits,
                "evaluated_tokens": tokens,
                **more,
            }
        )


def mean(losses: Sequence[float]) -> float:
    """Return the mean loss over sequences."""
    return sum(losses) / len(losses)


def unique(genomes: Iterable[Genome]) -> list[Genome]:
    """Return the genomes without repetitions, in order."""
    return list(dict.fromkeys(genomes))
