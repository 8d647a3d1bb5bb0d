# SPDX-License-Identifier: Apache-2.0
"""What becomes of a run whose snapshots have stopped for good: it is said again as the damage grows, then it ends.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping

USUAL_LIMIT = 20
"""Iterations. Replication does not repair itself, so waiting longer only makes the restart lose more."""
_FIRST = 4
"""Iterations behind at which it is said for the second time; then each time the distance has doubled."""


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
