"""A step that runs out of memory takes smaller batches, then says what lowers its need."""

from __future__ import annotations

import pytest
import torch

from hf_evopress.base.memory import within_memory
from hf_evopress.base.placement import Place, put
from hf_evopress.scoring.evaluator import Evaluator
from hf_evopress.scoring.fitness.kl import KL
from hf_evopress.store.level_store import LevelStore, Source

from ..conftest import make_tiny_model, make_tokens
from ..second_device import live_bytes, memory_of, peak_bytes, reset_peak

SIM = torch.device("sim", 0)


def _needs(n_bytes: int) -> int:
    return int(torch.zeros(n_bytes, dtype=torch.uint8, device="sim").numel())


def test_batches_are_halved_until_they_fit(caplog: pytest.LogCaptureFixture) -> None:
    with memory_of(live_bytes() + 3000):
        assert within_memory("work", _needs, SIM, batch_tokens=8000, least=500) == 2000
    assert "work: out of memory on sim:0, now 4000 tokens at once" in caplog.text


def test_what_does_not_fit_at_all_names_step_peak_and_two_settings() -> None:
    with (
        memory_of(live_bytes() + 3000),
        pytest.raises(RuntimeError, match=r"^work does .* GB were.*--offload cpu.*--seq-len"),
    ):
        within_memory("work", _needs, SIM, batch_tokens=8000, least=4000)


def test_other_errors_pass() -> None:
    with pytest.raises(ZeroDivisionError):
        within_memory("work", lambda batch: batch // 0, SIM, batch_tokens=8, least=1)


def test_a_search_goes_on_with_smaller_batches(tmp_path: object) -> None:
    model = put(make_tiny_model("llama"), Place(SIM, None, torch.device("cpu")))
    store = LevelStore.build(f"{tmp_path}/store", model, [], {}, Source({}, lambda block: {}))
    tokens = make_tokens(64, 64)

    def losses() -> list[list[float]]:
        return Evaluator(model, store, tokens, KL()).losses([{}], range(64))

    reset_peak()
    before = live_bytes()
    wanted = losses()
    needed = peak_bytes() - before
    with memory_of(before + needed // 2):
        found = losses()
    for one, other in zip(found[0], wanted[0], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
