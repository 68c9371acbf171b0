"""The HTML report: one safe page that says what is known and nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hf_evopress import Plan
from hf_evopress.sharing.html_report import report_html, write_report

ROW = {"bits_per_weight": 3.29, "size_bytes": 100_600_000, "perplexity": 23.3, "kl_nats": 0.4617}


def plan(**about: Any) -> Plan:
    levels = {
        f"model.layers.{i}.{kind}": f"rtn:bits={2 + i % 4},group_size=32"
        for i in range(6)
        for kind in ("self_attn.q_proj", "mlp.up_proj")
    }
    return Plan(levels, dict.fromkeys(levels, (64, 64)), **about)


class Tags(HTMLParser):
    """Collects tags and checks that they are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_self_contained() -> None:
    history = [{"generation": i, "loss": 1 / (i + 1)} for i in range(4)]
    page = Tags(report_html(plan(search={"history": history}), name="me/x"))
    assert not page.open
    assert "script" not in {tag for tag, _ in page.seen}
    links = [v for _, attrs in page.seen for k, v in attrs.items() if k in ("src", "href")]
    assert len(links) == 1 and str(links[0]).startswith("data:image/svg+xml;base64,")


def test_the_page_shows_measured_figures_and_leaves_out_others() -> None:
    page = report_html(plan(results={"evaluation": {"searched": ROW}}), name="x")
    assert "0.4617" in page and "this model" in page and "101 MB" in page
    assert "Measured" not in report_html(plan(), name="x")


def test_every_cell_of_the_heat_map_has_readable_ink() -> None:
    cells = re.findall(r"background:#(\w{6});color:(#\w{3})", report_html(plan(), name="x"))
    assert len(cells) == 12 + 5  # the map and its legend
    for ground, ink in cells:
        assert _contrast(ground, ink) >= 4.5, ground  # WCAG 2.1 AA


def _contrast(ground: str, ink: str) -> float:
    def luminance(rgb: list[float]) -> float:
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    back = luminance([int(ground[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    front = luminance([int(c * 2, 16) / 255 for c in ink[1:]])
    return (max(back, front) + 0.05) / (min(back, front) + 0.05)


def test_markup_in_a_plan_is_text() -> None:
    hostile = plan(
        base_model="<img src=x onerror=alert(1)>",
        search={"note": "<script>alert(1)</script>"},
        results={"evaluation": {"<b>bold</b>": ROW}},
    )
    page = report_html(hostile, name="</title><script>")
    assert "<script" not in page and "<img src=x" not in page and "<b>bold" not in page


def test_a_report_is_written_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()
    plan().save(tmp_path / "small")
    (tmp_path / "small" / "evopress_recipe.yaml").write_text("model: me/x\nbudget: {bits: 3}\n")
    path = write_report("small")
    assert path.name == "small.report.html"
    assert "model: me/x" in path.read_text(encoding="utf-8")


def test_a_plan_of_whole_blocks_has_a_report() -> None:
    assert "drop" in report_html(Plan({"model.layers.1.self_attn": "drop"}), name="x")
