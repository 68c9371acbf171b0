"""Every class of model: compressed, reloaded without our import, the same outputs, its card."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedTokenizerFast

from hf_evopress.adapters.repair import adapt, merge
from hf_evopress.calibration.data import load_tokens
from hf_evopress.cli import main
from hf_evopress.jobs.apply import apply_plan
from hf_evopress.jobs.bench import bench
from hf_evopress.jobs.convert import convert
from hf_evopress.jobs.evaluate import evaluate_model, kick_questions
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.pipeline import compress
from hf_evopress.models.classes import call, find_class, set_pooling
from hf_evopress.models.source import sees_ahead
from hf_evopress.models.units import find_blocks
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.training.settings import Tuning
from hf_evopress.training.tune import tune

ROOT = Path(__file__).parents[2]
IDS = torch.arange(2, 34).view(2, 16)
TWO_STACKS = ("T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel")

ENCODER: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
ENDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
BERT = {**ENCODER, **ENDS, "intermediate_size": 128, "max_position_embeddings": 64}
LLAMA = {**BERT, "num_key_value_heads": 2}
VISION = {**ENCODER, "intermediate_size": 64, "image_size": 16, "patch_size": 8}

T5: dict[str, Any] = {
    "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2,
    "num_heads": 4, "feed_forward_proj": "gated-gelu",
}  # fmt: skip
BART: dict[str, Any] = {
    **ENDS, "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 64,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "decoder_start_token_id": 0,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "forced_eos_token_id": None,
}  # fmt: skip

# architecture -> model type and settings
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("bert", BERT),
    "RobertaForMaskedLM": ("roberta", BERT),
    "ModernBertForMaskedLM": (
        "modernbert",
        {**BERT, "local_attention": 8, "cls_token_id": 0, "sep_token_id": 0},
    ),
    "DistilBertForSequenceClassification": (
        "distilbert",
        {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 64},
    ),
    "DebertaV2ForTokenClassification": ("deberta-v2", {**BERT, "relative_attention": True}),
    "BertForQuestionAnswering": ("bert", BERT),
    "LlamaForSequenceClassification": ("llama", {**LLAMA, "num_labels": 3}),
    "BertModel": ("bert", BERT),
    "Qwen3Model": ("qwen3", {**LLAMA, "head_dim": 16}),
    "T5ForConditionalGeneration": (
        "t5",
        {**T5, "decoder_start_token_id": 0, "tie_word_embeddings": False},
    ),
    "BartForConditionalGeneration": ("bart", BART),
    "MarianMTModel": ("marian", BART),
    "LlavaForConditionalGeneration": (
        "llava",
        {
            "text_config": {**LLAMA, "model_type": "llama", "vocab_size": 256},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 255,
        },
    ),
}


def make(architecture: str) -> Any:
    """Return a tiny model of a class whose weights are large enough to lose something."""
    kind, settings = MODELS[architecture]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=256, **settings)
    model = getattr(transformers, architecture)(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.08)
    return model


@pytest.fixture(scope="module")
def folder(
    byte_tokenizer: PreTrainedTokenizerFast,
    structured_text: Callable[..., str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """folder(architecture): a folder with dense/ and text.txt."""
    home = tmp_path_factory.mktemp("classes")

    def made(architecture: str) -> Path:
        here = home / architecture
        if not here.is_dir():
            make(architecture).save_pretrained(here / "dense")
            tokenizer = byte_tokenizer
            if find_class(architecture).name == "masked":  # type: ignore[union-attr]
                tokenizer = PreTrainedTokenizerFast(
                    tokenizer_object=byte_tokenizer.backend_tokenizer,
                    eos_token="<eos>",
                    mask_token="ÿ",
                )
            tokenizer.save_pretrained(here / "dense")
            (here / "text.txt").write_text(structured_text(200))
        return here

    return made


def recipe(here: Path, **more: Any) -> Recipe:
    counts = {"calibration": 4, "search": 2, "heldout": 1, "test": 3}
    return Recipe.from_dict(
        {
            "model": str(here / "dense"),
            "out": str(here / "out"),
            "budget": {"bits": 4.0},
            "levels": [f"gptq:bits={b},group_size=32" for b in (3, 4)],
            "data": {"sources": [str(here / "text.txt")], "seq_len": 32, **counts},
            "search": {"settings": {"generations": 1}, "sensitivity_tokens": 64},
            **more,
        }
    )


@pytest.mark.parametrize("architecture", MODELS)
def test_a_model_of_its_class_is_compressed_and_comes_back(
    architecture: str, folder: Callable[[str], Path]
) -> None:
    here, kind = folder(architecture), find_class(architecture)
    assert kind is not None
    result = compress(recipe(here))  # raises if the reloaded outputs differ in one bit
    config = json.loads((result.folder / "config.json").read_text())
    assert config["architectures"] == [architecture]
    searched = next(row for row in result.rows if row.name == "searched").report
    loss = searched.cosine_distance if kind.is_vector else searched.kl_nats
    assert loss is not None and 0 < loss < 0.5
    card = (result.folder / "README.md").read_text()
    assert f"pipeline_tag: {kind.task}" in card
    assert f"from transformers import {kind.auto}" in card and kind.what.lower() in card.lower()
    heads = ("classifier", "score", "qa_outputs", "vision_tower", "pooler")
    assert not any(part in unit for unit in result.plan for part in heads)
    if not kind.generates:  # a head that is there stays dense
        assert not any(unit.endswith(("decoder", "lm_head")) for unit in result.plan)


@pytest.mark.parametrize(
    "architecture",
    [
        "DistilBertForSequenceClassification",
        "DebertaV2ForTokenClassification",
        "BertForMaskedLM",
        "BertModel",
        "T5ForConditionalGeneration",
    ],
)
def test_a_dense_export_is_a_stock_model_of_its_class(
    architecture: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    here, kind = folder(architecture), find_class(architecture)
    assert kind is not None
    if not (here / "out").is_dir():  # another process did the tests above
        compress(recipe(here))
    convert(str(here / "out"), tmp_path / "stock", format="dense")
    config = json.loads((tmp_path / "stock" / "config.json").read_text())
    assert config["architectures"] == [architecture] and "quantization_config" not in config
    pair = [
        kind.loader.from_pretrained(path, dtype=torch.float32).eval()
        for path in (here / "out", tmp_path / "stock")
    ]
    with torch.no_grad():
        packed, stock = (call(model, IDS) for model in pair)
    assert torch.allclose(packed, stock, atol=2e-2)  # 16-bit weights


def test_they_load_in_a_process_that_does_not_import_us(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    made = {a: folder(a) / "out" for a in MODELS}
    for path in made.values():
        if not path.is_dir():  # another process did the tests above
            compress(recipe(path.parent))
    code = f"""
import hf_evopress_autoload; hf_evopress_autoload.start()  # as import torch does, installed
import sys, torch, transformers
from safetensors.torch import save_file
found = {{}}
for name, path in { ({a: str(p) for a, p in made.items()})!r}.items():
    model = getattr(transformers, name).from_pretrained(path).eval()
    ids = torch.arange(2, 34).view(2, 16)
    more = {{"decoder_input_ids": ids}} if model.config.is_encoder_decoder else {{}}
    with torch.no_grad():
        out = model(input_ids=ids, **more)
    found[name] = out[0].float().contiguous()
    if more:
        found[name + ".text"] = model.generate(ids, max_new_tokens=8, do_sample=False)
save_file(found, {str(tmp_path / "found.safetensors")!r})
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found.safetensors")
    for name, path in made.items():
        model = getattr(transformers, name).from_pretrained(path).eval()
        more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
        with torch.no_grad():
            assert torch.equal(found[name], model(input_ids=IDS, **more)[0].float()), name
        if more:
            written = model.generate(IDS, max_new_tokens=8, do_sample=False)
            assert torch.equal(found[name + ".text"], written)


def test_a_head_that_would_be_random_is_refused_at_once(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    here = folder("DistilBertForSequenceClassification")
    shutil.copytree(here / "dense", tmp_path / "dense")
    weights = load_file(tmp_path / "dense" / "model.safetensors")
    kept = {k: v for k, v in weights.items() if not k.startswith("classifier")}
    save_file(kept, tmp_path / "dense" / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(here / "text.txt", tmp_path)
    with pytest.raises(ValueError, match=r"has no classifier\.\w+: its DistilBert.* random head"):
        Job(recipe(tmp_path))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"search": {"fitness": "kl:columns=8"}}, "class sequence: leave out kl's columns"),
        ({"search": {"fitness": "perplexity"}}, "perplexity .* class sequence.* compared by kl"),
        ({"refine": "fast"}, "refinement .* class sequence: leave out refine"),
        ({"data": {"sources": ["self"], "seq_len": 32}}, "continues no text.*--data FILE"),
    ],
)
def test_what_is_of_models_that_write_is_refused_by_name(
    more: dict[str, Any], message: str, folder: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=message):
        Job(recipe(folder("DistilBertForSequenceClassification"), **more))


@pytest.mark.parametrize("architecture", [a for a in MODELS if a not in TWO_STACKS])
def test_which_models_see_ahead_is_known_without_running_them(architecture: str) -> None:
    model, ids = make(architecture).float(), IDS[:1]
    other = ids.clone()
    other[:, -1] += 1
    seen = []
    block = find_blocks(model)[1][-1]
    hook = block.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        for tokens in (ids, other):
            model(input_ids=tokens)
    hook.remove()
    first, second = (out[0] if isinstance(out, tuple) else out for out in seen)
    assert sees_ahead(model) == (not torch.equal(first[:, 0], second[:, 0]))


@pytest.mark.parametrize(
    ("kind", "architecture", "message"),
    [
        (
            "speech_to_text",
            "Speech2TextForConditionalGeneration",
            "Speech2Text.* which reads input_features, no text; .* T5For.* BartFor.* WhisperFor",
        ),
        (
            "moonshine",
            "MoonshineForConditionalGeneration",
            "Moonshine.* which reads input_values, no text; .* of sound WhisperForConditionalGen",
        ),
        (
            "bart",
            "BartForSequenceClassification",
            "encoder-decoder with a head of another kind; .* BartForConditionalGeneration",
        ),
        ("mbart", "MBartForConditionalGeneration", "has no decoder_start_token_id.*config.json"),
    ],
)
def test_another_encoder_decoder_is_refused_with_what_is_nearest(
    kind: str, architecture: str, message: str, tmp_path: Path
) -> None:
    config = AutoConfig.for_model(kind)
    config.architectures = [architecture]
    config.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=message):
        Job(recipe(tmp_path))


def test_every_part_of_an_encoder_decoder_gets_levels(folder: Callable[[str], Path]) -> None:
    for architecture in TWO_STACKS:
        plan = Job(recipe(folder(architecture))).problem.menus
        for part in ("encoder", "decoder"):
            assert any(f"{part}." in unit for unit in plan)
        assert any("EncDecAttention" in unit or "encoder_attn" in unit for unit in plan)
        assert not any("embed" in unit or "shared" in unit for unit in plan)


def test_source_and_target_are_two_texts_to_the_tokenizer(
    byte_tokenizer: PreTrainedTokenizerFast, structured_text: Callable[..., str]
) -> None:
    backend = Tokenizer.from_str(byte_tokenizer.backend_tokenizer.to_str())
    end = byte_tokenizer.eos_token_id
    backend.post_processor = TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", end)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    cut: dict[str, Any] = {"n_sequences": 3, "seq_len": 9}
    for tokens in load_tokens([[structured_text(50)]], tokenizer, n_wrapped=2, **cut).tolist():
        assert [i for i, token in enumerate(tokens) if token == end] == [3, 8]
    with pytest.raises(ValueError, match="seq_len=3 has no room for 2 texts of 1 special"):
        load_tokens([["a"]], tokenizer, n_wrapped=2, n_sequences=1, seq_len=3)


def test_an_encoder_decoder_says_what_it_cannot(folder: Callable[[str], Path]) -> None:
    here = folder("T5ForConditionalGeneration")
    for more, message in [
        ({"refine": "fast"}, "refinement .* class seq2seq: leave out refine"),
        ({"drop": {"kinds": ["mlp"]}}, "no sub-block of T5.* can be dropped .*: leave out drop"),
    ]:
        with pytest.raises(ValueError, match=message):
            Job(recipe(here, **more))


def test_a_vector_of_a_text_is_pooled_as_its_folder_says(folder: Callable[[str], Path]) -> None:
    model = transformers.BertModel.from_pretrained(folder("BertModel") / "dense").eval()
    with torch.no_grad():
        states = model(IDS).last_hidden_state
        for pooling, expected in (("first", states[:, 0]), ("mean", states.mean(1))):
            set_pooling(model, pooling)
            found = call(model, IDS)[:, 0]
            assert torch.allclose(found, torch.nn.functional.normalize(expected, dim=-1))
    with pytest.raises(ValueError, match="pooling is mean, first, last, got 'max'"):
        set_pooling(model, "max")


@pytest.mark.parametrize(
    "architecture",
    [
        "T5ForConditionalGeneration",
        "BertForMaskedLM",
        "DistilBertForSequenceClassification",
        "Qwen3Model",
        "LlavaForConditionalGeneration",
    ],
)
def test_each_class_is_evaluated_against_its_dense_model(
    architecture: str, folder: Callable[[str], Path]
) -> None:
    here, kind = folder(architecture), find_class(architecture)
    if not (here / "out").is_dir():
        compress(recipe(here))
    words = (str(here / "out"), str(here / "text.txt"))
    found = evaluate_model(*words, against=str(here / "dense"), window=32, max_windows=3)
    assert kind is not None
    losses = found["cosine_windows" if kind.is_vector else "kl_windows"]
    assert len(losses) == 3 and all(0 < loss < 1 for loss in losses)
    assert 3 < found["bits_per_weight"] < 5
    assert ("perplexity" in found) == kind.continues_text and json.dumps(found, allow_nan=False)
    if kind.continues_text:
        return
    with pytest.raises(ValueError, match=f"is of class {kind.name}, .* give it with --against"):
        evaluate_model(*words)
    with pytest.raises(ValueError, match=f"that continue text, .* is of class {kind.name}"):
        evaluate_model(words[0], questions=kick_questions(()))


@pytest.mark.parametrize(
    "architecture", ["T5ForConditionalGeneration", "BertForMaskedLM", "BertModel"]
)
def test_what_is_of_causal_models_refuses_other_classes_by_name(
    architecture: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    here = folder(architecture)
    model, text = str(here / "dense"), [str(here / "text.txt")]
    doors: list[Callable[[], Any]] = [
        lambda: adapt(model, tmp_path / "a", data=text, rank=2),
        lambda: tune(model, tmp_path / "b", Tuning(seq_len=32), data=text),
        lambda: merge(model, "nowhere", tmp_path / "c"),
        lambda: bench(model),
        *(
            lambda format=format: convert(model, tmp_path / "d", format=format)  # type: ignore[misc]
            for format in ("gguf", "compressed_tensors", "exl3", "pruned")
        ),
    ]
    for door in doors:
        with pytest.raises(ValueError, match=f"causal language models; .* is a {architecture}"):
            door()
    for more in ({"adapter": {"rank": 2}}, {"tune": {}}):
        with pytest.raises(ValueError, match=f"{next(iter(more))} is of causal .*leave"):
            Job(recipe(here, **more))


def test_a_plan_is_applied_to_an_encoder_decoder(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    here = folder("BartForConditionalGeneration")
    if not (here / "out").is_dir():
        compress(recipe(here))
    words = {"model": str(here / "dense"), "data": [str(here / "text.txt")], "seq_len": 32}
    made = apply_plan(str(here / "out"), tmp_path / "applied", n_sequences=4, **words)
    plans = [Plan.load(path).levels for path in (made, here / "out")]
    assert plans[0] == plans[1]
    model = transformers.BartForConditionalGeneration.from_pretrained(made)
    assert model.generate(IDS, max_new_tokens=3).shape[0] == 2


def test_the_command_line_takes_an_encoder_decoder(folder: Callable[[str], Path]) -> None:
    here = folder("T5ForConditionalGeneration")
    words = ["compress", str(here / "dense"), "--out", str(here / "by-words"), "--bits", "5"]
    words += ["--data", str(here / "text.txt"), "--seq-len", "32", "--calibration", "4"]
    words += ["--search-pool", "2", "--level", "rtn:bits=4,group_size=32", "--generations", "1"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert not end.value.code
    assert (here / "by-words" / "model.safetensors").is_file()
