# SPDX-License-Identifier: Apache-2.0
"""What many ranks have to say of a common cause, made one: a count, and the text of the lowest rank."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_moetion.observe.notes import KINDS, Note


def merge_notes(mine: Mapping[str, Note], theirs: Mapping[str, Note]) -> dict[str, Note]:
    """Of two sets of ranks, which have none in common: all that they say. Associative and commutative.

    Of more than ``KINDS`` kinds those that come first in the order of their names stay.
    """
    both = {kind: _both(mine[kind], theirs[kind]) for kind in mine.keys() & theirs.keys()}
    every = {**mine, **theirs, **both}
    return {kind: every[kind] for kind in sorted(every)[:KINDS]}


def _both(mine: Note, theirs: Note) -> Note:
    low = min(mine, theirs, key=lambda note: note.rank)
    return Note(ranks=mine.ranks + theirs.ranks, rank=low.rank, iteration=low.iteration, text=low.text)
