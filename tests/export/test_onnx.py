"""ONNX graphs of compressed models, run in ONNX Runtime: the logits and the greedy text of ours."""

from __future__ import annotations

import copy
import importlib.util
import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_evopress.cli import main
from hf_evopress.export import onnx as export
from hf_evopress.export.onnx import FILE, TOLERANCE, OnnxExport, replace_layers
from hf_evopress.export.onnx_format.codes import Codes, block_of
from hf_evopress.export.onnx_format.graph import check_kind
from hf_evopress.export.onnx_format.layers import is_packed
from hf_evopress.jobs.convert import convert
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.replace import replace_linears
from hf_evopress.methods import compose
from hf_evopress.methods.maths.linalg import Stats
from hf_evopress.models.dropped import replace_dropped
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan

from ..versions import is_older

DOCS = Path(__file__).parents[2] / "docs" / "onnx.md"
EMBEDDING = "rows:bits=3,top_bits=6,top=0.2,group_size=32"
DROPPED = "model.layers.1.self_attn"
LEVELS = (
    "gptq:bits=4,group_size=32",
    "gptq:bits=8,group_size=32",
    "rtn:bits=3,group_size=16,symmetric=true",
    "gptq:bits=4,group_size=32,symmetric=true + lowrank:rank=4",
    "magnitude:sparsity=0.5",
    "rtn:bits=2,group_size=64",
    "rtn:bits=5,group_size=-1,symmetric=true",
    "sparsegpt:sparsity=0.5,bits=6,group_size=32",
    "trellis:bits=3,state_bits=10",
    "lowrank:rank=8,centred=true,factors=int8",
    "zero",
    "rtn:bits=8,group_size=32,scales=bfloat16,symmetric=true",
)


def needs_onnx() -> None:
    if is_older("transformers", "5.24"):
        pytest.skip("transformers < 5.24 has no exporter of this kind")
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason="an extra: hf-evopress[onnx]")


def states_of(model: Any) -> Callable[[str, Level], dict[str, Tensor]]:
    def state(unit: str, level: Level) -> dict[str, Tensor]:
        W = model.get_submodule(unit).weight.detach().float()
        X = torch.randn(512, W.shape[1], generator=torch.Generator().manual_seed(0)) + 0.1
        stats = Stats(X.T @ X / len(X), None, X.mean(0), len(X))
        return compose.compress(compose.normalize(level), W, stats)

    return state


def save_packed(folder: Path, model: Any, tokenizer: Any, levels: dict[str, str]) -> None:
    packed, states = copy.deepcopy(model), states_of(model)
    shapes = {u: tuple(model.get_submodule(u).weight.shape) for u in levels if levels[u] != "drop"}
    plan = Plan(levels, shapes)
    replace_dropped(packed, plan)
    replace_linears(packed, plan, states)
    attach(packed, plan)
    packed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def mixed(model: Any) -> dict[str, str]:
    units = [unit.name for unit in find_units(model) if not unit.name.startswith(DROPPED)]
    levels = {unit: LEVELS[i % len(LEVELS)] for i, unit in enumerate(units)}
    return {"model.embed_tokens": EMBEDDING, **levels, DROPPED: "drop"}


@pytest.fixture(scope="module")
def folder(
    trained_llama: nn.Module, byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """small/, a compressed model of many levels, and onnx/, its graph."""
    needs_onnx()
    made = tmp_path_factory.mktemp("onnx")
    save_packed(made / "small", trained_llama, byte_tokenizer, mixed(trained_llama))
    convert(str(made / "small"), made / "onnx", format="onnx")
    return made


def open_graph(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class Graph:
    """A causal model in ONNX Runtime alone, with its cache."""

    def __init__(self, file: Path, batch: int = 1) -> None:
        self.session = open_graph(file)
        self.names = [output.name for output in self.session.get_outputs()]
        self.cache = {
            node.name: torch.zeros(batch, node.shape[1], 0, node.shape[3]).numpy()
            for node in self.session.get_inputs()
            if "cache" in node.name
        }

    def __call__(self, ids: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        found = self.session.run(None, {**{k: v.numpy() for k, v in given.items()}, **self.cache})
        out = dict(zip(self.names, found, strict=True))
        self.cache = {n: out[n.replace("input.", "output.", 1)] for n in self.cache}
        return torch.from_numpy(out["logits"])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 40)])
def test_the_logits_are_those_of_the_model_at_any_batch_and_length(
    folder: Path, shape: tuple[int, int]
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32)
    ids = torch.randint(1, 256, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:1, : shape[1] // 3] = 0  # on the left, as generation pads
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        ours = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    theirs = Graph(folder / "onnx" / FILE, shape[0])(ids, mask)
    seen = mask.bool()
    assert (ours[seen] - theirs[seen]).abs().max() <= TOLERANCE * ours[seen].abs().max()


@pytest.mark.slow
def test_greedy_text_over_the_cache_is_that_of_generate(folder: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([list(b"the red fox sees")])
    wanted = model.generate(ids, max_new_tokens=24, do_sample=False, pad_token_id=0)
    graph, new = Graph(folder / "onnx" / FILE), ids
    for _ in range(24):
        logits = graph(new, torch.ones_like(ids))
        new = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], -1)
    assert ids.tolist() == wanted.tolist()


@pytest.mark.slow
def test_transformers_runs_the_folder(folder: Path) -> None:
    from transformers.exporters import ExportedModel

    model: Any = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32)
    exported = ExportedModel.from_pretrained(folder / "onnx", device="cpu")
    first, second = torch.arange(5, 14)[None], torch.arange(30, 33)[None]
    mask, positions = torch.ones(1, 12, dtype=torch.long), torch.arange(12)[None]
    with torch.no_grad():
        cache = model(first, use_cache=True)[1]
        ours = model(second, attention_mask=mask, position_ids=positions[:, 9:], cache=cache).logits
        cache = model(first, use_cache=True)[1]
    out = exported(
        input_ids=second, attention_mask=mask, position_ids=positions[:, 9:], cache=cache
    )
    assert (out.logits - ours).abs().max() <= TOLERANCE * ours.abs().max()


@pytest.mark.slow
def test_codes_are_operators_of_onnx_runtime_and_stay_packed(folder: Path) -> None:
    import onnx

    made = onnx.load(str(folder / "onnx" / FILE), load_external_data=False)
    plan = Plan.load(folder / "onnx")
    counts = Counter(node.op_type for node in made.graph.node)
    bits = {
        attribute.i
        for node in made.graph.node
        if node.op_type in ("MatMulNBits", "GatherBlockQuantized")
        for attribute in node.attribute
        if attribute.name == "bits"
    }
    planes = {2: 1, 3: 1, 4: 1, 5: 2, 6: 2, 8: 2}
    wanted = sum(
        planes[int(term.kwargs["bits"])]
        for unit, level in plan.items()
        for term in level.terms
        if unit != "model.embed_tokens" and "bits" in term.kwargs and is_packed(level, (64, 64))
    )
    assert counts["MatMulNBits"] == wanted > 10 and counts["GatherBlockQuantized"] == 3
    assert bits == {4}
    kinds = {tensor.name: tensor.data_type for tensor in made.graph.initializer}
    packed = [name for name in kinds if re.search(r"codes_\d$", name)]
    scales = [name for name in kinds if name.endswith("scales")]
    assert len(packed) == wanted + 3 and {kinds[n] for n in packed} == {onnx.TensorProto.UINT8}
    half = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    assert scales and {kinds[n] for n in scales} == half


@pytest.mark.slow
def test_the_folder_has_all_that_is_needed_and_no_paths_of_this_machine(folder: Path) -> None:
    names = {path.name for path in (folder / "onnx").iterdir()}
    assert names >= {FILE, f"{FILE}.data", "config.json", "tokenizer.json", "evopress_plan.json"}
    assert str(Path.cwd()).encode() not in (folder / "onnx" / FILE).read_bytes()
    assert b"stack_trace" not in (folder / "onnx" / FILE).read_bytes()


@pytest.mark.slow
def test_the_command_says_the_size_of_graph_and_weights(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder / "by-command"
    with pytest.raises(SystemExit) as exit:
        main(["export", str(folder / "small"), "--format", "onnx", "--out", str(out)])
    size = sum((out / name).stat().st_size for name in (FILE, f"{FILE}.data"))
    assert not exit.value.code and f"by-command: {size / 1e6:.1f} MB" in capsys.readouterr().out


@pytest.mark.slow
def test_the_code_in_the_docs_writes_what_the_model_writes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "smol-onnx").symlink_to(folder / "onnx")
    monkeypatch.chdir(folder)
    for block in re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(DOCS), "exec"), {})
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "small", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    ids = torch.tensor([list(b"the red fox sees")])
    out = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert bytes(out[0].tolist()).decode() in capsys.readouterr().out


@pytest.mark.slow
def test_a_dense_tied_embedding_is_stored_once_in_its_16_bits(
    tiny_model: Callable[..., nn.Module], byte_tokenizer: Any, tmp_path: Path
) -> None:
    needs_onnx()
    model: Any = tiny_model("llama", tie_word_embeddings=True, vocab_size=4096).to(torch.bfloat16)
    level = "rtn:bits=4,group_size=32"
    levels = {unit.name: level for unit in find_units(model)}
    save_packed(tmp_path / "small", model, byte_tokenizer, levels)
    convert(str(tmp_path / "small"), tmp_path / "onnx", format="onnx")
    shapes = [model.get_submodule(unit).weight.shape for unit in levels]
    packed = sum(compose.cost_bits(Level.parse(level), tuple(s)) // 8 for s in shapes)
    embedding = 2 * model.get_input_embeddings().weight.numel()
    there = (tmp_path / "onnx" / f"{FILE}.data").stat().st_size
    # the smallest tensors are in the graph itself
    assert 0.98 * (packed + embedding) <= there <= 1.1 * (packed + embedding)


@pytest.mark.slow
def test_a_classifier_of_texts(
    tiny_model: Callable[..., nn.Module], byte_tokenizer: Any, tmp_path: Path
) -> None:
    needs_onnx()
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        "bert", vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, max_position_embeddings=64, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    levels = {unit.name: "rtn:bits=4,group_size=32" for unit in find_units(model)}
    save_packed(tmp_path / "small", model, byte_tokenizer, levels)
    convert(str(tmp_path / "small"), tmp_path / "onnx", format="onnx")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    ids = torch.arange(7, 37).view(2, 15)
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    with torch.no_grad():
        wanted = loaded(input_ids=ids, attention_mask=mask).logits
    given = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    (found,) = open_graph(tmp_path / "onnx" / FILE).run(None, given)
    assert (torch.from_numpy(found) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("rest", ["group_size=32", "group_size=96", "group_size=-1,symmetric=true"])
def test_codes_in_four_bit_planes_are_the_weight_to_the_bit(bits: int, rest: str) -> None:
    level = compose.normalize(f"rtn:bits={bits},{rest}")
    W = torch.randn(24, 192, generator=torch.Generator().manual_seed(bits))
    state = compose.compress(level, W, None)
    part, params, tensors, _ = next(compose.terms(level, state))
    grid = part.codes(tensors, (24, 192), **params)
    assert grid is not None
    made = Codes(*grid, torch.float16)
    assert torch.equal(made.weight(), compose.decompress(level, state, (24, 192), torch.float32))
    assert len(made.factors) == (1 if bits <= 4 else 2)
    if bits in (2, 3, 4) and "symmetric" in rest:
        assert made.has_zeros == [False]  # none is stored


@pytest.mark.parametrize(
    ("group", "block"),
    [(16, 16), (64, 64), (96, 32), (576, 64), (1024, 256), (24, None), (9, None)],
)
def test_groups_are_cut_into_blocks_that_the_operator_takes(group: int, block: int | None) -> None:
    assert block_of(group) == block


@pytest.mark.parametrize(
    ("level", "packed"),
    [
        ("gptq:bits=4,group_size=64", True),
        ("gptq:bits=3,group_size=-1 + lowrank:rank=4,factors=int4", True),
        ("gptq:bits=4,group_size=24", False),
        ("sparsegpt:sparsity=0.5,bits=4,group_size=64", True),
        ("sparsegpt:sparsity=0.5", False),
        ("rows:bits=4,top_bits=6,group_size=64", True),
        ("trellis:bits=4 + lowrank:rank=4", False),
        ("zero", True),
    ],
)
def test_what_stays_packed(level: str, packed: bool) -> None:
    assert is_packed(Level.parse(level), (192, 192)) is packed


def test_layers_of_the_graph_compute_what_packed_layers_do(trained_llama: nn.Module) -> None:
    dense: Any = copy.deepcopy(trained_llama)
    ours, levels = copy.deepcopy(dense), mixed(dense)
    shapes = {u: tuple(dense.get_submodule(u).weight.shape) for u in levels if levels[u] != "drop"}
    plan, states = Plan(levels, shapes), states_of(dense)
    for model in (ours, stand_in := copy.deepcopy(dense)):
        replace_dropped(model, plan)
    replace_linears(ours, plan, states)
    replace_layers(stand_in, plan, states)
    ids = torch.arange(3, 35)[None]
    with torch.no_grad():
        wanted, found = ours(ids).logits, stand_in(ids).logits
    assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.slow
def test_bytes_that_the_file_has_more_are_said(
    tiny_model: Callable[..., nn.Module], byte_tokenizer: Any, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model: Any = tiny_model("llama", num_hidden_layers=1)
    q, v = (f"model.layers.0.self_attn.{name}_proj" for name in "qv")
    levels = {q: "rtn:bits=3,group_size=32", v: "trellis:bits=3,state_bits=10"}
    plan = Plan(levels, {u: tuple(model.get_submodule(u).weight.shape) for u in levels})
    made = replace_layers(model, plan, states_of(copy.deepcopy(model)))
    with caplog.at_level(logging.WARNING):
        export._say_bytes(plan, made)
    (record,) = caplog.records
    assert "1 in more bits (rtn:bits=3,group_size=32)" in record.getMessage()
    assert "1 dense (trellis:bits=3,state_bits=10)" in record.getMessage()
    caplog.clear()
    export._say_bytes(plan, {q: (compose.normalize("dense"), made[q][1])})
    assert not caplog.records


def test_experts_are_refused_by_name(tiny_model: Callable[..., nn.Module], tmp_path: Path) -> None:
    needs_onnx()
    from hf_evopress.models.plain import make_plain

    model: Any = tiny_model("mixtral")
    make_plain(model)
    unit = next(u for u in find_units(model) if ".experts." in u.name)
    plan = Plan({unit.name: "rtn:bits=4,group_size=32"}, {unit.name: unit.shape})
    with pytest.raises(ValueError, match="experts that are compressed one by one"):
        OnnxExport().write(model, plan, states_of(model), tmp_path)


def test_encoder_decoders_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="more than one graph"):
        check_kind(SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True)))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> Any:
        return None if name == "onnxruntime" else importlib.util.find_spec("os")

    monkeypatch.setattr(export, "find_spec", find)
    with pytest.raises(ImportError, match=r'needs onnxruntime: pip install "hf-evopress\[onnx\]"'):
        export._exporter()
