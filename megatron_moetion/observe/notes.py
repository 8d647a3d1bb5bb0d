# SPDX-License-Identifier: Apache-2.0
"""Trouble that many ranks may have, as a value that can be counted."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = 16
"""Most kinds that ranks tell each other at once."""
TEXT_CHARS = 500
"""Longest text of a note."""


@dataclass(frozen=True, kw_only=True)
class Note:
    """Something that ranks have to say, once a job: how many say it, and the text of the lowest one."""

    ranks: int
    rank: int
    iteration: int
    text: str
