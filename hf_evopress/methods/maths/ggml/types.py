"""Types of ggml by name: their number in files, weights per block, bytes per block."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """One type. Weights of a row are cut into blocks, each stored in the same number of bytes."""

    name: str
    number: int  # as ggml and GGUF files number it
    block: int  # weights
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Return the bytes of a row of `columns` weights, a multiple of the block."""
        return columns // self.block * self.block_bytes


def _kinds(*rows: tuple[str, int, int, int]) -> dict[str, Kind]:
    return {row[0]: Kind(*row) for row in rows}


KINDS = _kinds(
    ("q4_0", 2, 32, 18),
    ("q4_1", 3, 32, 20),
    ("q5_0", 6, 32, 22),
    ("q5_1", 7, 32, 24),
    ("q8_0", 8, 32, 34),
    ("q2_k", 10, 256, 84),
    ("q3_k", 11, 256, 110),
    ("q4_k", 12, 256, 144),
    ("q5_k", 13, 256, 176),
    ("q6_k", 14, 256, 210),
    ("iq2_xxs", 16, 256, 66),
    ("iq2_xs", 17, 256, 74),
    ("iq3_xxs", 18, 256, 98),
    ("iq1_s", 19, 256, 50),
    ("iq4_nl", 20, 32, 18),
    ("iq3_s", 21, 256, 110),
    ("iq2_s", 22, 256, 82),
    ("iq4_xs", 23, 256, 136),
    ("iq1_m", 29, 256, 56),
)
# ggml makes these only with an importance matrix
NEED_IMPORTANCE = frozenset({"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs"})


def fitting(columns: int) -> list[str]:
    """Return the types that rows of `columns` weights can take."""
    return [name for name, kind in KINDS.items() if columns % kind.block == 0]


def cut_blocks(rows: Tensor, kind: Kind) -> Tensor:
    """Return the bytes of rows (n, row bytes) as blocks (n, blocks, block bytes)."""
    return rows.unflatten(-1, (-1, kind.block_bytes))
