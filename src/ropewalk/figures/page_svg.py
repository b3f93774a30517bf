"""Panels as SVG for a web page: its own ink, legend entries that hide, and a word for every mark."""

from __future__ import annotations

import io
import re
from itertools import count
from xml.etree import ElementTree

from matplotlib.artist import Artist
from matplotlib.figure import Figure as Drawing

from ropewalk.figures.figure import Figure, Panel, settle
from ropewalk.figures.style import GREY, GRID, INK, PAGE, SHADE, TIPS, house

SVG, LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
POINTS, LARGEST = 96 / 72, 1.22  # pixels in a point; how far a panel may grow beyond the size it is drawn at
# Ink of the figures -> the page's own for light, dark and paper.
VARIABLES = {INK: "--ink", GREY: "--muted", GRID: "--grid", SHADE: "--shade", PAGE: "--page"}
MARK = "mark "
DRAWN = {f"{{{SVG}}}use", f"{{{SVG}}}path"}


def panel_svg(figure: Figure, panel: Panel, prefix: str) -> str:
    """One panel as an ``<svg>`` element.

    Text stays text, in the page's font. What belongs to a run or method of the legend is a group with
    ``data-series``, and a mark with a tip holds a ``<title>``.

    Args:
        figure: the panel's.
        panel: to draw.
        prefix: of the ids, one of its own for every panel of a page.
    """
    with house({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        drawing = Drawing(figsize=figure.size, layout="constrained")
        panel.draw(drawing.subplots())
        settle(drawing)
        marks = _name_marks(drawing, set(figure.styles))
        file = io.StringIO()
        drawing.savefig(file, format="svg", metadata={"Date": None}, transparent=True)
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", LINK)
    root = ElementTree.fromstring(file.getvalue())
    for metadata in root.findall(f"{{{SVG}}}metadata"):
        root.remove(metadata)
    for node in root.iter():
        _dress(node)
    for node in [node for node in root.iter() if node.get("id", "").startswith(MARK)]:
        _apply(node, *marks[node.attrib.pop("id")])
    _shorten_ids(root, prefix)
    width = float(root.attrib.pop("width").removesuffix("pt")) * POINTS
    del root.attrib["height"]
    root.set("role", "img")
    root.set("aria-label", panel.title or figure.title)
    root.set("style", f"max-width: {width * LARGEST:.0f}px")
    return ElementTree.tostring(root, encoding="unicode")


def _name_marks(drawing: Drawing, series: set[str]) -> dict[str, tuple[str | None, tuple[str, ...]]]:
    """Give an id to every artist that belongs to a series or has tips; id -> (series or None, tips)."""
    marks: dict[str, tuple[str | None, tuple[str, ...]]] = {}
    numbers = count()
    for artist in drawing.findobj(Artist):
        name = artist.get_label()
        of = str(name) if name in series else None
        if of is not None or artist in TIPS:
            artist.set_gid(f"{MARK}{next(numbers)}")
            marks[str(artist.get_gid())] = (of, TIPS.get(artist, ()))
    return marks


def _dress(node: ElementTree.Element) -> None:
    """Take ink and font from the page."""
    style = node.get("style")
    if style is None:
        return
    for color, variable in VARIABLES.items():
        style = style.replace(color, f"var({variable})")
    style = re.sub(r"font: (?:\w+ )*([\d.]+px) [^;]+", r"font-size: \1", style)
    node.set("style", re.sub(r"font-family: [^;]+;? ?", "", style))


def _apply(node: ElementTree.Element, series: str | None, tips: tuple[str, ...]) -> None:
    if series is not None:
        node.set("data-series", series)
    hidden = {child for defs in node.iter(f"{{{SVG}}}defs") for child in defs.iter()}
    drawn = [child for child in node.iter() if child.tag in DRAWN and child not in hidden]
    drawn = drawn[-len(tips) :] if tips else []  # before its markers comes a line
    for child, tip in zip(drawn, tips, strict=True):
        ElementTree.SubElement(child, f"{{{SVG}}}title").text = tip


def _shorten_ids(root: ElementTree.Element, prefix: str) -> None:
    """Keep the ids that something refers to, short and the panel's own; drop the others."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = dict.fromkeys(re.findall(r'(?:url\(#|href="#)([^")]+)', text))
    short = {name: f"{prefix}-{number}" for number, name in enumerate(used)}
    for node in root.iter():
        if (name := node.get("id")) is not None:
            if name in short:
                node.set("id", short[name])
            else:
                del node.attrib["id"]
        for key, value in list(node.attrib.items()):
            if key == f"{{{LINK}}}href":
                node.set(key, f"#{short[value.removeprefix('#')]}")
            elif value.startswith("url(#"):
                node.set(key, f"url(#{short[value[5:-1]]})")
