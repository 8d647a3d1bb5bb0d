# SPDX-License-Identifier: Apache-2.0
"""Spreads the bytes that leave a device over the iteration, so that they never fill its link for long.

The link is training's too: transfers between nodes read the device's memory over it. The bytes of a snapshot leave
evenly from the snapshot's beginning on, over most of the time until the optimizer asks for the state. That time follows
from the last iterations, on the host's clock. When the optimizer asks, or anybody waits, what is left goes at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from megatron_moetion.clock import Clock
from megatron_moetion.replicate.worker import Event

REMEMBERED = 8
"""Iterations that the time is known from."""
SPREAD_SHARE = 0.8
"""Share of the shortest of them that bytes are spread over: an iteration may be shorter than all of them."""


def spread_s(times_s: Sequence[float]) -> float:
    """How long the bytes of a snapshot may take, from how long the optimizer let the last ones; 0 at first."""
    return SPREAD_SHARE * min(times_s, default=0.0)


def due_s(admitted_bytes: int, total_bytes: int, begin_s: float, end_s: float) -> float:
    """When the next bytes are due, where the first ones left at ``begin_s`` and all have by ``end_s``."""
    return begin_s + max(0.0, end_s - begin_s) * min(1.0, admitted_bytes / max(total_bytes, 1))


class EvenPace:
    """One rank's ``SnapshotPace``. ``is_hurried`` is an event that nobody else uses."""

    def __init__(self, clock: Clock, is_hurried: Event) -> None:
        self._now = clock.monotonic
        self._is_hurried = is_hurried
        self._times_s: deque[float] = deque(maxlen=REMEMBERED)
        self._submitted_s = self._now()
        self._is_asked = True
        self._begin_s = self._end_s = self._submitted_s
        self._total_bytes = self._admitted_bytes = 0

    def begin(self) -> None:
        """See ``SnapshotPace``."""
        self._submitted_s = self._now()
        self._is_asked = False
        self._is_hurried.clear()

    def asked(self) -> None:
        """See ``SnapshotPace``. Optimizers in a chain ask one after the other: the first one counts."""
        if not self._is_asked:
            self._times_s.append(self._now() - self._submitted_s)
        self._is_asked = True
        self.hurry()

    def hurry(self) -> None:
        """See ``SnapshotPace``."""
        self._is_hurried.set()

    def plan(self, nbytes: int) -> None:
        """See ``SnapshotPace``."""
        self._begin_s, self._end_s = self._now(), self._submitted_s + spread_s(tuple(self._times_s))
        self._total_bytes, self._admitted_bytes = nbytes, 0

    def is_early(self) -> bool:
        """See ``Pace``."""
        return not self._is_hurried.is_set() and self._pause_s() > 0

    def admit(self, nbytes: int) -> None:
        """See ``Pace``."""
        if (pause_s := self._pause_s()) > 0:
            self._is_hurried.wait(pause_s)
        self._admitted_bytes += nbytes

    def _pause_s(self) -> float:
        due = due_s(self._admitted_bytes, self._total_bytes, self._begin_s, self._end_s)
        return due - self._now()
