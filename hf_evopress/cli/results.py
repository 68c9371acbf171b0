"""What a compression leaves, printed: heat map, figures, a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .console import console

if TYPE_CHECKING:
    from ..jobs.pipeline import Result


def show_result(result: Result) -> None:
    """Print heat map, figures and a sentence of a model that was made."""
    from ..sharing.cards import exact_bits, refined
    from ..sharing.report import cache_lines, ends_line, heat_map, results_table, widths_line

    drawn = heat_map(result.plan, exact_bits(result.plan), color=console.is_terminal)
    console.print(drawn, markup=False, soft_wrap=True)
    rows = [
        {
            "": row.name,
            "bits/weight": row.bits_per_weight,
            "MB": row.size_bytes / 1e6,
            "perplexity": row.report.perplexity,
            "KL (nats)": row.report.kl_nats,
            "same top-1": row.report.top1_agreement,
            "1 - cosine": row.report.cosine_distance,
        }
        for row in result.rows
    ]
    unused = [k for k in (rows[0] if rows else {}) if not any(_is_there(row[k]) for row in rows)]
    if rows := [{k: v for k, v in row.items() if k not in unused} for row in rows]:
        console.print("\n" + results_table(rows), markup=False, soft_wrap=True)
    if ends := ends_line(result.plan):
        console.print(f"\n{ends}", markup=False)
    if target := result.plan.search.get("for"):
        codes = " (scalar codes, the fastest there)" if target == "cpu" else ""
        console.print(f"levels for {target}{codes}; --for and --family offer others", markup=False)
    if widths := widths_line(result.plan):
        console.print(f"\n{widths}", markup=False)
    if caches := cache_lines(result.plan):
        console.print(f"\n{caches}", markup=False)
    for notes in refined(result.plan.results):
        kept = "" if notes["is_kept"] else ", not kept"
        console.print(
            f"\nRefined ({notes['mode']}): {notes['fitness']} on held-out text "
            f"{notes['before']:.4f} -> {notes['after']:.4f}{kept}",
            markup=False,
        )
    if result.sample:
        console.print(f"\nIt says: {result.sample}", markup=False)
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.seconds.items())
    if result.gguf is not None:
        from ..models.size import stored_bytes

        told = f"\nThe GGUF file of {stored_bytes(result.gguf) / 1e6:.1f} MB is in {result.gguf}"
        console.print(told, markup=False, soft_wrap=True)
    spent = f" ({spent})" if spent else ""
    console.print(f"\nModel, plan, recipe, heat map are in {result.folder}{spent}", markup=False)


def _is_there(value: Any) -> bool:
    return value is not None and value == value  # NaN: of a model that writes no text
