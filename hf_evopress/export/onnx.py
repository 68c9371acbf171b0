"""A graph for ONNX Runtime, traced by transformers' own exporter, with codes that stay packed.

Layers of integer codes become MatMulNBits, a packed embedding GatherBlockQuantized, which are
operators of ONNX Runtime: one of 4 bits for levels of 2 to 4, two of 4 bits for those of 5 to 8.
Low-rank terms are two products. Levels that it has nothing for (trellis, sparse without codes, GGUF
types) are stored dense in the model's dtype; what that adds to the file is said in one line.

The graph computes in float32. Causal models take and give a key-value cache, so that one graph
reads a prompt (with a cache of length 0) and goes on from it, token by token.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..base.placement import on_cpu
from ..loading.layers import resolve_units
from ..methods import compose
from ..models.dropped import replace_dropped
from ..models.ends import embedding_forward, find_ends, output_head
from ..models.experts import SplitExperts
from ..models.plain import match_plan
from ..models.units import is_linear
from ..plans.level import Level
from ..plans.plan import Plan
from .base import Export, States
from .onnx_format.graph import check_kind, checks, dynamic_shapes, example, feed
from .onnx_format.layers import Dense, Embedding, Layer, Part, parts_of_level

logger = logging.getLogger(__name__)

PACKAGE = 'pip install "hf-evopress[onnx]"'
FILE = "model.onnx"
# Of the largest logit. Sums of up to 2^14 products in another order differ by about
# sqrt(2^14) 2^-24 = 8e-6 of their size in float32; ten times that for what the layers pass on.
TOLERANCE = 1e-4


class OnnxExport(Export):
    """A graph for ONNX Runtime: codes stay packed, what it has no place for is dense."""

    name = "onnx"
    takes_any_class = True

    def write(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        exporter, config_class = _exporter()
        check_kind(model)
        if any(isinstance(module, SplitExperts) for module in model.modules()):
            raise ValueError(
                "onnx: a graph has no place for experts that are compressed one by one; use the "
                "evopress or the dense export"
            )
        model.cpu()  # wherever it computes: the graph is traced and checked there
        match_plan(model, plan)
        replace_dropped(model, plan)
        on_the_cpu = lambda unit, level: on_cpu(states(unit, level))  # noqa: E731
        _say_bytes(plan, replace_layers(model, plan, on_the_cpu))
        _to_float32(model)
        inputs = example(model, self.tokenizer)
        shapes = dynamic_shapes(inputs)
        # optimize: its constant folding would store unpacked weights
        config = config_class(dynamic_shapes=shapes, optimize=False)
        with _quiet():
            made = exporter.export(model, inputs, config)
        _drop_traces(made.program)
        made.save_pretrained(folder)

    @torch.no_grad()
    def check(self, model: Any, plan: Plan, states: States, folder: Path) -> None:
        """Raise RuntimeError unless ONNX Runtime computes from the file what the model does."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(
            str(folder / FILE), options, providers=["CPUExecutionProvider"]
        )
        for inputs in checks(model, self.tokenizer):
            names = [node.name for node in session.get_inputs()]
            found = torch.from_numpy(session.run(None, feed(inputs, names))[0])
            wanted = model(**inputs)[0]
            far = float((found - wanted).abs().max())
            if not far <= TOLERANCE * float(wanted.abs().max()):
                raise RuntimeError(
                    "ONNX Runtime computes other outputs from this file (they differ by "
                    f"{far:.3g}); use the evopress export, and please report this"
                )


def replace_layers(model: Any, plan: Plan, states: States) -> dict[str, tuple[Level, list[Part]]]:
    """Put a layer of the graph in the place of all linear layers and of the input embedding.

    Returns unit -> level and parts of those that `plan` compresses.
    """
    dtype = model.dtype
    ends = {unit.name: unit for unit in find_ends(model)}
    made: dict[str, tuple[Level, list[Part]]] = {}
    units = {path: unit for unit, path in resolve_units(model, plan).items()}
    modules = [(n, m) for n, m in model.named_modules() if is_linear(m) or n in ends]
    tied = next((n for n, unit in ends.items() if unit.role == "tied"), None)
    head = output_head(model)
    for name, module in modules:
        source = tied if tied is not None and head is not None and name == head[0] else name
        level = plan.get(units.get(source, source))
        shape = (module.weight.shape[0], module.weight.shape[1])
        if source != name and source in made:
            level, parts = made[source]
        elif level is None or level.is_dense:
            level, parts = compose.normalize("dense"), [Dense(module.weight)]
        else:
            parts = parts_of_level(level, states(units[source], level), shape, dtype)
        made[source] = level, parts
        if isinstance(module, nn.Embedding):
            model.set_submodule(name, _embedding(module, parts))
        else:
            bias = _bias(module.bias, level, states, units.get(source, source))
            model.set_submodule(name, Layer(parts, shape[0], bias))
    return {unit: made[path] for path, unit in units.items()}


def _embedding(module: nn.Embedding, parts: list[Part]) -> Embedding:
    made = Embedding(parts, (module.num_embeddings, module.embedding_dim))
    # of the dense weight only the dtype is asked for, by classes that scale the rows
    module.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    made.does = embedding_forward(module, made.rows_of)
    return made


def _bias(bias: Tensor | None, level: Level, states: States, unit: str) -> Tensor | None:
    fix = None if level.is_dense else compose.bias_fix(level, states(unit, level))
    if fix is None or bias is None:
        return bias if fix is None else fix
    return bias + fix.to(bias.dtype)


def _say_bytes(plan: Plan, made: dict[str, tuple[Level, list[Part]]]) -> None:
    """Say in one line where the file holds more than the packed checkpoint."""
    wider, dense = Counter[str](), Counter[str]()
    packed = there = 0
    for unit, (level, parts) in made.items():
        if level.is_dense:
            continue
        stored = compose.cost_bits(level, plan.shapes[unit]) // 8
        size = sum(tensor.nbytes for part in parts for tensor in part.buffers())
        packed, there = packed + stored, there + size
        if any(isinstance(part, Dense) for part in parts):
            dense[str(level)] += 1
        elif size > 1.05 * stored:
            wider[str(level)] += 1
    kinds = ((wider, "in more bits"), (dense, "dense"))
    said = [f"{sum(n.values())} {how} ({', '.join(n)})" for n, how in kinds if n]
    if said:
        logger.warning(
            "ONNX Runtime has no place for some levels: %s of packed weights take %s in the file; "
            "of %d, %s",
            *(f"{size / 1e6:.2f} MB" for size in (packed, there)),
            len(made),
            ", ".join(said),
        )


def _to_float32(model: nn.Module) -> None:
    """Cast norms, biases and the like: what is not packed."""
    for module in model.modules():
        if isinstance(module, Part):
            continue
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None and tensor.is_floating_point():
                    tensor.data = tensor.data.float()


def _drop_traces(program: Any) -> None:
    """Take out of a graph where each node was traced: paths of this machine, and long."""
    for graph in (program.graph, *(function.graph for function in program.functions.values())):
        graph.metadata_props.clear()
        for node in graph.all_nodes():
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
    program.metadata_props.clear()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep back the progress and notes of torch's exporter, which say nothing to users."""
    tracer = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = tracer.level
    tracer.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        tracer.setLevel(before)


def _exporter() -> tuple[Any, Any]:
    """Return transformers' exporter and its settings class; ImportError says what is missing."""
    missing = [n for n in ("onnx", "onnxruntime", "onnxscript") if find_spec(n) is None]
    if missing:
        raise ImportError(f"this export needs {', '.join(missing)}: {PACKAGE}")
    try:
        exporters = import_module("transformers.exporters")
        names = ("OnnxExporter", "OnnxConfig", "ExportedModel")  # the last: by which it is read
        exporter, settings, _ = (getattr(exporters, name) for name in names)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"this export is made by transformers' own exporter, which transformers "
            f"{transformers.__version__} does not have as used here: 5.24 does"
        ) from error
    return exporter(), settings
