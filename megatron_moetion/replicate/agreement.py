# SPDX-License-Identifier: Apache-2.0
"""How ranks agree on the stable iteration: a bitmask of whole iterations, AND-ed over all ranks. Pure.

A minimum over ranks would be wrong once snapshots can be dropped: one rank may hold {8, 10} and another
{8, 9}. Bit k of the mask stands for iteration ``base - k * step``: set if it is whole. Bit ``WINDOW + k`` is set
once the fate of that snapshot is known, so that all ranks learn of a snapshot that one of them dropped, and free
it, also while no newer one becomes stable.
"""

from __future__ import annotations

from collections.abc import Iterable

WINDOW = 31
"""Snapshots that one mask covers; twice as many bits fit in a signed 64-bit integer."""


def mask_of(whole: Iterable[int], base: int, decided: Iterable[int] = (), step: int = 1) -> int:
    """The bits of the iterations that are whole here and on all replicas, and of those that are whole or dropped.

    ``step`` is the number of iterations between snapshots.
    """
    return _bits(whole, base, step) | _bits(decided, base, step) << WINDOW


def newest_common(mask: int, base: int, step: int = 1) -> int | None:
    """The newest iteration that is whole everywhere, or None."""
    whole = mask & ((1 << WINDOW) - 1)
    return base - step * ((whole & -whole).bit_length() - 1) if whole else None


def fates(mask: int, base: int, known: Iterable[int], step: int = 1) -> dict[int, bool]:
    """Whether each of the ``known`` iterations is whole everywhere, as far as that is settled.

    It is settled if every rank has decided; and up to the newest common one, because replication keeps the order
    of iterations, so what is not whole by then never will be.
    """
    newest = newest_common(mask, base, step)
    found = {}
    for iteration in known:
        bit = _bits([iteration], base, step)
        if mask & bit << WINDOW or (newest is not None and iteration <= newest):
            found[iteration] = bool(mask & bit)
    return found


def _bits(iterations: Iterable[int], base: int, step: int) -> int:
    places = {divmod(base - i, step) for i in iterations}
    return sum(1 << place for place, rest in places if not rest and 0 <= place < WINDOW)
