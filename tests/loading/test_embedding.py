"""Both ends of a compressed model: packed, tied or not, as transformers has them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from hf_evopress.loading.config import EvoPressConfig
from hf_evopress.loading.embedding import CompressedEmbedding, compress_embedding
from hf_evopress.loading.layers import CompressedLinear
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.replace import replace_linears
from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.models.ends import find_ends
from hf_evopress.models.size import model_size
from hf_evopress.plans.plan import Plan

LEVEL = "rtn:bits=4,group_size=32"
LAYER = "transformer.layer.0.ffn.lin1"  # of DistilBERT
IDS = torch.arange(40).view(2, 20)
EMBEDDING = "model.embed_tokens"


def compressed(model: Any, level: str = LEVEL, stats: Stats | None = None) -> Any:
    """Return `model` with both ends packed at a level, and nothing else."""
    units = find_ends(model)
    plan = Plan({u.name: level for u in units}, {u.name: u.shape for u in units})

    def states(unit: str, level: Any) -> dict[str, Tensor]:
        weight = model.get_submodule(unit).weight.detach().float()
        return compose.compress(compose.normalize(level), weight, stats)

    replace_linears(model, plan, states)
    attach(model, plan)
    return model


def rounded(model: Any, level: str = LEVEL) -> Any:
    """Return a dense copy of `model` whose ends have the weights that a level gives them."""
    model = copy.deepcopy(model)
    for unit in find_ends(model):
        weight = model.get_submodule(unit.name).weight
        state = compose.compress(compose.normalize(level), weight.detach().float(), None)
        W = compose.decompress(compose.normalize(level), state, unit.shape, weight.dtype)
        weight.data.copy_(W)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def dense(request: Any, tiny_model: Any) -> Any:
    torch.manual_seed(0)
    return tiny_model("llama", tie_word_embeddings=request.param).eval()


def test_the_packed_model_is_the_rounded_one(dense: Any) -> None:
    expected = logits(rounded(dense))
    model = compressed(dense)
    assert isinstance(model.get_input_embeddings(), CompressedEmbedding)
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert isinstance(model.get_output_embeddings(), CompressedLinear)
    assert torch.equal(logits(model), expected)


def test_it_survives_a_checkpoint_without_a_dense_weight(dense: Any, tmp_path: Path) -> None:
    expected = logits(compressed(dense))
    dense.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        shapes = {k: file.get_slice(k).get_shape() for k in list(file.keys())}
    assert shapes[f"{EMBEDDING}.weight"] == [0]  # fails to load without the plugin
    tied = dense.config.tie_word_embeddings
    assert ("lm_head.codes" in shapes) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert not [n for n, p in loaded.named_parameters() if p.shape == (256, 64)]
    assert (loaded.lm_head.codes is loaded.model.embed_tokens.codes) is tied
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "model.safetensors").read_bytes() == (
        tmp_path / "model.safetensors"
    ).read_bytes()


def test_a_tied_head_with_a_bias_survives_a_checkpoint(tmp_path: Path) -> None:
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "bos_token_id": 0}
    config = AutoConfig.for_model(
        "phi", num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True, **sizes
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    expected = logits(compressed(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.scales is loaded.model.embed_tokens.scales
    assert torch.equal(logits(loaded), expected)


@pytest.fixture
def unwritten_memory_is_nan() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[assignment]
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[assignment]
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("on_load", [False, True], ids=["packed", "on load"])
def test_a_new_head_that_is_tied_begins_with_a_bias_of_zero(
    on_load: bool, tmp_path: Path, unwritten_memory_is_nan: None
) -> None:
    sizes = {"vocab_size": 256, "dim": 64, "n_layers": 1, "n_heads": 4, "hidden_dim": 128}
    config = AutoConfig.for_model("distilbert", **sizes)
    dense = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).eval()
    embedding, other = (f"distilbert.{n}" for n in ("embeddings.word_embeddings", LAYER))
    torch.nn.init.normal_(dense.get_submodule(other).bias)
    shapes = {embedding: (256, 64), other: (128, 64)}
    plan = Plan(dict.fromkeys(shapes, LEVEL), shapes, base_model=str(tmp_path))
    options: dict[str, Any] = {}
    if on_load:
        options["quantization_config"] = EvoPressConfig(plan)
    else:

        def states(unit: str, level: Any) -> dict[str, Tensor]:
            weight = dense.get_submodule(unit).weight.detach()
            return compose.compress(compose.normalize(level), weight, None)

        replace_linears(dense, plan, states)
        attach(dense, plan)
    dense.save_pretrained(tmp_path)
    model = AutoModelForMaskedLM.from_pretrained(tmp_path, **options)
    assert isinstance(model.vocab_projector, CompressedLinear)
    assert torch.equal(model.vocab_projector.bias, torch.zeros(256))
    assert torch.equal(model.get_submodule(other).bias, dense.get_submodule(other).bias)


def test_tied_tensors_are_counted_once(tiny_model: Any) -> None:
    model = compressed(tiny_model("llama", tie_word_embeddings=True))
    bits = compose.cost_bits(compose.normalize(LEVEL), (256, 64))
    others = sum(16 * 0 + 32 * p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert model_size(model).other_bits == bits + others


def test_ends_in_a_plan_are_no_weights_of_dropped_blocks(tiny_model: Any) -> None:
    model = compressed(tiny_model("llama", tie_word_embeddings=True))
    size = model_size(model)
    gone = {"model.embed_tokens": (256, 64), "model.layers.9.mlp.up_proj": (128, 64)}
    with_gone = model_size(model, shapes=gone)
    assert with_gone.unit_weights == size.unit_weights + 128 * 64


def test_tie_weights_keeps_the_ends_together(tiny_model: Any) -> None:
    model = compressed(tiny_model("llama", tie_word_embeddings=True))
    expected = logits(model)
    model.tie_weights()
    assert model.lm_head.codes is model.model.embed_tokens.codes
    model.to(torch.bfloat16)
    assert model.lm_head.scales is model.model.embed_tokens.scales
    assert model.lm_head.weight_dtype == torch.bfloat16
    assert torch.allclose(logits(model).float(), expected, atol=0.1)


def test_terms_of_a_level_are_tied_one_by_one(tiny_model: Any, tmp_path: Path) -> None:
    level = "rtn:bits=2,group_size=32 + rtn:bits=2,group_size=32"
    model = compressed(tiny_model("llama", tie_word_embeddings=True), level)
    expected = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)


def test_rows_at_two_bit_widths_serve_both_ends(dense: Any, tmp_path: Path) -> None:
    width = dense.config.hidden_size
    level = "rows:bits=3,top_bits=8,top=0.25,group_size=32"
    model = compressed(dense, level, Stats(torch.eye(width)))
    expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    embedding = loaded.get_input_embeddings()
    assert torch.equal(embedding(IDS), embedding.weight[IDS])
    assert torch.equal(logits(loaded.dequantize()), expected)


def test_dequantize_gives_the_stock_model_back(dense: Any, tmp_path: Path) -> None:
    expected, kinds = rounded(dense), {n: type(m) for n, m in dense.named_modules()}
    tied = dict(dense.all_tied_weights_keys)
    compressed(dense).save_pretrained(tmp_path)
    for model in (dense, AutoModelForCausalLM.from_pretrained(tmp_path)):
        stock = model.dequantize()
        assert {n: type(m) for n, m in stock.named_modules()} == kinds
        assert stock.all_tied_weights_keys == tied
        assert (stock.lm_head.weight is stock.model.embed_tokens.weight) is bool(tied)
        assert torch.equal(logits(stock), logits(expected))
        stock.save_pretrained(tmp_path / "stock")
        assert torch.equal(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "stock")), logits(expected)
        )


def test_resizing_makes_the_ends_dense_and_keeps_what_was_there(
    dense: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = compressed(dense)
    expected, rows = logits(model), model.config.vocab_size
    layers = {n for n, m in model.named_modules() if isinstance(m, CompressedLinear)}
    assert model.resize_token_embeddings(rows) is model.get_input_embeddings()
    assert isinstance(model.get_input_embeddings(), CompressedEmbedding) and not caplog.records
    copied = copy.deepcopy(model)
    copied.resize_token_embeddings(rows + 40, mean_resizing=False)
    assert isinstance(model.get_input_embeddings(), CompressedEmbedding)  # only the copy changed
    assert "dense from now on" in caplog.text and "MB more" in caplog.text
    assert type(copied.get_input_embeddings()) is nn.Embedding
    made = logits(copied)
    assert made.shape[-1] == rows + 40 == copied.config.vocab_size
    assert torch.allclose(made[..., :rows], expected, atol=1e-5)
    copied.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), made)
    still = {n for n, m in loaded.named_modules() if isinstance(m, CompressedLinear)}
    assert still == layers - {"lm_head"}
    is_tied = copied.lm_head.weight is copied.get_input_embeddings().weight
    assert is_tied == bool(copied.config.tie_word_embeddings)


def test_a_dequantized_model_resizes_as_its_class_does(dense: Any) -> None:
    stock = compressed(dense).dequantize()
    stock.resize_token_embeddings(300)
    assert logits(stock).shape[-1] == 300


@pytest.mark.parametrize("architecture", ["gemma3_text", "gpt2", "opt", "gpt_neox", "qwen3"])
def test_ends_of_other_architectures(architecture: str, tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model(architecture).eval()
    expected = logits(rounded(model))
    assert torch.equal(logits(compressed(model)), expected)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(loaded.dequantize()), expected)


def test_scaled_embeddings_scale_what_they_look_up(tiny_model: Any) -> None:
    module = tiny_model("gemma3_text").get_input_embeddings()
    state = compose.compress(
        compose.normalize("rtn:bits=8,group_size=32"), module.weight.detach(), None
    )
    packed = compress_embedding(module, "rtn:bits=8,group_size=32", state)
    assert isinstance(packed, type(module)) and isinstance(packed, CompressedEmbedding)
    assert torch.allclose(packed(IDS), module(IDS), atol=0.05)
    assert packed.padding_idx == module.padding_idx


def test_a_base_model_takes_the_embedding_alone(dense: Any, tmp_path: Path) -> None:
    compressed(dense).save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base.embed_tokens, CompressedEmbedding)
    with torch.no_grad():
        hidden = base(IDS).last_hidden_state
        assert torch.equal(hidden, dense.model(IDS).last_hidden_state)


def test_ends_are_compressed_while_loading(dense: Any, tmp_path: Path) -> None:
    expected = logits(rounded(dense))
    dense.save_pretrained(tmp_path)
    plan = Plan({unit.name: LEVEL for unit in find_ends(dense)})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=EvoPressConfig(plan=plan)
    )
    assert isinstance(model.model.embed_tokens, CompressedEmbedding)
    assert torch.equal(logits(model), expected)


def test_a_level_for_a_tied_head_names_the_embedding(tiny_model: Any, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.*tied to that of model.embed_tokens"):
        replace_linears(model, Plan({"lm_head": LEVEL}), lambda unit, level: {})


def test_position_embeddings_are_refused_by_name(tiny_model: Any) -> None:
    with pytest.raises(TypeError, match=r"transformer\.wpe is a Embedding"):
        replace_linears(
            tiny_model("gpt2"), Plan({"transformer.wpe": LEVEL}), lambda unit, level: {}
        )


def test_the_look_up_decodes_only_rows_asked_for(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    level, W = compose.normalize(LEVEL), torch.randn(256, 64)
    packed = compress_embedding(
        nn.Embedding.from_pretrained(W), level, compose.compress(level, W, None)
    )
    expected = packed.weight[IDS]

    def whole(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("the whole weight was computed")

    monkeypatch.setattr(type(compose.method("rtn")), "decompress", whole)
    assert torch.equal(packed(IDS), expected)


def test_no_dense_embedding_appears_while_a_model_runs(monkeypatch: Any, tiny_model: Any) -> None:
    from hf_evopress.models.stream import BlockStream
    from hf_evopress.scoring.evaluate import compare

    model = compressed(tiny_model("llama", tie_word_embeddings=False))
    expected = logits(model)

    def looked_at(self: Any) -> Tensor:
        raise AssertionError("the whole weight was asked for")

    monkeypatch.setattr(CompressedEmbedding, "weight", property(looked_at))
    assert torch.equal(logits(model), expected)
    model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    compare(model, None, IDS.flatten(), window=20)
    stream = BlockStream(model)
    assert torch.equal(stream.embed(IDS), model.model.embed_tokens(IDS))
