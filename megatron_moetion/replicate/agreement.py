# SPDX-License-Identifier: Apache-2.0
"""How ranks agree on the stable iteration: a bitmask of whole iterations, AND-ed over all ranks.

A minimum over ranks would be wrong once snapshots can be dropped: one rank may hold {8, 10} and another
{8, 9}. Bits stand for snapshots in the order in which they were begun, which is the same on all ranks, and not for
iterations: however far apart those are, the last ``WINDOW`` snapshots can be agreed on. Bit k is the k-th newest one:
set if it is whole. Bit ``WINDOW + k`` is set once the fate of that snapshot is known, so that all ranks learn of a
snapshot that one of them dropped, and free it, also while no newer one becomes stable.

``recent`` below are the iterations of the last snapshots, the newest first; those beyond ``WINDOW`` are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_moetion.replicate.channel import Fabric

WINDOW = 31
"""Snapshots that one mask covers; twice as many bits fit in a signed 64-bit integer."""


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """The result of an agreement, one snapshot old. Equal on all ranks, except for ``totals``."""

    stable: int
    recoverable: Mapping[int, bool]
    """Of each iteration whose fate has been settled by now: whether all ranks can recover it."""
    whole: Mapping[int, bool]
    """Of the same iterations: whether their snapshots are whole on all ranks, at least."""
    votes: int
    """The AND of all ranks' votes."""
    totals: Sequence[int]
    """Token counts summed over the ranks that share this rank's experts."""
    is_news: bool
    """Whether anything has been settled, or ``stable`` has moved."""


class Agreement:
    """One rank's knowledge of the stable iteration, and its words to the others. Used by the training thread."""

    def __init__(self, fabric: Fabric, iteration: int) -> None:
        self._fabric = fabric
        self._recent = [iteration]
        self._open: set[int] = set()
        self.stable = iteration
        """The newest iteration that is whole on every rank and its replicas, as far as is known here."""
        self.failed: str | None = None
        """Why ranks cannot agree any more: this rank is out of step with the others for good."""

    @property
    def newest(self) -> int:
        """The iteration of the last snapshot."""
        return self._recent[0]

    def finish(self) -> Agreed | None:
        """The result of the last ``start``; None before the first one. ``ChannelError`` on a lost peer."""
        totals = self._fabric.finish_sum()
        found = self._fabric.finish_agreement()
        if totals is None or found is None:
            return None
        mask, votes, whole_mask = found
        recoverable = fates(mask, self._recent, self._open)
        newest = newest_common(mask, self._recent)
        stable = max(self.stable, -1 if newest is None else newest)
        is_news = stable != self.stable or bool(recoverable)
        self.stable = stable
        self._open -= recoverable.keys()
        return Agreed(
            stable=stable,
            recoverable=recoverable,
            whole=fates(whole_mask, self._recent, recoverable),
            votes=votes,
            totals=totals,
            is_news=is_news,
        )

    def start(
        self,
        iteration: int,
        *,
        rounds: Mapping[int, bool],
        recoverable: Iterable[int],
        vote: int,
        counts: Sequence[int],
    ) -> None:
        """Begin to agree, at the snapshot of ``iteration``. ``ChannelError`` on a lost peer.

        ``rounds``: whether recent snapshots are whole here and on all replicas; ``recoverable``: the iterations that
        this rank can recover; ``counts``: tokens by expert, to be summed.
        """
        self._fabric.start_sum(counts)
        self._recent = [iteration, *self._recent][:WINDOW]
        whole = [i for i, is_whole in rounds.items() if is_whole]
        self._fabric.start_agreement(
            mask_of(recoverable, self._recent, rounds), vote, mask_of(whole, self._recent, rounds)
        )
        self._open.add(iteration)

    def fail(self, why: str) -> None:
        """Nothing can be agreed on from now on."""
        self.failed = why


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
