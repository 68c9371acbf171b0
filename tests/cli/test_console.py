"""Progress where there is no terminal: few lines, each of which says how far a step is."""

from __future__ import annotations

import io

from rich.console import Console

from hf_evopress.cli.console import EVERY, Lines, bars


def lines_of(reports: list[tuple[float, str, int, int]]) -> list[str]:
    file = io.StringIO()
    times = iter([at for at, *_ in reports])
    lines = Lines(Console(file=file, width=40), clock=lambda: next(times))
    for _, *report in reports:
        lines(*report)  # type: ignore[arg-type]
    return file.getvalue().splitlines()


def test_there_is_a_line_at_the_start_and_at_the_end_and_now_and_then_between() -> None:
    said = lines_of(
        [
            (0, "kick: closed book", 1, 90),
            (EVERY - 1, "kick: choices", 2, 90),
            (EVERY, "kick: choices", 3, 90),
            (EVERY + 1, "kick: choices", 4, 90),
            (2 * EVERY + 9, "kick: [in] context, 2 other passages", 5, 90),
            (2 * EVERY + 10, "kick", 90, 90),
            (2 * EVERY + 11, "kick", 90, 90),
        ]
    )
    assert said == [
        "kick: closed book: 1 of 90, 0 s",
        f"kick: choices: 3 of 90, {EVERY} s",
        f"kick: [in] context, 2 other passages: 5 of 90, {2 * EVERY + 9} s",
        f"kick: 90 of 90, {2 * EVERY + 10} s",
    ]


def test_each_step_has_its_own_time_and_its_first_line() -> None:
    said = lines_of([(0, "load", 1, 2), (5, "load", 2, 2), (6, "decode", 1, 9)])
    assert said == ["load: 1 of 2, 0 s", "load: 2 of 2, 5 s", "decode: 1 of 9, 0 s"]


def test_output_that_is_no_terminal_gets_lines() -> None:
    with bars() as progress:  # pytest captures stderr
        assert isinstance(progress, Lines)
