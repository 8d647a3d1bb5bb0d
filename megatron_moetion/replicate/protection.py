# SPDX-License-Identifier: Apache-2.0
"""Watches the distance to the stable iteration: logs it as it grows, and ends a run that is unprotected for good.

Replication comes back by itself. What ends snapshots for good is a device that has failed, on its rank alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from megatron_moetion.errors import ProtectionLost
from megatron_moetion.observe.journal import Journal

USUAL_LIMIT = 20
"""Iterations. A device that has failed stays so; waiting longer only makes the restart lose more."""
_FIRST = 4
"""Iterations behind at which it is said for the second time; then each time the distance has doubled."""
_QUIET_LAG = 64
"""Snapshots that the stable iteration may be behind before rank 0 says so, for any reason."""


def restarts_left(environment: Mapping[str, str]) -> int:
    """How often torchrun would still start this process's node again; 0 without torchrun."""
    allowed = int(environment.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    return max(0, allowed - int(environment.get("TORCHELASTIC_RESTART_COUNT") or 0))


def limit_of(setting: int, environment: Mapping[str, str]) -> int:
    """Iterations without protection after which the process ends; 0: never. ``setting`` -1 leaves it to us."""
    if setting >= 0:
        return setting
    return USUAL_LIMIT if restarts_left(environment) else 0


class Distance:
    """How far training is ahead of the iteration that it would go back to, since nothing is protected any more."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._next = _FIRST

    def is_too_far(self, behind: int, *, helps: bool) -> bool:
        """Whether the process should end, so that it can be started again from the stable iteration.

        ``helps``: a restart has a chance. One that would end in the same place again only takes restarts from real
        faults.
        """
        return helps and 0 < self._limit <= behind

    def worth_saying(self, behind: int) -> str | None:
        """What to say now, each time the distance has doubled; None in between."""
        if behind < self._next:
            return None
        while self._next <= behind:
            self._next *= 2
        after = (
            f"the process ends when it is {self._limit} iterations, so that its supervisor restarts the job from there"
            if self._limit
            else "restart the job to be protected again"
        )
        return f"a fault now costs {behind} iterations; {after}"


class Protection:
    """Watches the steps of one rank. ``started``: the stable iteration that this attempt began with."""

    def __init__(
        self, *, journal: Journal, rank: int, attempt: int, started: int, interval: int, distance: Distance
    ) -> None:
        self._journal = journal
        self._rank = rank
        self._attempt = attempt
        self._started = started
        self._distance = distance
        self._said = self._quiet = _QUIET_LAG * interval
        self.steps = 0
        """Steps that have ended in this attempt. Other threads may read it."""
        self.iteration = started
        """The last one."""
        self.unhealthy = 0
        """Iterations that this rank's training did not call healthy."""

    def note_unhealthy(self, iteration: int) -> None:
        """Count an iteration whose loss or gradients are not what they should be; the first one is said."""
        self.unhealthy += 1
        self._journal.warn_once(
            "unhealthy",
            iteration,
            f"the loss or the gradients of this iteration are not healthy: neither it nor iteration {iteration - 1}, "
            f"from which they come, becomes stable; moetion/unhealthy-iterations counts them",
        )

    def watch(self, iteration: int, stable: int, broken: str | None) -> None:
        """Say how far ``stable`` is behind. ``broken``: why it will never move again, None while it can.

        ``ProtectionLost`` where it is broken, ``max_unprotected_iterations`` have passed and a restart would help.
        """
        self.steps += 1
        self.iteration = iteration
        behind = iteration - stable
        if broken is None:
            self._watch_lag(iteration, stable, behind)
            return
        if text := self._distance.worth_saying(behind):
            self._journal.warn(iteration, f"no snapshot is protected since iteration {stable}: {text}: {broken}")
        helps = self._attempt == 0 or stable > self._started
        if self._distance.is_too_far(behind, helps=helps):
            raise ProtectionLost(
                f"at iteration {iteration} the stable iteration is still {stable} and cannot move: {broken}. "
                f"This process ends so that its supervisor restarts the job from iteration {stable} "
                f"(--moetion-max-unprotected-iterations)"
            )

    def _watch_lag(self, iteration: int, stable: int, behind: int) -> None:
        if behind <= self._quiet:
            self._said = self._quiet
        if behind > self._said and self._rank == 0:
            self._said = 2 * behind
            self._journal.warn(
                iteration,
                f"iteration {stable} stays, {behind} iterations back: some rank's snapshots are dropped or "
                f"do not reach their replicas; the lines before say why",
            )
