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
from typing import NamedTuple

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
GROWTH_MAX = 2.0
"""The first probe goes at this multiple. One that kept its pace is followed by another at once, which exceeds what is
known by twice the share, up to this multiple: so a link that looked slow for a while is soon known again."""
ANSWER_S = 5e-3
"""An answer may take so long once the last slice is off the wire. What it takes beyond that counts as the link's."""
KEPT_SHARE = 0.9
"""A calm transfer that had this share of its rate kept its pace, and shows no limit of the link."""
LATE_S = SLICES_S[0]
"""So much time of the link that slices came late is made up for: a longest slice."""
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


class Shown(NamedTuple):
    """What a transfer, or its first part, has shown."""

    bytes_per_s: float
    """While it was not on hold."""
    held_share: float
    """How long it was on hold, as a share of the time in which it was not."""


class Moment(NamedTuple):
    """How far a transfer is."""

    at_s: float
    held_s: float
    nbytes: int

    def until(self, later: Moment) -> Shown | None:
        """From here to there; None where that is too little to tell."""
        nbytes, held_s = later.nbytes - self.nbytes, later.held_s - self.held_s
        took_s = later.at_s - self.at_s - held_s
        return Shown(nbytes / took_s, held_s / took_s) if nbytes >= MEASURED_MIN_BYTES and took_s > 0 else None


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
        began = self._moment(0)
        yield
        self._judge(began, self._moment(nbytes))

    def _moment(self, nbytes: int) -> Moment:
        return Moment(at_s=self._now(), held_s=self._held_s, nbytes=nbytes)

    def _judge(self, began: Moment, ended: Moment) -> None:
        """A transfer is over."""
        if shown := began.until(ended):
            self.learn(shown.bytes_per_s)


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

    Transfers are slower than the link on purpose, so what one of them has shown is seldom the link's bandwidth. A calm
    one that kept its pace shows no limit, and counts for nothing. A probe counts. So does a transfer that fell behind
    its pace: the link, or a busy processor, kept it. Of one whose last bytes went without a pace only the others count,
    because a rank alone may have the link of its node to itself, as it never has while all keep theirs. The last slice
    and the wait for its answer do not count, as far as such a wait lately took at least.
    """

    _probes_always = True
    """Whether it probes where there is room enough, too."""

    def __init__(self, moved: Moved, clock: Clock, condition: threading.Condition) -> None:
        super().__init__(clock)
        self._moved = moved
        self._changed = condition
        self._is_waiting = False
        self._origin_s = self._now()
        self._deadline_s = 0.0  # without bytes to move nothing is held back
        self._iteration_s = 0.0
        self._total_bytes = self._admitted_bytes = self._late_bytes = 0
        self._held_before_s = 0.0
        self._is_urgent = False
        self._unpaced: Moment | None = None  # from then on bytes of this plan went as fast as they could
        self._last = self._moment(0)  # when the last slice was let go
        self._answers_s: deque[float] = deque(maxlen=REMEMBERED)  # from then until the transfer was over
        self._transfers = 0
        self._probe = GROWTH_MAX
        self._pace = PROBE_FACTOR
        self._own_free_s = 0.0  # our last slice is on the wire until then
        self._left_at_s = 0.0  # when the network had taken it
        self._seen_s = 0.0  # until then it is known why none of our bytes were on the wire
        self._was_held = True  # and since our last slice there was a reason

    def follow(self, total_bytes: int, deadline_s: float, iteration_s: float, *, is_tight: bool = False) -> None:
        """From now on ``total_bytes`` go, all of them before ``deadline_s`` (seconds from now).

        Bytes that find no room go when the deadline comes close. ``iteration_s`` is how long an iteration usually
        takes. ``is_tight``: as far as is known, the link has hardly room for them, so it matters what it carries.
        """
        with self._changed:
            self._origin_s = self._now()
            self._deadline_s, self._iteration_s = deadline_s, iteration_s
            self._total_bytes, self._admitted_bytes, self._late_bytes = total_bytes, 0, 0
            self._held_before_s = self._held_s
            self._unpaced = None
            # Whatever went before has been answered, however long it was to take at its pace.
            self._own_free_s = self._seen_s = self._origin_s
            self._was_held = True
            is_probe = self._probe > PROBE_FACTOR or self._transfers % PROBE_EVERY == 0
            self._pace = self._probe if is_probe and (is_tight or self._probes_always) else CALM_FACTOR
            self._transfers += 1
            self._changed.notify_all()

    def hasten(self, iteration_s: float) -> None:
        """Iterations usually take this long, as is known by now: the deadline comes sooner where that is shorter."""
        with self._changed:
            if 0 < iteration_s < self._iteration_s:
                self._deadline_s *= iteration_s / self._iteration_s
                self._iteration_s = iteration_s
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
                self._was_held |= is_held
                self._changed.wait(pause_s)
                if is_held:
                    idle_since_s = max(self._own_free_s, self._left_at_s, self._seen_s)
                    self._seen_s = self._now()
                    self._held_s += max(0.0, self._seen_s - idle_since_s)
            self._is_waiting = False
            if self._deadline_s and self._is_late(now, nbytes):
                self._late_bytes += nbytes
            if self._deadline_s and self._unpaced is None and not self._left_s(now):
                self._unpaced = self._moment(self._admitted_bytes)
            self._last = self._moment(self._admitted_bytes)
            self._admitted_bytes += nbytes
            # A busy thread comes late to each slice. The next ones make up for it: what the pace loses would look like
            # the link's limit, and the pace of the next transfer would be lower by it, and so on.
            since_s = now if self._was_held else max(self._own_free_s, self._left_at_s, now - LATE_S)
            self._own_free_s = since_s + nbytes / (self.bytes_per_s * self._pace)
            self._was_held = False

    def left(self, nbytes: int, posted_s: float) -> None:
        """The network takes bytes into its buffers at once; they are on the wire for longer."""
        self._left_at_s = self._now()
        self._moved(posted_s, max(self._left_at_s, posted_s + nbytes / self.bytes_per_s), nbytes)

    def _judge(self, began: Moment, ended: Moment) -> None:
        """See the class."""
        whole = began.until(ended)
        if not self._deadline_s or whole is None:
            super()._judge(began, ended)
            return
        known, pace = self.bytes_per_s, self._pace
        answer_s = ended.at_s - self._last.at_s
        self._answers_s.append(answer_s)
        if self._unpaced is not None:
            shown = began.until(self._unpaced)
            if shown is None:  # too little kept a pace to tell
                self.learn(min(whole.bytes_per_s, known))
                return
            shown = shown._replace(bytes_per_s=min(shown.bytes_per_s, whole.bytes_per_s))
        else:
            last_s = (ended.nbytes - self._last.nbytes) / (known * min(pace, 1.0))
            waited_s = answer_s - min(*self._answers_s, last_s + ANSWER_S)  # for bytes that were still on their way
            shown = began.until(self._last._replace(at_s=self._last.at_s + waited_s)) or whole
        if not self._shows_link(shown):
            return
        if pace < 1 and shown.bytes_per_s > KEPT_SHARE * pace * known:
            return
        has_grown = pace > 1 and shown.bytes_per_s > known * (1 + pace) / 2
        # A probe that has met a limit may have met it beyond this rank's share, while others of its node were calm.
        self.learn(shown.bytes_per_s if has_grown else min(shown.bytes_per_s, known * PROBE_FACTOR))
        if pace > 1:
            self._probe = min(2 * pace - 1, GROWTH_MAX) if has_grown else PROBE_FACTOR

    def _shows_link(self, shown: Shown) -> bool:
        """Whether this is the link's doing, or the pace's."""
        return True

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

    On a GPU the host enqueues training's traffic long before the device runs it. Where bytes have hardly room, a probe
    leaves at its own pace: evenly, it would show nothing.
    """

    _probes_always = False

    def _pause_s(self, now: float, nbytes: int) -> tuple[float, bool]:
        left_s = self._left_s(now)
        if not left_s:
            return 0.0, False
        if self._own_free_s > now:
            return min(self._own_free_s - now, left_s), False
        if self._pace > 1:
            return 0.0, False
        due_s = self._origin_s + self._deadline_s * self._admitted_bytes / self._total_bytes
        return min(due_s - now, left_s), True

    def _is_late(self, now: float, nbytes: int) -> bool:
        return now >= self._origin_s + self._deadline_s

    def _shows_link(self, shown: Shown) -> bool:
        return shown.held_share <= SHOWN_SHARE


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
