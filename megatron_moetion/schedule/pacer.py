# SPDX-License-Identifier: Apache-2.0
"""Holds snapshot bytes back: until their window, yielding to training at once, or until their share of time has passed.

One gate a rank, which the sending thread asks before every slice. The hooks on training's traffic tell a ``Pacer`` when
training wants the network; a ``Steady`` gate hears nothing. No byte is held beyond the deadline, so a wrong plan costs
time and no snapshot.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from megatron_moetion.clock import Clock
from megatron_moetion.schedule.planner import SLICES_S, Rhythm, Window
from megatron_moetion.schedule.timeline import Lane

SLICE_MIN_BYTES, SLICE_MAX_BYTES = 32 << 10, 8 << 20
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

SHOWN_SHARE = 0.1
"""A ``Steady`` transfer that was held for a larger share of the time that it took shows nothing of the link: the
network's buffers have swallowed each slice before the next one came."""

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

    @property
    def is_known(self) -> bool:
        """Whether any transfer was measured yet."""
        return bool(self._seen)

    def learn(self, bytes_per_s: float) -> None:
        """One more transfer has shown this bandwidth."""
        self._seen.append(bytes_per_s)
        self.bytes_per_s = max(self._seen)

    @contextmanager
    def transfer(self, nbytes: int) -> Iterator[None]:
        """Wrap the transfer of a snapshot of ``nbytes``, acknowledgement included; time on hold is excluded."""
        began, held = self._now(), self._held_s
        yield
        held_s = self._held_s - held
        took_s = self._now() - began - held_s
        if nbytes >= MEASURED_MIN_BYTES and took_s > 0:
            self._learn_from(nbytes / took_s, held_s / took_s)

    def _learn_from(self, bytes_per_s: float, held_share: float) -> None:
        """A transfer of a snapshot had this rate while it was not on hold, which it was for this share of that time."""
        self.learn(bytes_per_s)


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


class Paced(Meter, ABC):
    """A ``Gate`` with a deadline, one slice at a time. All its waits are on ``condition``.

    What it waits for before the deadline is its subclasses' to say.
    """

    def __init__(self, moved: Moved, clock: Clock, condition: threading.Condition) -> None:
        super().__init__(clock)
        self._moved = moved
        self._changed = condition
        self._is_waiting = False
        self._origin_s = self._now()
        self._deadline_s = 0.0  # without bytes to move nothing is held back
        self._total_bytes = self._admitted_bytes = self._late_bytes = 0
        self._held_before_s = 0.0
        self._is_urgent = False
        self._is_unpaced = False  # bytes of this plan went as fast as they could
        self._transfers = 0
        self._pace = PROBE_FACTOR
        self._own_free_s = 0.0  # our last slice is on the wire until then

    def follow(self, total_bytes: int, deadline_s: float) -> None:
        """From now on ``total_bytes`` go, all of them before ``deadline_s`` (seconds from now).

        Bytes that find no room go when the deadline comes close.
        """
        with self._changed:
            self._origin_s = self._now()
            self._deadline_s = deadline_s
            self._total_bytes, self._admitted_bytes, self._late_bytes = total_bytes, 0, 0
            self._held_before_s = self._held_s
            self._is_unpaced = False
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
        """Bytes of this plan that went when they were not to, and seconds on hold."""
        with self._changed:
            return self._late_bytes, self._held_s - self._held_before_s

    # -- Gate ------------------------------------------------------------------------------------------

    def slice_bytes(self) -> int:
        return max(SLICE_MIN_BYTES, min(SLICE_MAX_BYTES, int(self.bytes_per_s * self._slice_s())))

    def in_flight_bytes(self) -> int:
        """One slice: the next one is not due before it has left."""
        return self.slice_bytes()

    def admit(self, nbytes: int) -> None:
        """Return when these bytes may go; at the deadline everything is sent."""
        with self._changed:
            while True:
                self._is_waiting = True  # before looking: what changes from now on is told
                now = self._now()
                pause_s, is_held = self._pause_s(now, nbytes)
                if pause_s < TICK_S:
                    break
                self._changed.wait(pause_s)
                self._held_s += (self._now() - now) * is_held
            self._is_waiting = False
            if self._deadline_s and self._is_late(now, nbytes):
                self._late_bytes += nbytes
            if self._deadline_s and not self._left_s(now):
                self._is_unpaced = True
            self._admitted_bytes += nbytes
            self._own_free_s = max(now, self._own_free_s) + nbytes / (self.bytes_per_s * self._pace)

    def left(self, nbytes: int, posted_s: float) -> None:
        """The network takes bytes into its buffers at once; they are on the wire for longer."""
        self._moved(posted_s, max(self._now(), posted_s + nbytes / self.bytes_per_s), nbytes)

    def _learn_from(self, bytes_per_s: float, held_share: float) -> None:
        """Without a pace a rank may have the link of its node to itself, as it never has while all keep theirs."""
        self.learn(min(bytes_per_s, self.bytes_per_s) if self._is_unpaced else bytes_per_s)

    def _slice_s(self) -> float:
        """How long a slice should occupy the link, in seconds."""
        return SLICES_S[0]

    @abstractmethod
    def _pause_s(self, now: float, nbytes: int) -> tuple[float, bool]:
        """How long to wait before looking again, 0 to go; and whether our last slice is not the reason."""

    @abstractmethod
    def _is_late(self, now: float, nbytes: int) -> bool:
        """Whether bytes that go now go when they were not to."""

    def _left_s(self, now: float) -> float:
        """Until the deadline; 0 where nothing is to be held back."""
        return 0.0 if self._is_urgent else max(0.0, self._origin_s + self._deadline_s - now)


class Steady(Paced):
    """Bytes leave evenly until the deadline, whatever training does: a bounded rate, for who cannot hear training.

    On a GPU the host enqueues training's traffic long before the device runs it.
    """

    def _pause_s(self, now: float, nbytes: int) -> tuple[float, bool]:
        left_s = self._left_s(now)
        if not left_s:
            return 0.0, False
        if self._own_free_s > now:
            return min(self._own_free_s - now, left_s), False
        due_s = self._origin_s + self._deadline_s * self._admitted_bytes / self._total_bytes
        return min(due_s - now, left_s), True

    def _is_late(self, now: float, nbytes: int) -> bool:
        return now >= self._origin_s + self._deadline_s

    def _learn_from(self, bytes_per_s: float, held_share: float) -> None:
        if held_share <= SHOWN_SHARE:
            super()._learn_from(bytes_per_s, held_share)


class Pacer(Paced):
    """Bytes go in the windows of a rhythm; a ``Listener`` that yields to training.

    Training's threads tell it what they do, one at a time, and take no lock unless a slice waits. Each of them writes
    fields that are right by themselves, in an order in which a slice that looks in between sees training as busy.
    """

    def __init__(self, moved: Moved, clock: Clock, condition: threading.Condition) -> None:
        super().__init__(moved, clock, condition)
        self._rhythm = Rhythm()
        self._sends = 0  # of training, in this iteration
        self._synced = (self._now(), 0.0)  # when training was last known to be where in the rhythm
        self._active = 0
        self._wire_free_s = 0.0  # training's last message is on the wire until then

    def begin_iteration(self, rhythm: Rhythm) -> None:
        """Training is at the beginning of an iteration that is expected to go like this."""
        with self._changed:
            self._rhythm, self._sends = rhythm, 0
            self._synced = (self._now(), 0.0)
            self._changed.notify_all()

    def _slice_s(self) -> float:
        return self._rhythm.slice_s

    def _pause_s(self, now: float, nbytes: int) -> tuple[float, bool]:
        """A slice goes when training is quiet, our last slice has left and a window has room for these bytes.

        Near the deadline the windows are ignored.
        """
        left_s = self._left_s(now)
        if not left_s:
            return 0.0, False
        if self._active:
            return left_s, True  # notified when the network has training's message, or training's call returns
        if self._wire_free_s > now:
            return min(self._wire_free_s - now, left_s), True
        if self._own_free_s > now:
            return min(self._own_free_s - now, left_s), False
        slack_s = left_s - (self._total_bytes - self._admitted_bytes) / (self.bytes_per_s * min(self._pace, 1.0))
        return min(self._opens_in_s(now, nbytes), slack_s), True  # without slack every moment that is left is needed

    def _is_late(self, now: float, nbytes: int) -> bool:
        """Outside a window, or while training sends."""
        return self._active > 0 or self._wire_free_s > now or self._opens_in_s(now, nbytes) > TICK_S

    def _opens_in_s(self, now: float, nbytes: int) -> float:
        """How long until a window has room for these bytes; infinite if that depends on what training does next."""
        sends, windows = self._rhythm.sends_s, self._rhythm.windows
        upcoming = sends[self._sends] if self._sends < len(sends) else self._rhythm.duration_s
        synced_s, synced_at = self._synced
        at = min(synced_at + now - synced_s, upcoming)
        takes_s = nbytes / self.bytes_per_s
        for position in range(bisect_right(windows, at, key=_end_s), len(windows)):
            window = windows[position]
            begin = max(at, window.begin_s)
            if begin >= upcoming:
                break
            if begin + takes_s <= window.end_s:
                return begin - at
        return float("inf")

    # -- Listener --------------------------------------------------------------------------------------

    def traffic_begins(self, lane: Lane, sent_bytes: int) -> None:
        """No slice goes any more. None is woken for that: it would go on waiting."""
        self._active += 1
        self._sync(self._rhythm.sends_s, self._sends)
        self._sends += 1

    def traffic_ends(self, lane: Lane, sent_bytes: int) -> None:
        """What a pipeline call sends is on the wire from now on; a collective is over."""
        if lane is Lane.PIPELINE:
            self._wire_free_s = max(self._wire_free_s, self._now()) + sent_bytes / self.bytes_per_s
        if lane is Lane.PIPELINE or self._active == 1:  # collectives that overlap are one
            self._sync(self._rhythm.accepted_s, self._sends - 1)
        self._active -= 1
        if self._is_waiting and not self._active:
            with self._changed:
                self._changed.notify_all()

    def _sync(self, moments: Sequence[float], number: int) -> None:
        """Training is now where the rhythm has this moment."""
        if 0 <= number < len(moments):
            self._synced = (self._now(), moments[number])


def _end_s(window: Window) -> float:
    return window.end_s
