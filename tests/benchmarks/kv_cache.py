"""What GEAR does to the key-value cache: KL and perplexity of a text read through it, and bytes.

python tests/benchmarks/kv_cache.py MODEL --test wiki.test.raw --windows 2
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from hf_evopress import GearCache
from hf_evopress.adapters.by_name import load, tokenizer_of
from hf_evopress.calibration.data import tokenize_file
from hf_evopress.scoring.cached import through_cache
from hf_evopress.scoring.evaluate import compare_many

PLAIN = {"rank": 0, "outliers": 0.0}
ROWS: dict[str, dict[str, Any]] = {
    "plain groups, 8 bits": {"bits": 8, **PLAIN},
    "plain groups, 4 bits": {"bits": 4, **PLAIN},
    "GEAR, 4 bits": {"bits": 4},
    "plain groups, 3 bits": {"bits": 3, **PLAIN},
    "GEAR, 3 bits": {"bits": 3},
    "plain groups, 2 bits": {"bits": 2, **PLAIN},
    "plain groups, 2 bits, groups of 16": {"bits": 2, "group_size": 16, **PLAIN},
    "low rank only, 2 bits": {"bits": 2, "outliers": 0.0},
    "outliers only, 2 bits": {"bits": 2, "rank": 0},
    "GEAR, 2 bits, rank 2": {"bits": 2, "rank": 2},
    "GEAR, 2 bits": {"bits": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--test", required=True)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--step", type=int, default=64, help="tokens read at once")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), help="some of the rows")
    said = parser.parse_args()
    model = load(said.model)
    tokens = tokenize_file(said.test, tokenizer_of(said.model))
    made: dict[str, GearCache] = {}

    def fresh(name: str, settings: dict[str, Any]) -> GearCache:
        made[name] = GearCache(model.config, **settings)
        return made[name]

    dense = through_cache(model, lambda: GearCache(model.config, bits=16), step=said.step)
    models = {
        name: through_cache(model, partial(fresh, name, ROWS[name]), step=said.step)
        for name in said.rows
    }
    reports = compare_many(models, dense, tokens, window=said.window, max_windows=said.windows)
    print("| cache | MB | KL (nats) | perplexity | above full |")
    print("|---|---|---|---|---|")
    full = next(iter(reports.values())).dense_perplexity
    size = GearCache.bytes_at(model.config, said.window, bits=16)  # in 16 bits
    print(f"| full, 16 bits | {size / 1e6:.1f} | 0 | {full:.3f} | |")
    for name, report in reports.items():
        print(
            f"| {name} | {made[name].nbytes / 1e6:.1f} | {report.kl_nats:.5f} "
            f"| {report.perplexity:.3f} | {report.perplexity / full - 1:+.2%} |"
        )


if __name__ == "__main__":
    main()
