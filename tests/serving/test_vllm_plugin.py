"""What the plugin does where vLLM is not, or is another one; tests/clients runs it in vLLM."""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import pytest

from hf_evopress.serving.vllm_plugin import register


def test_a_vllm_of_another_kind_is_a_warning_and_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it could not be imported
    register()
    (said,) = caplog.messages
    assert "compressed models will not load" in said and "VLLM_PLUGINS" in said


def test_vllm_finds_the_plugin() -> None:
    found = {point.name: point for point in entry_points(group="vllm.general_plugins")}
    if "hf_evopress" not in found:
        pytest.skip("installed before the plugin was there: pip install -e . again")
    assert found["hf_evopress"].load() is register
