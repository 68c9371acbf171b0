"""Pictures for README, cards and papers: heat map of a plan, convergence, size against loss.

matplotlib is imported inside the functions; no window is ever opened. The ending of `path`
chooses the format: .png, .svg or .pdf. The same input gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.resources import atomic_path
from ..base.target import check_file
from ..plans.plan import Plan
from .report import grid

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")

# Okabe and Ito's palette without yellow: told apart with any colour vision.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARK = "hf_evopress"  # in the metadata of every picture
_MARKERS = "osD^vP*"
_INK = "#222222"


def heat_map_plot(
    plan: Plan,
    path: str | Path,
    bits: Mapping[str, float] | None = None,
    *,
    title: str | None = None,
) -> Path:
    """Draw stored bits per weight, blocks by kinds, to `path` and return it.

    `bits` as in `report.grid`.
    """
    path = check_picture(path)
    shown = grid(plan, bits)
    low, high = shown.span
    long_labels = max(map(len, shown.labels)) > 6
    below = 0.06 * max(map(len, shown.labels)) if long_labels else 0.0  # they stand upright
    figure = _figure(2.2 + 0.62 * len(shown.kinds), 1.5 + below + 0.21 * len(shown.blocks))
    axes = figure.add_subplot()
    nothing = float("nan")
    values = [[shown.cells.get((b, k), nothing) for k in shown.kinds] for b in shown.blocks]
    image = axes.imshow(values, cmap="cividis", vmin=low, vmax=high, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:  # not NaN: this block has this kind
                ink = "white" if (value - low) / (high - low) < 0.5 else "black"
                axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)
    axes.set_xticks(
        range(len(shown.kinds)),
        [f"{n}\n{m:.2f}" for n, m in zip(shown.labels, shown.column_means, strict=True)],
        rotation=90 if long_labels else 0,
        fontsize=8,
    )
    axes.set_yticks(range(len(shown.blocks)), [str(b) for b in shown.blocks], fontsize=7)
    axes.set_xlabel("unit, with its mean", fontsize=8)
    axes.set_ylabel("decoder block", fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.03)
    named = "stored bits per weight" if bits is not None else "bits named by the level"
    bar.set_label(f"{named}, mean {shown.mean:.2f}", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    if title:
        axes.set_title(title, fontsize=9, loc="left")
    return _save(figure, path)


def convergence_plot(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    references: Mapping[str, float] | None = None,
    loss_name: str = "KL per token (nats)",
) -> Path:
    """Draw the loss of the best plan per generation to `path` and return it.

    `history` rows have `generation` and `loss`; `references` are losses to draw as lines
    across, such as {"uniform 3 bits": 0.59}.
    """
    path = check_picture(path)
    if not history:
        raise ValueError("the search has no generations yet; there is nothing to draw")
    missing = [i for i, row in enumerate(history) if not {"generation", "loss"} <= set(row)]
    if missing:
        raise ValueError(f"row {missing[0]} of the history lacks 'generation' or 'loss'")
    figure = _figure(5.4, 3.4)
    axes = figure.add_subplot()
    x = [row["generation"] for row in history]
    axes.step(x, [row["loss"] for row in history], where="post", color=_COLORS[0], lw=1.8)
    for i, (name, loss) in enumerate((references or {}).items(), start=1):
        color = _COLORS[i % len(_COLORS)]
        axes.axhline(loss, color=color, lw=1.2, ls="--")
        axes.annotate(
            name,
            (1, loss),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
            color=color,
        )
    _label(axes, "generation", loss_name)
    return _save(figure, path)


def pareto_plot(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    size_name: str = "stored bits per weight",
    loss_name: str = "KL per token (nats)",
) -> Path:
    """Draw loss against size, one line per series of (size, loss), to `path` and return it."""
    from matplotlib.ticker import LogLocator

    path = check_picture(path)
    if not series or not all(series.values()):
        empty = [name for name, points in series.items() if not points]
        raise ValueError(f"each series needs points; empty: {', '.join(empty) or 'all'}")
    figure = _figure(5.4, 3.8)
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(series.items()):
        x, y = zip(*sorted(points), strict=True)
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        axes.plot(x, y, color=color, marker=marker, ms=5, lw=1.6, label=name)
    if all(loss > 0 for points in series.values() for _, loss in points):
        axes.set_yscale("log")
        axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(which="minor", labelsize=7)
    _label(axes, size_name, loss_name)
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def speed_plot(series: Mapping[str, Mapping[int, float]], path: str | Path) -> Path:
    """Draw tokens per second by batch size, a bar per model, to `path` and return it."""
    path = check_picture(path)
    batches = sorted({batch for points in series.values() for batch in points})
    if not batches:
        raise ValueError(f"each series needs points; empty: {', '.join(series) or 'all'}")
    figure = _figure(5.4, 3.4)
    axes = figure.add_subplot()
    width = 0.8 / len(series)
    for i, (name, points) in enumerate(series.items()):
        x = [place - 0.4 + (i + 0.5) * width for place in range(len(batches))]
        y = [points.get(batch, 0.0) for batch in batches]
        axes.bar(x, y, width * 0.92, color=_COLORS[i % len(_COLORS)], label=name)
        for at, value in zip(x, y, strict=True):
            axes.annotate(f"{value:.3g}", (at, value), ha="center", va="bottom", fontsize=7)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    _label(axes, "sequences at once", "tokens per second")
    axes.legend(frameon=False, fontsize=8)
    return _save(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=_INK)
    axes.set_ylabel(y, fontsize=9, color=_INK)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", which="both", lw=0.4, color="#dddddd")
    axes.set_axisbelow(True)


def check_picture(path: str | Path) -> Path:
    if Path(path).suffix.lower() not in FORMATS:
        raise ValueError(f"a picture ends in {', '.join(FORMATS)}; got {path}")
    check_file(path, _MARK.encode())
    return Path(path)


def _save(figure: Figure, path: Path) -> Path:
    import matplotlib

    kind = path.suffix.lower()[1:]
    # no dates and no random ids: the same plan draws the same file
    stamp = {
        "png": {"Software": _MARK},
        "svg": {"Creator": _MARK, "Date": None},
        "pdf": {"Creator": _MARK, "CreationDate": None},
    }[kind]
    with matplotlib.rc_context({"svg.hashsalt": "hf-evopress"}), atomic_path(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=160, metadata=stamp)
    return path
