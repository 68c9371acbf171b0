"""Which text to calibrate on: plans made on raw text, on the model's own, and on both.

Each is judged on text of both kinds.

    python tests/benchmarks/own_text.py .cache/SmolLM2-135M-Instruct \
        --data calibration.txt --test wiki.test.raw --bits 2.8 --work own-text

Own text is `--data self`: what the dense model writes, under its chat template where it has one.
Statistics, sensitivities and search sequences are all from the text of a row; "both" has as many
sequences of each, so twice the tokens. Own text to judge on is written from another seed. All rows
are evaluated in one pass over the same windows, so differences between them are paired.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.calibration.own_text import write_self
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import find_plan
from hf_evopress.methods.compose import normalize
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluate import compare_many

SEED = 1  # of the own text to judge on


def main() -> None:
    words = arguments()
    sources = {"raw": [words.data], "own": ["self"], "both": [words.data, "self"]}
    functions: dict[str, Any] = {}
    stored: dict[str, float] = {}
    for kind in words.kinds:
        for bits in words.bits:
            job = Job(recipe(words, sources[kind], bits, Path(words.work) / kind))
            store = build_levels(job)
            plans = {f"knapsack {bits}": find_plan(job, store).levels}
            plans |= {f"uniform {x}": dict.fromkeys(store.units, x) for x in words.uniform}
            for name, levels in plans.items():
                made = {unit: normalize(level) for unit, level in levels.items()}
                evaluator = job.evaluator(store)
                functions[f"{kind}: {name}"] = lambda ids, e=evaluator, x=made: e.logits(x, ids)
                genome = job.space.genome({unit: str(level) for unit, level in made.items()})
                stored[f"{kind}: {name}"] = job.space.bits_per_weight(genome)
            print(kind, bits, flush=True)
    for name, tokens, window in texts(words, job):
        reports = compare_many(
            functions, job.model, tokens, window=window, max_windows=words.windows
        )
        print(f"\non {name}\n\n| calibrated on: plan | stored bits | KL (nats) | same top-1 |")
        print("|---|---|---|---|")
        for row, report in reports.items():
            print(
                f"| {row} | {stored[row]:.3f} | {report.kl_nats:.4f} ± "
                f"{report.kl_standard_error:.4f} | {report.top1_agreement:.1%} |",
                flush=True,
            )


def texts(words: argparse.Namespace, job: Job) -> list[tuple[str, Tensor, int]]:
    """Return the texts to judge on, with the tokens of a window of each."""
    own = write_self(
        job.model,
        job.tokenizer,
        words.windows,
        Path(words.work) / "judge",
        seq_len=words.seq_len,
        seed=SEED,
    )
    return [
        (words.test, tokenize_file(words.test, job.tokenizer), words.window),
        ("own text", own.flatten(), words.seq_len),
    ]


def recipe(words: argparse.Namespace, sources: list[str], bits: float, work: Path) -> Recipe:
    n = len(sources)
    search = (words.search + 2) * n - 2  # so that a source writes as many sequences in each row
    counts = {"calibration": words.calibration * n, "search": search, "heldout": 2, "test": 0}
    return Recipe.from_dict(
        {
            "model": words.model,
            "work": str(work),
            "budget": {"bits": bits},
            "ends": "dense",
            "levels": list(dict.fromkeys([*words.level, *words.uniform])),
            "data": {"sources": sources, "seq_len": words.seq_len, **counts},
            "search": {
                "strategy": "knapsack",
                "sensitivity_tokens": words.sensitivity_tokens * n,
            },
        }
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="raw calibration text")
    parser.add_argument("--test", required=True, help="raw evaluation text")
    parser.add_argument("--work", default="demo/own-text.work")
    parser.add_argument("--kinds", nargs="+", default=["raw", "own", "both"])
    parser.add_argument("--bits", type=float, nargs="+", default=[2.8])
    menu = [f"trellis:bits={bits},state_bits=10" for bits in (2, 3, 4)]
    parser.add_argument("--level", nargs="+", default=menu, help="menu of the knapsack")
    parser.add_argument("--uniform", nargs="+", default=menu[1:2], help="levels to use alone")
    parser.add_argument("--sensitivity-tokens", type=int, default=40960)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=56, help="sequences, of each text")
    parser.add_argument("--search", type=int, default=8, help="sequences, of each text")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=8, help="of each text to judge on")
    return parser.parse_args()


if __name__ == "__main__":
    main()
