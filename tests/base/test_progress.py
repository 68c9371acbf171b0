"""Work that takes long says so, once; work that does not is silent."""

from __future__ import annotations

import logging
import threading

import pytest

from hf_evopress.base.progress import saying


class Heard(logging.Handler):
    """What is said, and whether anything has been."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.is_there = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        self.is_there.set()


@pytest.fixture
def heard() -> tuple[logging.Logger, Heard]:
    """A logger of its own: what other tests do to those of the package is not asked here."""
    logger, handler = logging.Logger("of_a_test", logging.WARNING), Heard()
    logger.addHandler(handler)
    return logger, handler


def test_what_takes_long_is_said(heard: tuple[logging.Logger, Heard]) -> None:
    logger, handler = heard
    with saying(logger, "this takes a minute", after=0.01):
        assert handler.is_there.wait(30)
    assert handler.messages == ["this takes a minute"]


def test_what_is_done_in_time_is_not(heard: tuple[logging.Logger, Heard]) -> None:
    logger, handler = heard
    with pytest.raises(KeyError), saying(logger, "this takes a minute", after=0.2):
        raise KeyError
    assert not handler.is_there.wait(0.4)
