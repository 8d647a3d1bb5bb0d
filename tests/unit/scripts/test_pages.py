# SPDX-License-Identifier: Apache-2.0
"""Pages lead where they say, and figures on them are those that were measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import costs
import pytest

ROOT = Path(__file__).parents[3]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md"), costs.RESULTS / "README.md"]
)
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(FENCED.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of each link that does not leave the repository."""
    for target in LINK.findall(FENCED.sub("", page.read_text())):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    dead = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(f"{path}#{anchor}")
    assert dead == []


def test_readme_says_who_reads_what() -> None:
    shown = {(ROOT / path).resolve() for path, _ in links(ROOT / "README.md")}
    assert set((ROOT / "docs").glob("*.md")) - shown == set()


def test_what_it_costs_is_what_was_measured() -> None:
    page = costs.PAGE.read_text()
    assert page == costs.written(page), "run scripts/costs.py"


def test_a_figure_that_is_not_there_is_not_made_up() -> None:
    assert costs.ratio({}, "middle", "ends", 0.0) == "not measured"
    with pytest.raises(AssertionError, match="seconds was not measured"):
        costs.value({"seconds": None}, "seconds")
