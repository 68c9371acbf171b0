"""Generation by a whole model: dense, compressed, and the same model in llama.cpp, by turns.

    OMP_NUM_THREADS=2 python tests/benchmarks/generate.py .cache/SmolLM2-135M-Instruct \\
        --levels rtn:bits=3,group_size=64,clip=false --types q4_0 q3_k

One token at a time after a prompt of 16, batch 1; each figure is the best of --repeats turns of
--steps tokens. Levels are rounded without data (time does not depend on it), the embedding at 8
bits in all; a type of GGUF files that does not fit the width of a layer is IQ4_NL there, as in
llama.cpp. Compressed folders can be named, too (--folders).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_evopress.export.gguf import FILE, GGUFExport
from hf_evopress.jobs.bench import START, best, decoder, held_bytes, machine, read_bandwidth
from hf_evopress.jobs.bench import read_bytes as bytes_read
from hf_evopress.loading.layers import prepare_layers
from hf_evopress.loading.replace import replace_linears
from hf_evopress.methods import compose
from hf_evopress.methods.base import State
from hf_evopress.methods.menu import fits
from hf_evopress.models.ends import find_ends
from hf_evopress.models.source import load_checked, read_tokenizer
from hf_evopress.models.units import find_units
from hf_evopress.plans.level import Level
from hf_evopress.plans.plan import Plan

sys.path.append(str(Path(__file__).parent.parent))
WIDE = "gguf:type=iq4_nl,feedback=false"  # for widths that are no multiple of 256


def main() -> None:
    words = arguments()
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    models: dict[str, Any] = {"dense bfloat16": load(words.model)}
    for text in words.levels:
        model = load(words.model)
        plan = plan_at(model, text, "rtn:bits=8,group_size=64,clip=false")
        replace_linears(model, plan, rounded(model))
        models[text] = model
    for folder in words.folders:
        models[folder] = load(folder)
    for name, model in models.items():
        if name != "dense bfloat16":
            prepare_layers(model, "auto")
    sizes = {name: (held_bytes(m), bytes_read(m)) for name, m in models.items()}
    ids = torch.randint(1000, (1, START))
    steps = {name: times(decoder(model, ids), words.steps) for name, model in models.items()}
    with tempfile.TemporaryDirectory() as place:
        for kind in words.types:
            path = written(words.model, kind, Path(place) / kind)
            name, size = f"llama.cpp, {kind.upper()}", path.stat().st_size
            sizes[name] = (size, size)
            steps[name] = times(in_llama_cpp(path, ids, threads, words), words.steps)
        seconds = {name: t / words.steps for name, t in best(steps, words.repeats).items()}
    bandwidth, dense = read_bandwidth(), seconds["dense bfloat16"]
    print(f"{machine()}; memory reads {bandwidth / 1e9:.1f} GB/s\n")
    print("| | MB held | tokens/s | to dense | GB/s | of what memory gives |")
    print("|---|---|---|---|---|---|")
    for name, t in seconds.items():
        held, read = sizes[name]
        print(
            f"| {name} | {held / 1e6:.0f} | {1 / t:.1f} | {dense / t:.2f}x "
            f"| {read / t / 1e9:.1f} | {read / t / bandwidth:.0%} |"
        )


def load(place: str) -> Any:
    return load_checked(place, dtype=torch.bfloat16).eval().requires_grad_(False)


def plan_at(model: Any, level: str, of_ends: str) -> Plan:
    """Return the plan with one level for the layers and one for embedding and head."""
    shapes = {unit.name: unit.shape for unit in find_units(model)}
    levels = {name: own(level, shape) for name, shape in shapes.items()}
    for unit in find_ends(model):
        shapes[unit.name], levels[unit.name] = unit.shape, of_ends
    return Plan(levels, shapes)


def own(level: str, shape: tuple[int, int]) -> str:
    return level if fits(compose.normalize(level), shape) else WIDE


def rounded(model: Any) -> Callable[[str, Level], State]:
    def states(unit: str, level: Level) -> State:
        W = model.get_submodule(unit).weight.detach().float()
        return compose.compress(compose.normalize(level), W, None)

    return states


def written(place: str, kind: str, folder: Path) -> Path:
    """Return the GGUF file of the model with one type for all layers."""
    model, level = load(place), f"gguf:type={kind},feedback=false"
    plan = plan_at(model, level, "gguf:type=q8_0,feedback=false")
    states = rounded(model)
    GGUFExport().save(model, plan, states, folder, tokenizer=read_tokenizer(place))
    return folder / FILE


def in_llama_cpp(
    path: Path, ids: torch.Tensor, threads: int, words: argparse.Namespace
) -> Callable[[], None]:
    from llama_cpp import LlamaCpp

    n_context = START + words.steps * (words.repeats + 2)
    model, first = LlamaCpp(path, n_context=n_context, threads=threads), ids[0].tolist()
    model.extend(first)
    return lambda: model.extend(first[:1])


def times(step: Callable[[], object], n: int) -> Callable[[], None]:
    def several() -> None:
        for _ in range(n):
            step()

    return several


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="the dense model")
    parser.add_argument("--levels", nargs="*", default=["rtn:bits=3,group_size=64,clip=false"])
    parser.add_argument("--folders", nargs="*", default=[], help="compressed models")
    parser.add_argument("--types", nargs="*", default=["q4_0", "q3_k"], help="of GGUF files")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--steps", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
