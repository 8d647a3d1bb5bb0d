# SPDX-License-Identifier: Apache-2.0
"""Who combines with whom: node by node, then a tree over the leaders of nodes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

ARITY = 4
"""Leaders of other nodes below a leader, at most."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One rank's place in a tree. What is below each child, and below itself, are neighbouring members."""

    parent: int | None
    """None at the root."""
    children: tuple[int, ...]
    """In ascending order: the other ranks of the node, then leaders of other nodes."""


def place_of(rank: int, members: Sequence[int], ranks_per_host: int, arity: int = ARITY) -> Place:
    """The place of ``rank``, one of ``members`` (in any order), where ranks r and s with r // ranks_per_host ==
    s // ranks_per_host are on one node. The lowest rank of a node leads it, and the lowest of all is the root.

    Every parent is lower than its children. O(members) time.
    """
    nodes = [list(group) for _, group in groupby(sorted(set(members)), key=lambda r: r // ranks_per_host)]
    mine = next(node for node in nodes if rank in node)
    leaders = [node[0] for node in nodes]
    if rank != mine[0]:
        return Place(parent=mine[0], children=())
    parent, below = _descend(leaders.index(rank), len(leaders), arity)
    return Place(
        parent=None if parent is None else leaders[parent],
        children=(*mine[1:], *(leaders[child] for child in below)),
    )


def depth_of(num_nodes: int, arity: int = ARITY) -> int:
    """Most steps from a leader to the root."""
    depth = 0
    while num_nodes > 1:
        num_nodes = -(-(num_nodes - 1) // arity)
        depth += 1
    return depth


def _descend(index: int, num: int, arity: int) -> tuple[int | None, list[int]]:
    """Parent and children of the n-th of ``num``: the first of a span leads it, the rest is cut into parts."""
    parent, start, stop = None, 0, num
    while index != start:
        parent = start
        start, stop = next((a, b) for a, b in _parts(start + 1, stop, arity) if a <= index < b)
    return parent, [a for a, _ in _parts(start + 1, stop, arity)]


def _parts(start: int, stop: int, arity: int) -> list[tuple[int, int]]:
    """A span cut into at most ``arity`` parts that differ by one at most, the larger first."""
    num = min(arity, stop - start)
    if num <= 0:
        return []
    size, extra = divmod(stop - start, num)
    cuts = [start + k * size + min(k, extra) for k in range(num + 1)]
    return list(pairwise(cuts))
