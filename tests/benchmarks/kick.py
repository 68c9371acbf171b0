"""Two compressed models of one perplexity: what flips, agreement and KL see that it does not.

    python tests/benchmarks/kick.py MODEL --data calibration.txt --test wiki.test.raw --work w

LLM-KICK's claim (Jaiswal et al. 2024, arXiv:2310.01382) put to the test: a sparse level for all
layers, and a plan of codes whose perplexity is within `--within` of its own: the knapsack's of
some budget, found by halving the range of stored bits, or, where perplexity jumps from one budget
to the next, the one above with so many layers at the first of --codes as it takes, those that lose
least by it. Then both by the probes of `evaluate --kick` on the built-in questions, against the
dense model and against one another. Checkpoints are left in --work.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from quality import share

from hf_evopress.calibration.data import tokenize_file
from hf_evopress.export.evopress import EvoPressExport
from hf_evopress.jobs.evaluate import evaluate_model, kick_questions
from hf_evopress.jobs.job import Job
from hf_evopress.jobs.levels import build_levels
from hf_evopress.jobs.plan_search import find_plan, tables
from hf_evopress.methods.compose import normalize
from hf_evopress.plans.plan import Plan
from hf_evopress.recipes.recipe import Recipe
from hf_evopress.scoring.evaluate import Report, compare_many
from hf_evopress.store.level_store import LevelStore


def main() -> None:
    words = arguments()
    if words.probes_only:
        print_probes(words)
        return
    job = job_of(words, words.bits[1])
    store = build_levels(job)
    tokens = tokenize_file(words.test, job.tokenizer)

    def measured(plan: Plan) -> Report:
        evaluator = job.evaluator(store)
        functions = {"": lambda ids: evaluator.logits(dict(plan.levels), ids)}
        on = {"window": words.window, "max_windows": words.windows}
        return compare_many(functions, job.model, tokens, **on)[""]

    sparse = job.plan({unit: normalize(words.sparse) for unit in store.units})
    reports = {"sparse": measured(sparse)}
    wanted = reports["sparse"].perplexity

    def ratio(plan: Plan) -> float:
        reports["coded"] = measured(plan)
        found = reports["coded"].perplexity / wanted
        bits = plan.budget["bits_per_weight"]
        print(f"{bits:.4f} bits: {found:.3f} of the perplexity of {words.sparse}", flush=True)
        return found

    def of_bits(bits: float) -> Plan:
        return find_plan(share(job_of(words, bits, words.codes), job), store)

    coded = equal(of_bits, ratio, job, store, words)
    print("| model | stored bits | perplexity | KL (nats) | same top-1 |\n|---|---|---|---|---|")
    for name, report in reports.items():
        stored = {"sparse": sparse, "coded": coded}[name].budget["bits_per_weight"]
        print(
            f"| {name} | {stored:.2f} | {report.perplexity:.2f} | {report.kl_nats:.3f} ± "
            f"{report.kl_standard_error or 0:.3f} | {report.top1_agreement:.1%} |",
            flush=True,
        )
    for name, plan in (("sparse", sparse), ("coded", coded)):
        folder = Path(words.work) / name
        EvoPressExport().save(job.load_model(), plan, store.state, folder, tokenizer=job.tokenizer)
    print_probes(words)


def print_probes(words: argparse.Namespace) -> None:
    """Print each model against the dense one, and the two against one another."""
    sparse, coded = (str(Path(words.work) / name) for name in ("sparse", "coded"))
    for folder, other in ((sparse, words.model), (coded, words.model), (coded, sparse)):
        questions = kick_questions([], limit=words.limit)
        probes = evaluate_model(folder, against=other, questions=questions)["kick"]
        for probe, figures in probes.items():
            print(f"{Path(folder).name} against {Path(other).name}: {probe} {figures}", flush=True)


def equal(
    of_bits: Callable[[float], Plan],
    ratio: Callable[[Plan], float],
    job: Job,
    store: LevelStore,
    words: argparse.Namespace,
) -> Plan:
    """Return a plan of codes whose `ratio` is within `words.within` of 1, the last one measured."""
    low, high = words.bits
    better: Plan | None = None
    while high - low > 5e-3:
        bits = (low + high) / 2
        plan = of_bits(bits)
        found = ratio(plan)
        if abs(found - 1) <= words.within:
            return plan
        if found < 1:
            better = plan
        low, high = (bits, high) if found > 1 else (low, bits)
    if better is None:
        raise SystemExit(f"no plan tried is better than that: look beyond --bits {words.bits}")
    table = tables(job).of("knapsack", store)
    assert table is not None
    losses = {
        (gene.units[0], str(option.level)): loss
        for gene, row in zip(job.space.genes, table, strict=True)
        for option, loss in zip(gene.options, row, strict=True)
    }
    lowest = str(normalize(words.codes[0]))
    chosen = {unit: str(level) for unit, level in better.levels.items()}
    harm = {u: losses[u, lowest] - losses[u, x] for u, x in chosen.items() if x != lowest}
    order = sorted(harm, key=lambda unit: harm[unit])
    few, many = 0, len(order)
    while many - few > 1:
        middle = (few + many) // 2
        plan = job.plan({**better.levels, **dict.fromkeys(order[:middle], lowest)})
        found = ratio(plan)
        if abs(found - 1) <= words.within:
            return plan
        few, many = (few, middle) if found > 1 else (middle, many)
    raise SystemExit(f"no plan of these codes comes within {words.within:.0%}")


def job_of(words: argparse.Namespace, bits: float, levels: list[str] | None = None) -> Job:
    counts = {"calibration": words.calibration, "search": 4, "heldout": 2, "test": 0}
    return Job(
        Recipe.from_dict(
            {
                "model": words.model,
                "work": words.work,
                "budget": {"bits": bits},
                "ends": "dense",
                "levels": levels or [words.sparse, *words.codes],
                "data": {"sources": [words.data], **counts},
                "search": {"strategy": "knapsack"},
            }
        )
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="calibration text")
    parser.add_argument("--test", required=True, help="evaluation text")
    parser.add_argument("--work", required=True)
    parser.add_argument("--sparse", default="sparsegpt:pattern=2:4")
    parser.add_argument(
        "--codes",
        nargs="+",
        default=[f"gptq:bits={bits},group_size=64" for bits in (2, 3, 4)],
    )
    parser.add_argument("--bits", type=float, nargs=2, default=[2.3, 4.3], help="to look between")
    parser.add_argument("--within", type=float, default=0.01, help="of the perplexity")
    parser.add_argument("--calibration", type=int, default=24)
    parser.add_argument("--limit", type=int, help="questions and documents of each kind")
    parser.add_argument("--probes-only", action="store_true", help="of models made before")
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6)
    return parser.parse_args()


if __name__ == "__main__":
    main()
