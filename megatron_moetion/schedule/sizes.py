# SPDX-License-Identifier: Apache-2.0
"""The size of this rank's next snapshot. Pure.

Snapshots that do not fit the idle windows become smaller, then rarer. All ranks move alike, because each moves to the
size that all have agreed on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

RARER = (8, 4, 2)
LEVELS = 16
"""Sizes that a snapshot can take, on every rank alike: ``RARER`` ones, then from the fewest to the most experts."""


SnapshotBytes = Callable[[int], float]
"""Bytes of a snapshot, by its number of experts."""


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One size that snapshots can have: ``experts`` of a rank in every ``every``-th snapshot."""

    experts: int
    every: int

    def bytes_an_iteration(self, snapshot_bytes: SnapshotBytes) -> float:
        """What one iteration must carry on average."""
        return snapshot_bytes(self.experts) / self.every


def ladder(experts_min: int, experts_max: int) -> tuple[Rung, ...]:
    """``LEVELS`` sizes, smallest first: rarer snapshots at the bottom, then more and more experts in each one.

    Ranks that share experts have the same ladder; all ranks have the same ``every`` at each level.
    """
    steps = LEVELS - len(RARER) - 1
    counts = [experts_min + round(i * (experts_max - experts_min) / steps) for i in range(steps + 1)]
    rarer = [Rung(experts=experts_min, every=every) for every in RARER]
    return (*rarer, *(Rung(experts=k, every=1) for k in counts))


def affordable(rungs: Sequence[Rung], capacity_bytes: float, snapshot_bytes: SnapshotBytes) -> int:
    """The highest level whose bytes fit the capacity of an iteration; the lowest one if none does."""
    fits = [i for i, r in enumerate(rungs) if r.bytes_an_iteration(snapshot_bytes) <= capacity_bytes]
    return max(fits, default=0)


def next_level(now: int, wanted: int) -> int:
    """A quarter of the way to what is wanted, at least one level: sizes move smoothly when measurements jump."""
    step = max(1, abs(wanted - now) // 4)
    return now + min(step, wanted - now) if wanted > now else now - min(step, now - wanted)


def vote(level: int) -> int:
    """A level as a bitmask; the AND of all ranks' votes is the vote for the lowest level among them."""
    return (1 << (level + 1)) - 1


def level_of(votes: int) -> int:
    """The level that a mask of votes stands for."""
    return votes.bit_length() - 1


class Sizes:
    """Between the fewest experts that keep the staleness cap and the most that the arena has room for, or rarer."""

    def __init__(self, experts_min: int, experts_max: int) -> None:
        self._rungs = ladder(experts_min, experts_max)
        self._level = len(self._rungs) - 1

    @property
    def now(self) -> Rung:
        """The size of the next snapshot."""
        return self._rungs[self._level]

    @property
    def experts_text(self) -> str:
        """How many experts a snapshot may have, for a person."""
        fewest, most = self._rungs[0].experts, self._rungs[-1].experts
        return str(most) if fewest == most else f"{fewest} to {most}"

    def vote(self, carried_bytes: float, snapshot_bytes: SnapshotBytes) -> tuple[int, str | None]:
        """This rank's vote, and how much smaller than the largest its snapshots are to be; None: they are not.

        ``carried_bytes``: what an iteration's windows carry; see ``Scheduler.carries``.
        """
        level = affordable(self._rungs, carried_bytes, snapshot_bytes)
        if level == len(self._rungs) - 1:
            return vote(level), None
        rung = self._rungs[level]
        return vote(level), f"{rung.experts} experts" if rung.every == 1 else f"one in {rung.every} snapshots"

    def agree(self, votes: int) -> None:
        """Move towards the size that all ranks can afford; ``votes`` is the AND of all votes."""
        self._level = next_level(self._level, level_of(votes))

    def skips(self, snapshot: int) -> bool:
        """Whether a snapshot is left out, because they are made rarer.

        ``snapshot`` is its iteration, counted in intervals between snapshots: so all ranks leave out the same ones,
        whenever each of them began to.
        """
        return snapshot % self.now.every != 0
