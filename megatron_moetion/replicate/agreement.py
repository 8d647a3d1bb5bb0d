# SPDX-License-Identifier: Apache-2.0
"""How ranks agree on the stable iteration: a bitmask of whole iterations, AND-ed over all ranks. Pure.

A minimum over ranks would be wrong once snapshots can be dropped: one rank may hold {8, 10} and another
{8, 9}. Bits stand for snapshots in the order in which they were begun, which is the same on all ranks, and not for
iterations: however far apart those are, the last ``WINDOW`` snapshots can be agreed on. Bit k is the k-th newest one:
set if it is whole. Bit ``WINDOW + k`` is set once the fate of that snapshot is known, so that all ranks learn of a
snapshot that one of them dropped, and free it, also while no newer one becomes stable.

``recent`` below are the iterations of the last snapshots, the newest first; what is beyond ``WINDOW`` is ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WINDOW = 31
"""Snapshots that one mask covers; twice as many bits fit in a signed 64-bit integer."""


def mask_of(whole: Iterable[int], recent: Sequence[int], decided: Iterable[int] = ()) -> int:
    """The bits of the iterations that are whole here and on all replicas, and of those that are whole or dropped."""
    return _bits(whole, recent) | _bits(decided, recent) << WINDOW


def newest_common(mask: int, recent: Sequence[int]) -> int | None:
    """The newest iteration that is whole everywhere, or None."""
    return next((iteration for k, iteration in enumerate(recent[:WINDOW]) if mask >> k & 1), None)


def fates(mask: int, recent: Sequence[int], known: Iterable[int]) -> dict[int, bool]:
    """Whether each of the ``known`` iterations is whole everywhere, as far as that is settled.

    It is settled if every rank has decided; and up to the newest common one, because replication keeps the order
    of iterations, so what is not whole by then never will be. What is no longer among the last ``WINDOW`` cannot be
    agreed on any more: it counts as dropped.
    """
    newest = newest_common(mask, recent)
    places = {iteration: k for k, iteration in enumerate(recent[:WINDOW])}
    found = {}
    for iteration in known:
        place = places.get(iteration)
        if place is None:
            if iteration < recent[0]:
                found[iteration] = False
        elif mask >> (WINDOW + place) & 1 or (newest is not None and iteration <= newest):
            found[iteration] = bool(mask >> place & 1)
    return found


def _bits(iterations: Iterable[int], recent: Sequence[int]) -> int:
    among = set(iterations)
    return sum(1 << k for k, iteration in enumerate(recent[:WINDOW]) if iteration in among)
