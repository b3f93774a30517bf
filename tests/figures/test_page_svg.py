"""A panel as the page holds it: its own ink, groups that hide, a title for every mark, no name that ends a tag."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pandas as pd
import pytest
from figures.drawings import LENGTHS, sample_spectra

from ropewalk.figures.figure import Figure, Panel
from ropewalk.figures.needle_grid import needle_figures
from ropewalk.figures.page_svg import panel_svg
from ropewalk.figures.spectrum.spectra import coverage_figure, spectra_figure
from ropewalk.figures.style import draw_curve, method_styles

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = '<b>x</b> & "q" </script><script src="http://e.example/a.js"> $5$'


def curve_panel(name: str) -> tuple[Figure, Panel]:
    styles = method_styles([name, "other"])
    rows = pd.DataFrame({"x": [1.0, 2.0, 3.0], "value": [2.0, 1.0, 0.5]}).assign(ci_low=0.1, ci_high=3.0)

    def draw(axes) -> None:
        draw_curve(axes, name, styles[name], rows, ["first", "second", "third"])

    panel = Panel(draw, "A panel")
    return Figure("f", "A figure", [[panel]], styles=styles), panel


def titles(root: ElementTree.Element) -> list[str]:
    return [title.text or "" for title in root.iter(f"{SVG}title")]


def test_every_mark_has_its_words_and_belongs_to_its_run() -> None:
    root = ElementTree.fromstring(panel_svg(*curve_panel("rope"), "p1"))
    assert titles(root) == ["rope: first", "rope: second", "rope: third"]
    groups = [node for node in root.iter() if node.get("data-series") == "rope"]
    assert len(groups) == 2  # the band and the line
    assert {parent.tag for parent in root.iter() if parent.find(f"{SVG}title") is not None} == {f"{SVG}use"}


def test_ink_is_the_pages_and_data_keeps_its_colour() -> None:
    svg = panel_svg(*curve_panel("rope"), "p1")
    assert {"var(--muted)", "var(--grid)"} <= set(re.findall(r"var\(--\w+\)", svg))
    assert "#6e6e6e" not in svg
    assert "#e6e6e6" not in svg
    assert "#0072b2" in svg
    assert "DejaVu" not in svg


def test_text_from_data_stays_text() -> None:
    svg = panel_svg(*curve_panel(HOSTILE), "p1")
    root = ElementTree.fromstring(svg)
    assert not {"script", "b"} & {node.tag.removeprefix(SVG) for node in root.iter()}
    assert titles(root)[0] == f"{HOSTILE}: first"
    assert "<script" not in svg
    assert "</script" not in svg


def test_ids_are_the_panels_own_and_all_of_them_are_used() -> None:
    first, second = (ElementTree.fromstring(panel_svg(*curve_panel("rope"), prefix)) for prefix in ("p1", "p2"))
    ids = [{node.get("id") for node in root.iter() if node.get("id")} for root in (first, second)]
    assert not ids[0] & ids[1]
    for root, own in zip((first, second), ids, strict=True):
        text = ElementTree.tostring(root, encoding="unicode")
        used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
        assert used == own


def test_cells_and_bars_have_words_too() -> None:
    rows = [("a", "exact_match", length, depth, 0.5, 4) for length in (512, 1024) for depth in (0.0, 1.0)]
    cells = pd.DataFrame(rows, columns=["run", "metric", "context_length", "depth", "value", "n"])
    pooled = pd.DataFrame(
        [("a", "exact_match", 0.5, 0.0, 0.1, False)],
        columns=["run", "metric", "value", "control", "error", "at_chance"],
    )
    (grid,) = needle_figures(cells, pooled, {"a": 512})
    words = titles(ElementTree.fromstring(panel_svg(grid, grid.panels[0], "p1")))
    assert words[:2] == ["512 tokens, depth 0%: 0.500, n=4", "1,024 tokens, depth 0%: 0.500, n=4"]
    assert len(words) == 4
    bars = coverage_figure({"rope": sample_spectra()["rope"]}, **LENGTHS)
    words = titles(ElementTree.fromstring(panel_svg(bars, bars.panels[0], "p1")))
    assert len(words) == 64
    assert words[63].startswith("rope: pair 63, 75.0% of its phases")


@pytest.mark.parametrize("name", ["rope", "hardclip20", "cope20"])
def test_a_spectrum_has_words_for_turning_and_stopped_pairs(name: str) -> None:
    figure = spectra_figure({name: sample_spectra()[name]}, **LENGTHS)
    words = titles(ElementTree.fromstring(panel_svg(figure, figure.panels[0], "p1")))
    assert len(words) == 64
    stopped = {"rope": 0, "hardclip20": 20, "cope20": 1}[name]
    assert sum("does not rotate" in text for text in words) == stopped
