"""LoRA over a compressed model, what it forgets, what it takes, and healing by distillation.

    hf-evopress levels MODEL --work WORK --data calibration.txt      # or any compress run
    python tests/benchmarks/tune.py MODEL --work WORK --task task.txt --test wiki.test.raw \
        --out DIR --parts lora resume memory heal

lora: steps on the task's text over the 3.3-bit knapsack plan of WORK's store, for all layers and
for the 20 % of smallest condition number; perplexity of both texts before and after.
resume: a run killed after its first checkpoint and started again, against one that was not.
memory: peak of a process that trains the compressed model, and the dense one.
heal: distillation of scales and norms at 2.8 bits on calibration text; KL before and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_evopress.adapters.by_name import load
from hf_evopress.adapters.folder import read_adapter
from hf_evopress.calibration.data import tokenize_file
from hf_evopress.loading.quantizer import attach
from hf_evopress.loading.replace import replace_linears
from hf_evopress.plans.plan import Plan
from hf_evopress.scoring.evaluate import compare_many
from hf_evopress.search import knapsack
from hf_evopress.search.space import SearchSpace
from hf_evopress.store.level_store import LevelStore
from hf_evopress.training.settings import Tuning
from hf_evopress.training.tune import tune


def main() -> None:
    words = arguments()
    if words.probe:
        return probe(words)
    words.out.mkdir(parents=True, exist_ok=True)
    for part in words.parts:
        start = time.process_time()
        figures = PARTS[part](words)
        figures["cpu_seconds"] = round(time.process_time() - start)
        print(f"{part}: {json.dumps(figures)}", flush=True)
        (words.out / f"{part}.json").write_text(json.dumps(figures, indent=1))
    return None


def lora(words: argparse.Namespace) -> dict[str, Any]:
    base = checkpoint(words, 3.3)
    texts = split(words)
    made: dict[str, Any] = {}
    for target in ("all-linear", "kappa:0.2"):
        out = fresh(words.out / f"lora-{target.replace(':', '-')}")
        result = tune(
            str(base),
            out,
            settings(words, target=target),
            data=[texts["train"]],
            tests={"task": texts["task"], "other": texts["other"]},
            window=words.window,
        )
        n = max(1, len(result.losses) // 10)
        made[target] = {
            "trained": result.n_trained,
            "loss first tenth": sum(result.losses[:n]) / n,
            "loss last tenth": sum(result.losses[-n:]) / n,
            "perplexity": result.perplexity,
        }
        print(target, made[target], flush=True)
    return made


def resume(words: argparse.Namespace) -> dict[str, Any]:
    base, texts = checkpoint(words, 3.3), split(words)
    adapters = []
    for name in ("straight", "killed"):
        out = fresh(words.out / name)
        command = [
            *(sys.executable, "-m", "hf_evopress", "tune", str(base), "--out", str(out)),
            *("--data", texts["train"], "--steps", "60", "--batch", str(words.batch)),
            *("--seq-len", str(words.seq_len), "--sequences", str(words.sequences)),
            *(["--bf16"] if words.bf16 else []),
        ]
        if name == "killed":
            process = subprocess.Popen(command)
            while not any(Path(f"{out}.work").glob("checkpoint-50/trainer_state.json")):
                time.sleep(0.2)
            process.kill()
            process.wait()
        subprocess.run(command, check=True)
        adapters.append(read_adapter(out).factors)
    one, two = adapters
    same = all(torch.equal(x, y) for n in one for x, y in zip(one[n], two[n], strict=True))
    return {"resumed equals straight, to the bit": same}


def memory(words: argparse.Namespace) -> dict[str, Any]:
    base = checkpoint(words, 3.3)
    found = {}
    for name, model in (("compressed", str(base)), ("dense", words.model)):
        command = [sys.executable, __file__, model, "--probe", *sys.argv[2:]]
        run = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(run.stdout.splitlines()[-1])
    return found


def probe(words: argparse.Namespace) -> None:
    """Print the peak memory, in MB, of three training steps of one model."""
    out = fresh(words.out / "probe")
    texts = split(words)
    loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    tune(words.model, out, settings(words, steps=3), data=[texts["train"]])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"imports": round(loaded), "peak": round(peak)}))


def heal(words: argparse.Namespace) -> dict[str, Any]:
    base = checkpoint(words, 2.8)
    out = fresh(words.out / "healed")
    chosen = settings(words, train="scales,norms", teacher=words.model, learning_rate=words.heal_lr)
    result = tune(str(base), out, chosen, data=[words.heal_text])
    ids = tokenize_file(words.test, AutoTokenizer.from_pretrained(words.model))
    reports = compare_many(
        {"before": load(str(base)), "after": load(str(out))},
        load(words.model),
        ids,
        window=words.window,
        max_windows=words.windows,
    )
    n = max(1, len(result.losses) // 10)
    return {
        "trained": result.n_trained,
        "loss": [sum(result.losses[:n]) / n, sum(result.losses[-n:]) / n],
        "same plan": Plan.load(base).levels == Plan.load(out).levels,
        **{
            name: {"kl": report.kl_nats, "perplexity": report.perplexity}
            for name, report in reports.items()
        },
    }


PARTS = {"lora": lora, "resume": resume, "memory": memory, "heal": heal}


def settings(words: argparse.Namespace, **changes: Any) -> Tuning:
    common: dict[str, Any] = {
        "steps": words.steps,
        "batch": words.batch,
        "seq_len": words.seq_len,
        "sequences": words.sequences,
        "save_steps": words.steps,
        "bf16": words.bf16,
    }
    return Tuning(**{**common, **changes})


def checkpoint(words: argparse.Namespace, bits: float) -> Path:
    """Return the checkpoint of the store's knapsack plan at so many stored bits per weight."""
    folder = words.out / f"base-{bits}"
    if (folder / "config.json").is_file():
        return folder
    store = LevelStore(words.work / "store")
    offered = {
        name: [(str(x), store.cost_bits(name, x)) for x in store.levels(name)]
        for name in store.units
    }
    weights = {name: unit.n_weights for name, unit in store.units.items()}
    space = SearchSpace.build(weights, offered)
    losses = [
        [store.scores(gene.units[0], x.level)["sensitivity_nats"] for x in gene.options]
        for gene in space.genes
    ]
    limit = int(bits * sum(weights.values()))
    levels = space.levels(knapsack.solve(space, losses, limit).genome)
    shapes = {name: unit.shape for name, unit in store.units.items()}
    plan = Plan(levels, shapes=shapes, base_model=words.model)
    model = AutoModelForCausalLM.from_pretrained(words.model, dtype=torch.bfloat16)
    replace_linears(model, plan, store.state)
    attach(model, plan)
    model.save_pretrained(folder)
    plan.save(folder)
    AutoTokenizer.from_pretrained(words.model).save_pretrained(folder)
    return folder


def split(words: argparse.Namespace) -> dict[str, str]:
    """Return text files: 4/5 of the task to train on, a piece of the rest, one of the other."""
    text = Path(words.task).read_text(encoding="utf-8")
    cut, n = len(text) * 4 // 5, 5 * words.window * words.windows
    other = Path(words.test).read_text(encoding="utf-8")
    pieces = {"train": text[:cut], "task": text[cut:][:n], "other": other[:n]}
    for name, piece in pieces.items():
        (words.out / f"{name}.txt").write_text(piece, encoding="utf-8")
    return {name: str(words.out / f"{name}.txt") for name in pieces}


def fresh(out: Path) -> Path:
    for folder in (out, Path(f"{out}.work")):
        shutil.rmtree(folder, ignore_errors=True)
    return out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True, help="with store")
    parser.add_argument("--task", required=True, help="text to train on")
    parser.add_argument("--test", required=True, help="another text")
    parser.add_argument("--heal-text", help="text to distil on", required=True)
    parser.add_argument("--heal-lr", type=float, default=1e-4)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--probe", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
