"""Text as each class of model knows it: whole texts, masks, and the same for every job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerFast

from hf_evopress.calibration.class_tokens import class_tokens, file_tokens
from hf_evopress.calibration.data import load_tokens, tokenize_file
from hf_evopress.jobs.evaluate import evaluate_model
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.measure import unseen_tokens
from hf_evopress.loading.calibration_data import read
from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.models.classes import CAUSAL, MASKED, SEQ2SEQ, SEQUENCE, pooling_of
from hf_evopress.recipes.recipe import Recipe

CLS, SEP, MASK = 251, 252, 253
SETTINGS: dict[str, Any] = {
    "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(byte_tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Bytes, begun and ended as BERT's are."""
    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    cls, sep, mask = (str(byte_tokenizer.convert_ids_to_tokens(i)) for i in (CLS, SEP, MASK))
    backend.post_processor = TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(cls, CLS), (sep, SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        cls_token=cls,
        sep_token=sep,
        mask_token=mask,
    )


@pytest.fixture(scope="module")
def bert(
    tokenizer: PreTrainedTokenizerFast,
    structured_text: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with dense/, a BERT that fills masks in, and text.txt."""
    here = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = AutoConfig.for_model("bert", vocab_size=256, **SETTINGS)
    transformers.BertForMaskedLM(config).save_pretrained(here / "dense")
    tokenizer.save_pretrained(here / "dense")
    (here / "text.txt").write_text(structured_text(60))
    return here


def is_whole(tokens: Tensor) -> bool:
    return bool((tokens[:, 0] == CLS).all() and (tokens[:, -1] == SEP).all())


def share_masked(tokens: Tensor) -> float:
    return float((tokens == MASK).float().mean())


def test_a_window_is_what_its_class_reads(bert: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    cut: dict[str, Any] = {"n_sequences": 8, "seq_len": 32}
    text = str(bert / "text.txt")
    made = {k: class_tokens([text], tokenizer, k, **cut) for k in (CAUSAL, MASKED, SEQUENCE)}
    assert torch.equal(made[CAUSAL], load_tokens([text], tokenizer, **cut))
    assert is_whole(made[MASKED]) and is_whole(made[SEQUENCE])
    assert share_masked(made[SEQUENCE]) == 0 and 0.05 < share_masked(made[MASKED]) < 0.25
    assert torch.equal(made[MASKED], torch.where(made[MASKED] == MASK, MASK, made[SEQUENCE]))
    two = class_tokens([text], tokenizer, SEQ2SEQ, **cut)
    assert is_whole(two[:, :16]) and is_whole(two[:, 16:])


def test_every_window_of_a_file_is_what_its_class_reads(
    bert: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = bert / "text.txt"
    for kind in (CAUSAL, None):
        assert torch.equal(
            file_tokens(text, tokenizer, kind, window=32), tokenize_file(text, tokenizer)
        )
    plain = tokenize_file(text, tokenizer)[1:-1]
    whole = file_tokens(text, tokenizer, SEQUENCE, window=32).view(-1, 32)
    assert is_whole(whole)
    assert torch.equal(whole[:, 1:-1].flatten(), plain[: len(plain) // 30 * 30])
    assert share_masked(file_tokens(text, tokenizer, MASKED, window=32)) > 0
    halves = file_tokens(text, tokenizer, SEQ2SEQ, window=32).view(-1, 16)
    assert is_whole(halves)
    (bert / "short.txt").write_text("a few words")
    with pytest.raises(ValueError, match=r"short.txt has 11 tokens, one window needs 32"):
        file_tokens(bert / "short.txt", tokenizer, SEQUENCE, window=32)


def test_a_plan_is_applied_on_the_tokens_that_compress_takes(bert: Path) -> None:
    sources, counts = [str(bert / "text.txt")], {"calibration": 8, "search": 2, "heldout": 1}
    recipe = {
        "model": str(bert / "dense"),
        "out": str(bert / "out"),
        "budget": {"bits": 5.0},
        "levels": ["rtn:bits=4,group_size=32"],
        "data": {"sources": sources, "seq_len": 32, "test": 1, **counts},
    }
    job = Job(Recipe.from_dict(recipe))
    searched_on = torch.cat([*job.tokens.values()])
    assert is_whole(searched_on) and share_masked(searched_on) > 0
    model = transformers.BertForMaskedLM.from_pretrained(bert / "dense")
    applied_on = read(model, EvoPressConfig(data=sources, seq_len=32, n_sequences=12))
    assert is_whole(applied_on) and share_masked(applied_on) > 0
    for row in applied_on:  # in another order, so other tokens of them are masked
        same = (row == searched_on) | (row == MASK) | (searched_on == MASK)
        assert same.all(1).any()
    unseen, window = unseen_tokens(job, str(bert / "text.txt"), 32)
    assert is_whole(unseen.view(-1, window)) and share_masked(unseen) > 0


def test_an_embedding_model_is_calibrated_by_the_vector_that_compress_takes(
    bert: Path, tmp_path: Path
) -> None:
    shutil.copytree(bert / "dense", tmp_path / "dense")
    model = transformers.BertModel.from_pretrained(bert / "dense")
    model.save_pretrained(tmp_path / "dense")
    (tmp_path / "dense" / "1_Pooling").mkdir()
    said = json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False})
    (tmp_path / "dense" / "1_Pooling" / "config.json").write_text(said)
    model = transformers.BertModel.from_pretrained(tmp_path / "dense")
    config = EvoPressConfig(data=str(bert / "text.txt"), seq_len=32, n_sequences=2)
    tokens = read(model, config)
    assert is_whole(tokens) and share_masked(tokens) == 0 and pooling_of(model) == "first"


def test_evaluate_asks_a_masked_model_what_it_knows(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_evopress.jobs import evaluate

    seen: list[Tensor] = []

    def note(models: Any, dense: Any, windows: Tensor, **options: Any) -> Any:
        seen.append(windows)
        return real(models, dense, windows, **options)

    real = evaluate.compare_outputs
    monkeypatch.setattr(evaluate, "compare_outputs", note)
    dense = str(bert / "dense")
    evaluate_model(dense, str(bert / "text.txt"), against=dense, window=32, max_windows=4)
    (windows,) = seen
    assert windows.shape == (4, 32) and is_whole(windows) and share_masked(windows) > 0
