# SPDX-License-Identifier: Apache-2.0
"""Holds snapshot bytes back until their window, and yields to training at once.

One pacer a rank. The sending thread asks it before every slice; the hooks on training's traffic tell it when training
wants the network. No byte is held beyond the deadline, so a wrong plan costs time and no snapshot.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megatron_moetion.clock import Clock
from megatron_moetion.schedule.planner import Rhythm
from megatron_moetion.schedule.timeline import Lane

SLICE_S = 20e-3
"""A slice should occupy the link no longer than this: so long a message of training may have to wait behind it. Each
slice wakes threads at both ends, so that smaller ones cost time of the processors that train."""
SLICE_MIN_BYTES, SLICE_MAX_BYTES = 64 << 10, 8 << 20
MEASURED_MIN_BYTES = 128 << 10
"""A smaller transfer measures latency, and not bandwidth."""
CALM_FACTOR = 0.8
"""We send at this share of the bandwidth: no queue builds up on the link for training's messages to wait behind."""
PROBE_FACTOR, PROBE_EVERY = 1.05, 8
"""One transfer in so many goes at this multiple: it shows what the link carries, and whether it became faster."""
UNKNOWN_BYTES_PER_S = 1e9
"""Until the first transfer."""
TICK_S = 1e-5
"""Shorter pauses are none."""
REMEMBERED = 16
"""Transfers whose bandwidth is remembered, two probes among them. The best one counts: what disturbs a transfer, above
all a busy processor, only makes it look slower, and an estimate that followed would pace the next one down."""

Moved = Callable[[float, float, int], None]
"""Called with when a slice was posted, when it had left (monotonic clock, seconds), and its bytes."""


class Meter:
    """Bandwidth, from how long whole transfers took."""

    def __init__(self, clock: Clock) -> None:
        self._now = clock.monotonic
        self._held_s = 0.0
        self._seen: deque[float] = deque(maxlen=REMEMBERED)
        self.bytes_per_s = UNKNOWN_BYTES_PER_S
        """The most that the link has lately been seen to carry for this rank. Read by the training thread too."""

    def learn(self, bytes_per_s: float) -> None:
        """One more transfer has shown this bandwidth."""
        self._seen.append(bytes_per_s)
        self.bytes_per_s = max(self._seen)

    @contextmanager
    def transfer(self, nbytes: int) -> Iterator[None]:
        """Wrap the transfer of a snapshot of ``nbytes``, acknowledgement included; time on hold is excluded."""
        began, held = self._now(), self._held_s
        yield
        took = self._now() - began - (self._held_s - held)
        if nbytes >= MEASURED_MIN_BYTES and took > 0:
            self.learn(nbytes / took)


class Eager(Meter):
    """The baseline, a ``Gate`` that is always open: everything goes at once, in large slices."""

    def __init__(self, slice_bytes: int, moved: Moved, clock: Clock) -> None:
        super().__init__(clock)
        self._slice_bytes = slice_bytes
        self._moved = moved

    def slice_bytes(self) -> int:
        return self._slice_bytes

    def in_flight_bytes(self) -> int:
        """As much as the channel allows."""
        return 1 << 62

    def admit(self, nbytes: int) -> None:
        pass

    def left(self, nbytes: int, posted_s: float) -> None:
        self._moved(posted_s, self._now(), nbytes)


class Pacer(Meter):
    """A ``Gate`` that follows a plan and a ``Listener`` that yields to training. All its waits are on ``condition``."""

    def __init__(self, moved: Moved, clock: Clock, condition: threading.Condition) -> None:
        super().__init__(clock)
        self._moved = moved
        self._changed = condition
        self._rhythm = Rhythm()
        self._sends = 0  # of training, in this iteration
        self._synced_s, self._synced_at = self._now(), 0.0  # when training was last known to be where in the rhythm
        self._origin_s = self._now()
        self._deadline_s = 0.0  # without bytes to move nothing is held back
        self._total_bytes = self._admitted_bytes = self._late_bytes = 0
        self._held_before_s = 0.0
        self._is_urgent = False
        self._transfers = 0
        self._pace = PROBE_FACTOR
        self._active = 0
        self._wire_free_s = 0.0  # training's last message is on the wire until then
        self._own_free_s = 0.0  # our last slice is, until then

    # -- the plan --------------------------------------------------------------------------------------

    def begin_iteration(self, rhythm: Rhythm) -> None:
        """Training is at the beginning of an iteration that is expected to go like this."""
        with self._changed:
            self._rhythm, self._sends = rhythm, 0
            self._synced_s, self._synced_at = self._now(), 0.0
            self._changed.notify_all()

    def follow(self, total_bytes: int, deadline_s: float) -> None:
        """From now on ``total_bytes`` go in the rhythm's windows, all of them before ``deadline_s`` (seconds from now).

        Bytes that find no room go when the deadline comes close.
        """
        with self._changed:
            self._origin_s = self._now()
            self._deadline_s = deadline_s
            self._total_bytes, self._admitted_bytes, self._late_bytes = total_bytes, 0, 0
            self._held_before_s = self._held_s
            self._pace = PROBE_FACTOR if self._transfers % PROBE_EVERY == 0 else CALM_FACTOR
            self._transfers += 1
            self._changed.notify_all()

    @contextmanager
    def urgent(self) -> Iterator[None]:
        """Training waits for these bytes: nothing is held back."""
        with self._changed:
            self._is_urgent = True
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._is_urgent = False

    def report(self) -> tuple[int, float]:
        """Bytes of this plan that went outside a window or overlapped training's traffic, and seconds on hold."""
        with self._changed:
            return self._late_bytes, self._held_s - self._held_before_s

    # -- Gate ------------------------------------------------------------------------------------------

    def slice_bytes(self) -> int:
        return max(SLICE_MIN_BYTES, min(SLICE_MAX_BYTES, int(self.bytes_per_s * SLICE_S)))

    def in_flight_bytes(self) -> int:
        """One slice: the next one is not due before it has left."""
        return self.slice_bytes()

    def admit(self, nbytes: int) -> None:
        """Return when training is quiet, our last slice has left and a window has room for these bytes.

        Near the deadline the windows are ignored; at the deadline everything is sent.
        """
        with self._changed:
            while True:
                now = self._now()
                pause_s, is_held = self._pause_s(now, nbytes)
                if pause_s < TICK_S:
                    break
                self._changed.wait(pause_s)
                self._held_s += (self._now() - now) * is_held
            is_overlapping = self._active > 0 or self._wire_free_s > now
            if self._deadline_s and (is_overlapping or self._opens_in_s(now, nbytes) > TICK_S):
                self._late_bytes += nbytes
            self._admitted_bytes += nbytes
            self._own_free_s = max(now, self._own_free_s) + nbytes / (self.bytes_per_s * self._pace)

    def left(self, nbytes: int, posted_s: float) -> None:
        """The network takes bytes into its buffers at once; they are on the wire for longer."""
        self._moved(posted_s, max(self._now(), posted_s + nbytes / self.bytes_per_s), nbytes)

    def _pause_s(self, now: float, nbytes: int) -> tuple[float, bool]:
        """How long to wait before looking again, 0 to go; and whether our last slice is not the reason."""
        left_s = self._origin_s + self._deadline_s - now
        if left_s <= 0 or self._is_urgent:
            return 0.0, False
        if self._active:
            return left_s, True  # notified when the network has training's message, or training's call returns
        if self._wire_free_s > now:
            return min(self._wire_free_s - now, left_s), True
        if self._own_free_s > now:
            return min(self._own_free_s - now, left_s), False
        slack_s = left_s - (self._total_bytes - self._admitted_bytes) / (self.bytes_per_s * min(self._pace, 1.0))
        return min(self._opens_in_s(now, nbytes), slack_s), True  # without slack every moment that is left is needed

    def _opens_in_s(self, now: float, nbytes: int) -> float:
        """How long until a window has room for these bytes; infinite if that depends on what training does next."""
        sends = self._rhythm.sends_s
        upcoming = sends[self._sends] if self._sends < len(sends) else self._rhythm.duration_s
        at = min(self._synced_at + now - self._synced_s, upcoming)
        takes_s = nbytes / self.bytes_per_s
        for window in self._rhythm.windows:
            begin = max(at, window.begin_s)
            if begin + takes_s <= window.end_s:
                return begin - at if begin < upcoming else float("inf")
        return float("inf")

    # -- Listener --------------------------------------------------------------------------------------

    def traffic_begins(self, lane: Lane, sent_bytes: int) -> None:
        """A call that only waits for a peer leaves the outgoing link free and does not count."""
        if sent_bytes:
            with self._changed:
                self._active += 1
                self._sync(self._rhythm.sends_s, self._sends)
                self._sends += 1
                self._changed.notify_all()

    def traffic_ends(self, lane: Lane, sent_bytes: int) -> None:
        """What a pipeline call sends is on the wire from now on; a collective is over."""
        if sent_bytes:
            with self._changed:
                self._active -= 1
                if lane is Lane.PIPELINE:
                    self._sync(self._rhythm.accepted_s, self._sends - 1)
                    self._wire_free_s = max(self._wire_free_s, self._now()) + sent_bytes / self.bytes_per_s
                if not self._active:
                    self._changed.notify_all()

    def _sync(self, moments: Sequence[float], number: int) -> None:
        """Training is now where the rhythm has this moment."""
        if 0 <= number < len(moments):
            self._synced_s, self._synced_at = self._now(), moments[number]
