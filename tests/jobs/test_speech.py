"""Speech recognisers, calibrated on sounds and what is said in them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from hf_evopress import EvoPressConfig
from hf_evopress.cli import main
from hf_evopress.jobs.apply import apply_plan
from hf_evopress.jobs.bench import bench
from hf_evopress.jobs.convert import convert
from hf_evopress.jobs.evaluate import evaluate_model
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.pipeline import compress
from hf_evopress.loading.layers import compressed_linears
from hf_evopress.models.classes import SPEECH
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe
from tests.speech import RATE, save, sing, write_calls

ROOT = Path(__file__).parents[2]
EMBEDDING = "model.decoder.embed_tokens"
SAMPLES = 0.3 * np.sin(np.arange(RATE // 2, dtype=np.float32) / 9)


@pytest.fixture(scope="module")
def home(structured_text: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with dense/, a tiny Whisper with its processor, calls.jsonl, sounds/, text.txt."""
    here = tmp_path_factory.mktemp("speech")
    save(here / "dense")
    write_calls(here, structured_text(120))
    (here / "text.txt").write_text(structured_text(120))
    return here


def recipe(here: Path, **more: Any) -> Recipe:
    counts = {"calibration": 6, "search": 3, "heldout": 1, "test": 3}
    return Recipe.from_dict(
        {
            "model": str(here / "dense"),
            "out": str(here / "out"),
            "budget": {"bits": 4.0},
            "levels": [f"gptq:bits={b},group_size=32" for b in (3, 4)],
            "data": {"sources": [str(here / "calls.jsonl")], **counts},
            "search": {"settings": {"generations": 1}, "sensitivity_tokens": 128},
            **more,
        }
    )


@pytest.fixture(scope="module")
def out(home: Path) -> Path:
    """The model, compressed: raises if the reloaded logits differ in one bit."""
    return compress(recipe(home)).folder


def heard() -> dict[str, torch.Tensor]:
    """Return what a feature extractor of the model makes of a sound."""
    return dict(_extractor()(SAMPLES, sampling_rate=RATE, return_tensors="pt"))


def _extractor() -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=8, hop_length=320, chunk_length=1)


def test_both_stacks_and_the_cross_attention_get_levels(out: Path) -> None:
    plan = Plan.load(out)
    parts = ["encoder.layers.1.self_attn.q_proj", "encoder.layers.0.fc1", "decoder.layers.0.fc2"]
    parts += ["decoder.layers.1.self_attn.k_proj", "decoder.layers.1.encoder_attn.v_proj"]
    assert all(f"model.{part}" in plan for part in parts)
    assert str(plan[EMBEDDING]) == "rtn:bits=8,group_size=32" and "proj_out" not in plan
    assert len(plan) == 2 * 6 + 2 * 10 + 1
    measured = plan.results["evaluation"]["searched"]
    assert 0 < measured["kl_nats"] < 1 and measured["window"] < 32  # words, no places of sound
    assert plan.results["text"] == "unseen parts of calls.jsonl"
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["WhisperForConditionalGeneration"]


def test_a_card_says_what_it_is_and_its_example_runs(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = (out / "README.md").read_text()
    assert "pipeline_tag: automatic-speech-recognition" in card
    assert "an ordinary transformers model (a speech recogniser)" in card
    assert f"from transformers import {SPEECH.auto}" in card and 'data="calls.jsonl"' in card
    monkeypatch.chdir(out.parent)
    (code, *_) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "card", "exec"), {"samples": SAMPLES})
    assert capsys.readouterr().out.strip()


def test_it_loads_in_a_process_that_does_not_import_us(out: Path, tmp_path: Path) -> None:
    code = f"""
import hf_evopress_autoload; hf_evopress_autoload.start()  # as import torch does, installed
import numpy as np, torch
from safetensors.torch import save_file
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor
model = AutoModelForSpeechSeq2Seq.from_pretrained({str(out)!r}).eval()
processor = AutoProcessor.from_pretrained({str(out)!r})
samples = 0.3 * np.sin(np.arange({RATE} // 2, dtype=np.float32) / 9)
heard = processor(samples, sampling_rate={RATE}, return_tensors="pt").to(model.dtype)
ids = torch.arange(257, 264)[None]
with torch.no_grad():
    logits = model(**heard, decoder_input_ids=ids).logits.float()
written = model.generate(**heard, max_new_tokens=8, do_sample=False)
save_file({{"logits": logits, "written": written}}, {str(tmp_path / "found.safetensors")!r})
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    model = transformers.WhisperForConditionalGeneration.from_pretrained(out).eval()
    inputs = {"input_features": heard()["input_features"].to(model.dtype)}
    with torch.no_grad():
        logits = model(**inputs, decoder_input_ids=torch.arange(257, 264)[None]).logits.float()
    assert torch.equal(found["logits"], logits)
    written = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert torch.equal(found["written"], written) and written.shape[1] > 2


def test_a_pipeline_of_transformers_hears(out: Path) -> None:
    hear = transformers.pipeline("automatic-speech-recognition", model=str(out))
    said = hear({"raw": SAMPLES, "sampling_rate": RATE}, generate_kwargs={"max_new_tokens": 8})
    assert isinstance(said["text"], str) and said["text"]


def test_a_size_lets_the_shared_embedding_be_searched(home: Path) -> None:
    more = {"budget": {"size": "72kB"}, "levels": ["gptq:bits=3,group_size=32"]}
    result = compress(recipe(home, out=str(home / "small"), work=str(home / "small.work"), **more))
    assert str(result.plan[EMBEDDING]) != "dense"
    searched = next(row for row in result.rows if row.name == "searched")
    assert searched.size_bytes <= 72_000 and searched.report.kl_nats is not None


def test_it_is_evaluated_against_its_dense_model(home: Path, out: Path) -> None:
    words = (str(out), str(home / "calls.jsonl"))
    found = evaluate_model(*words, against=str(home / "dense"), max_windows=4)
    assert len(found["kl_windows"]) == 4 and all(0 < loss < 1 for loss in found["kl_windows"])
    assert 3 < found["bits_per_weight"] < 5 and found["window"] < 32
    with pytest.raises(ValueError, match="is of class speech, .* give it with --against"):
        evaluate_model(*words)
    with pytest.raises(ValueError, match=r"hears sound: give one file .* got .*text\.txt"):
        evaluate_model(str(out), str(home / "text.txt"), against=str(home / "dense"))


def test_a_plan_is_applied_with_sounds(home: Path, out: Path, tmp_path: Path) -> None:
    words = {"model": str(home / "dense"), "data": [str(home / "calls.jsonl")]}
    made = apply_plan(str(out), tmp_path / "applied", n_sequences=6, **words)
    assert Plan.load(made).levels == Plan.load(out).levels
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(made).eval()
    inputs = {"input_features": heard()["input_features"].to(model.dtype)}
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 1
    with pytest.raises(ValueError, match=r"hears sound: give one file .* got .*text\.txt"):
        apply_plan(str(out), tmp_path / "b", **{**words, "data": [str(home / "text.txt")]})


def test_a_plan_without_data_is_applied_while_loading(home: Path, out: Path) -> None:
    levels = dict.fromkeys(Plan.load(out).levels, "rtn:bits=4,group_size=32")
    model = transformers.AutoModelForSpeechSeq2Seq.from_pretrained(
        home / "dense", quantization_config=EvoPressConfig(plan=Plan(levels))
    ).eval()
    assert len(compressed_linears(model)) >= 32
    inputs = {"input_features": heard()["input_features"].to(model.dtype)}
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_a_dense_export_is_a_stock_model(out: Path, tmp_path: Path) -> None:
    convert(str(out), tmp_path / "stock", format="dense")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert "quantization_config" not in config
    pair = [
        SPEECH.loader.from_pretrained(path, dtype=torch.float32).eval()
        for path in (out, tmp_path / "stock")
    ]
    with torch.no_grad():
        packed, stock = (
            model(**heard(), decoder_input_ids=torch.arange(257, 264)[None]).logits
            for model in pair
        )
    assert torch.allclose(packed, stock, atol=0.1, rtol=0.05)  # 16-bit weights


def test_the_command_line_takes_sounds(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compress", str(home / "dense"), "--bits", "5", "--out", str(home / "by-words")]
    words += ["--data", str(home / "calls.jsonl"), "--calibration", "2", "--search-pool", "1"]
    words += ["--level", "rtn:bits=4,group_size=32", "--generations", "1"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    assert "searched" in capsys.readouterr().out


def test_what_is_wrong_is_said_at_once(home: Path, tmp_path: Path) -> None:
    def fails(message: str, error: type[Exception] = ValueError, **more: Any) -> None:
        with pytest.raises(error, match=message):
            Job(recipe(tmp_path, **more))

    shutil.copytree(home / "dense", tmp_path / "dense")
    shutil.copytree(home / "sounds", tmp_path / "sounds")
    shutil.copy(home / "calls.jsonl", tmp_path)
    fails("hears sound: give one file of JSON lines .* got none", data={})
    two = {"sources": [str(tmp_path / "calls.jsonl"), str(home / "text.txt")]}
    fails("hears sound: give one file .* got .*calls.jsonl, .*text.txt", data=two)
    fails("fitness perplexity is of models that continue text", search={"fitness": "perplexity"})
    fails("refinement is .* class speech: leave out refine", refine="fast")
    fails("no sub-block of Whisper.* can be dropped", drop={"kinds": ["mlp"]})
    fails("is of class speech and continues no text", data={"sources": ["self"]})
    with pytest.raises(ValueError, match=r"bench measures causal .* is a WhisperFor"):
        bench(str(tmp_path / "dense"))
    with pytest.raises(ValueError, match=r"measured on sounds of its data .*leave out x.txt"):
        compress(recipe(tmp_path), test="x.txt")
    sing(tmp_path / "sounds" / "4.wav", 0, seconds=2)
    fails("line 5 of .*calls.jsonl: .*4.wav lasts 2.00 seconds, the model hears 1 at once")
    (tmp_path / "sounds" / "2.wav").unlink()
    fails("line 3 of .*calls.jsonl names the sound 'sounds/2.wav'", FileNotFoundError)
    (tmp_path / "dense" / "processor_config.json").unlink()
    fails("has no feature extractor that can be loaded")


def test_sounds_are_refused_by_a_model_that_hears_none(
    home: Path, tmp_path: Path, byte_tokenizer: Any
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, vocab_size=256)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    byte_tokenizer.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"calls.jsonl holds sounds, .* class causal, which hears"):
        data = {"sources": [str(home / "calls.jsonl")], "seq_len": 32}
        Job(recipe(tmp_path, data=data))


def test_sequences_and_sounds_are_kept(home: Path, out: Path) -> None:
    first = Job(recipe(home))
    assert first.media is not None and first.media.seq_len < recipe(home).data.seq_len
    job = Job(Recipe.load(out / "evopress_recipe.yaml"))  # of the shorter sequences
    assert job.media is not None and job.media.fingerprint == first.media.fingerprint
    assert job.media is not None and job.recipe.data.seq_len == job.media.seq_len
    before = {path: path.stat().st_mtime_ns for path in (home / "out.work").rglob("*.safetensors")}
    rows = torch.cat(list(job.tokens.values()))
    assert len({tuple(row) for row in rows.tolist()}) == 13
    again = {path: path.stat().st_mtime_ns for path in (home / "out.work").rglob("*.safetensors")}
    assert before == again
    (folder,) = (home / "out.work" / "sounds").iterdir()
    folder.rename(folder.with_name("elsewhere"))
    with pytest.raises(ValueError, match="lacks the sounds of tokens.*delete the folder tokens/"):
        Job(recipe(home)).tokens  # noqa: B018
    folder.with_name("elsewhere").rename(folder)
