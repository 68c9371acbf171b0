"""Work that takes long says so, once; work that does not is silent."""

from __future__ import annotations

import logging
import threading

import pytest

from hf_evopress.base.progress import saying

logger = logging.getLogger("hf_evopress.of_a_test")


def test_what_takes_long_is_said(caplog: pytest.LogCaptureFixture) -> None:
    said = threading.Event()
    heard = logging.Handler()
    heard.emit = lambda record: said.set()  # type: ignore[method-assign]
    logger.addHandler(heard)
    try:
        with saying(logger, "this takes a minute", after=0.01):
            assert said.wait(30)
    finally:
        logger.removeHandler(heard)
    assert [record.message for record in caplog.records] == ["this takes a minute"]


def test_what_is_done_in_time_is_not(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(KeyError), saying(logger, "this takes a minute", after=0.2):
        raise KeyError
    threading.Event().wait(0.4)
    assert not caplog.records
