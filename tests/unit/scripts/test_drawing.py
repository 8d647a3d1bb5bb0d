# SPDX-License-Identifier: Apache-2.0
"""The architecture drawing is written by hand: its words fit, and do not lie on each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

DRAWING = Path(__file__).parents[3] / "docs" / "images" / "architecture.svg"
SVG = "{http://www.w3.org/2000/svg}"
INHERITED = ("font-size", "font-weight", "text-anchor")
Box = tuple[float, float, float, float]


def texts(node: ElementTree.Element, above: Mapping[str, str]) -> Iterator[tuple[str, Box]]:
    """Each text with its left, top, right and bottom, in the widest of the fonts that the drawing names."""
    style = {**above, **{name: node.attrib[name] for name in INHERITED if name in node.attrib}}
    for child in node:
        if child.tag != f"{SVG}text":
            yield from texts(child, style)
            continue
        own = {**style, **child.attrib, **{k: v for part in child for k, v in part.attrib.items()}}
        words = "".join(child.itertext())
        font = FontProperties(family="DejaVu Sans", weight=own.get("font-weight", "normal"))
        size = float(own["font-size"])
        width = TextPath((0, 0), words, size=size, prop=font).get_extents().width
        left = float(own["x"]) - {"start": 0.0, "middle": 0.5, "end": 1.0}[own.get("text-anchor", "start")] * width
        baseline = float(own["y"])
        yield words, (left, baseline - 0.76 * size, left + width, baseline + 0.24 * size)


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def test_words_fit_and_do_not_lie_on_each_other() -> None:
    root = ElementTree.parse(DRAWING).getroot()
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    found = list(texts(root, {}))
    assert len(found) > 20
    assert [words for words, (x, y, right, bottom) in found if min(x, y) < 0 or right > width or bottom > height] == []
    assert [(a[0], b[0]) for a, b in combinations(found, 2) if overlap(a[1], b[1])] == []


def test_it_can_be_read_on_any_background() -> None:
    root = ElementTree.parse(DRAWING).getroot()
    behind = next(root.iter(f"{SVG}rect"))
    assert (behind.attrib["width"], behind.attrib["height"]) == (root.attrib["width"], root.attrib["height"])
    assert behind.attrib["fill"] == "#ffffff"
