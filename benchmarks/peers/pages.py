# SPDX-License-Identifier: Apache-2.0
"""Puts tables into the pages that show them, between marks that stay."""

from __future__ import annotations

from pathlib import Path

BEGIN = "<!-- made by python -m benchmarks.peers --report --pages -->\n"
END = "<!-- end of what benchmarks.peers makes -->\n"


def filled(text: str, table: str) -> str:
    """The page with this between its marks."""
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    if not found:
        raise ValueError(f"the page has no lines {BEGIN.strip()!r} and {END.strip()!r} in this order")
    return f"{before}{BEGIN}\n{table}\n\n{END}{after}"


def fill(page: Path, table: str) -> None:
    """Write it."""
    page.write_text(filled(page.read_text(), table))
