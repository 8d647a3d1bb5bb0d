# SPDX-License-Identifier: Apache-2.0
"""How ranks agree on the stable iteration: a bitmask of whole iterations, AND-ed over all ranks. Pure.

A minimum over ranks would be wrong once snapshots can be dropped: one rank may hold {8, 10} and another
{8, 9}. Bit k of the mask stands for iteration ``base - k``.
"""

from __future__ import annotations

from collections.abc import Iterable

WINDOW = 63
"""Iterations that one mask covers (63, so that it is never negative)."""


def mask_of(whole: Iterable[int], base: int) -> int:
    """The bits of the iterations that are whole here and on all replicas."""
    return sum(1 << (base - i) for i in set(whole) if 0 <= base - i < WINDOW)


def newest_common(mask: int, base: int) -> int | None:
    """The newest iteration that is whole everywhere, or None."""
    return base - ((mask & -mask).bit_length() - 1) if mask else None


def fates(mask: int, base: int, known: Iterable[int]) -> dict[int, bool]:
    """Which of the ``known`` iterations up to the newest common one are whole everywhere.

    Replication keeps the order of iterations, so what is not whole by then never will be.
    """
    newest = newest_common(mask, base)
    if newest is None:
        return {}
    return {i: base - i < WINDOW and bool(mask >> (base - i) & 1) for i in known if i <= newest}
