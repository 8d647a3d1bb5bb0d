# SPDX-License-Identifier: Apache-2.0
"""Spreads the bytes that leave a device over the iteration, so that they never fill its link for long.

The link is training's too: transfers between nodes read the device's memory over it. The bytes of a snapshot leave
evenly from its beginning on, over a share of the time until the optimizer asks for the state. The last iterations tell
that time, on the host's clock. When the optimizer asks, or anybody waits, what is left goes at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from megatron_moetion.clock import Clock
from megatron_moetion.replicate.worker import Event

REMEMBERED = 8
"""Iterations that the time is known from."""
SHARE_ALONE = 0.8
"""Share of the shortest of them that bytes are spread over: an iteration may be shorter than all of them."""
SHARE_BEFORE_REPLICATION = 0.2
"""The same where the snapshot is replicated afterwards. That has to be over in the same iteration, or nearly: until
then the snapshot holds its slots, of which there is one set for a snapshot on its way, and mode ``exact`` waits for it.
The network is the slower link, so it gets the larger part."""


def spread_share(replicas: int) -> float:
    """Share of the time that the bytes of a snapshot are spread over."""
    return SHARE_BEFORE_REPLICATION if replicas else SHARE_ALONE


def spread_s(times_s: Sequence[float], share: float) -> float:
    """How long the bytes of a snapshot may take, from how long the optimizer let the last ones; 0 at first."""
    return share * min(times_s, default=0.0)


def due_s(admitted_bytes: int, total_bytes: int, begin_s: float, end_s: float) -> float:
    """When the next bytes are due, where the first ones left at ``begin_s`` and all have by ``end_s``."""
    return begin_s + max(0.0, end_s - begin_s) * min(1.0, admitted_bytes / max(total_bytes, 1))


class EvenPace:
    """One rank's ``SnapshotPace``. Nobody else uses ``is_hurried``; for ``share`` see ``spread_share``."""

    def __init__(self, clock: Clock, is_hurried: Event, share: float = SHARE_ALONE) -> None:
        self._now = clock.monotonic
        self._is_hurried = is_hurried
        self._share = share
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
        self._begin_s, self._end_s = self._now(), self._submitted_s + spread_s(tuple(self._times_s), self._share)
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
