"""LLM-KICK of a folder: figures of the packed model, whose weights are held while it writes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from hf_evopress.adapters.by_name import load, tokenizer_of
from hf_evopress.jobs import evaluate
from hf_evopress.jobs.evaluate import evaluate_model
from hf_evopress.loading.layers import compressed_linears, prepare_layers
from hf_evopress.methods import compose
from hf_evopress.scoring.kick.probes import kick
from hf_evopress.scoring.kick.questions import KickSet, Question
from hf_evopress.scoring.kick.speaker import Speaker

from ..conftest import make_tiny_model

QUESTIONS = KickSet(
    tuple(
        Question(f"{i} and {i} is?", (str(2 * i),), (str(2 * i), "fox"), f"{i} and {i} is {2 * i}.")
        for i in range(2)
    ),
    ("the red fox sees the tower.",),
)


@pytest.fixture(scope="module")
def folder(write_model: Any, text_tokens: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_tiny_model("llama", max_position_embeddings=2048)
    levels = "rtn:bits=3,group_size=32", "gptq:bits=4,group_size=64 + lowrank:rank=4"
    tokens: Tensor = text_tokens(4, 64)
    return Path(write_model(tmp_path_factory.mktemp("kick"), model, *levels, tokens=tokens))


def test_the_probes_find_what_they_find_on_the_packed_reference(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small, dense = str(folder / "small"), str(folder / "dense")
    packed = load(small)
    prepare_layers(packed, "packed")
    speakers = (Speaker(m, tokenizer_of(small)) for m in (packed, load(dense)))
    reference = kick(*speakers, QUESTIONS)
    loaded: list[Any] = []
    makes: Counter[int] = Counter()
    decompress = compose.decompress

    def keep(*args: Any, **options: Any) -> Any:
        loaded.append(load(*args, **options))
        return loaded[-1]

    def counted(level: Any, state: dict[str, Tensor], *rest: Any) -> Tensor:
        makes[id(next(iter(state.values())))] += 1
        return decompress(level, state, *rest)

    monkeypatch.setattr(evaluate, "load", keep)
    monkeypatch.setattr(compose, "decompress", counted)
    found = evaluate_model(small, against=dense, questions=QUESTIONS)["kick"]
    assert list(found) == list(reference)
    for probe, figures in found.items():
        assert figures == pytest.approx(reference[probe], abs=1e-5)
    linears = compressed_linears(loaded[0])
    assert sorted(makes.values()) == [1] * len(linears)
    assert not any(name for layer in linears.values() for name, _ in layer.named_buffers())
