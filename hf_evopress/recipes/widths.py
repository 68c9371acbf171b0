"""The widths that a recipe tries: shares of the channels of each MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .limit import Limit


def check_widths(widths: Sequence[float], budget: Limit, *, not_with: Mapping[str, bool]) -> None:
    """Raise ValueError where widths are no shares, or with what they do not go."""
    for share in widths:
        if not 0 < share <= 1:
            raise ValueError(f"widths are shares of an MLP's channels, in (0, 1]; got {share}")
    if len(set(widths)) < len(widths):
        raise ValueError(f"widths names a share twice: {', '.join(f'{w:g}' for w in widths)}")
    if widths and budget.size is None:
        raise ValueError(
            "widths compares models of different numbers of weights: give a budget of size "
            "(--size 30MB), which is the same for all"
        )
    if widths and (wrong := [name for name, is_so in not_with.items() if is_so]):
        raise ValueError(f"widths does not go with {wrong[0]}: leave one of them out")
