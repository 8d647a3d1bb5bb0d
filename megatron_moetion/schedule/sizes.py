# SPDX-License-Identifier: Apache-2.0
"""The size of this rank's next snapshot. Every rank moves alike, because each moves to what all have agreed on."""

from __future__ import annotations

from megatron_moetion.schedule.planner import Rung, affordable, ladder, level_of, next_level, vote


class Sizes:
    """Between the fewest experts that keep the staleness cap and the most that the arena has room for, or rarer."""

    def __init__(self, experts_min: int, experts_max: int) -> None:
        self._rungs = ladder(experts_min, experts_max)
        self._level = len(self._rungs) - 1
        self._snapshots = 0

    @property
    def now(self) -> Rung:
        """The size of the next snapshot."""
        return self._rungs[self._level]

    @property
    def experts_text(self) -> str:
        """How many experts a snapshot may have, for a person."""
        fewest, most = self._rungs[0].experts, self._rungs[-1].experts
        return str(most) if fewest == most else f"{fewest} to {most}"

    def vote(self, carried_bytes: float, dense_bytes: int, expert_bytes: float) -> tuple[int, str]:
        """This rank's vote, and how much smaller than the largest its snapshots are to be (empty if they are not).

        ``carried_bytes``: what an iteration's windows carry; see ``Scheduler.carries``.
        """
        level = affordable(self._rungs, carried_bytes, dense_bytes, expert_bytes)
        if level == len(self._rungs) - 1:
            return vote(level), ""
        rung = self._rungs[level]
        return vote(level), f"{rung.experts} experts" if rung.every == 1 else f"one in {rung.every} snapshots"

    @property
    def largest(self) -> int:
        """The vote of a rank whose snapshots cannot be smaller or rarer."""
        return vote(len(self._rungs) - 1)

    def agree(self, votes: int) -> None:
        """Move towards the size that all ranks can afford; ``votes`` is the AND of all votes."""
        self._level = next_level(self._level, level_of(votes))

    def skips_next(self) -> bool:
        """Whether the next snapshot is left out, because snapshots are made rarer. Ask once a snapshot."""
        self._snapshots += 1
        return self._snapshots % self.now.every != 0
