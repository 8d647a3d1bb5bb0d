# SPDX-License-Identifier: Apache-2.0
"""One rank's scheduling: timelines in, pacing and sizes out.

Between the pure planner and the runtime: keeps the last timelines, sets the deadline of each transfer when it begins,
and says which size of snapshot the measured windows afford.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from megatron_moetion.clock import Clock
from megatron_moetion.replicate.channel import Gate
from megatron_moetion.schedule import planner
from megatron_moetion.schedule.pacer import MEASURED_MIN_BYTES, Eager, Meter, Moved, Paced, Pacer, Steady
from megatron_moetion.schedule.planner import Window
from megatron_moetion.schedule.recorder import Recorder, Stopwatch
from megatron_moetion.schedule.sizes import RARER
from megatron_moetion.schedule.timeline import Lane, Link, Timeline

TIMELINES = 8
"""Iterations that windows are derived from."""
DEADLINE_SHARE = 0.9
"""A snapshot should have left by this share of the iteration in which it began to travel, or of a later one."""
LATEST_SHARE = 0.25
"""One that begins late in an iteration gets at least this share of one."""

ITERATIONS_MAX = RARER[0]
"""A snapshot that the windows of one iteration do not carry gets more, at most as many as it is made rarer by."""
SAMPLE_EVERY = 8
"""Once training's rhythm is known, spans of one iteration in so many are recorded: marks cost the training thread time,
and on a device whose launches share one queue they cost overlap."""
ALIKE = 1.25
"""Iterations are alike that send as often and of which none takes this many times as long as another."""

TIGHT_SHARE = 0.5
"""A snapshot that takes more of an iteration's room has to know how fast the network is."""

CHUNKS_MAX = 200
"""Most chunks of a snapshot when the bytes without room are counted."""

Draw = Callable[[str, float, float, int], None]
"""Called with everything worth drawing: lane, begin and end (monotonic clock, seconds), bytes."""


def no_drawing(lane: str, begin_s: float, end_s: float, value: int) -> None:
    """The ``Draw`` of a run without a trace."""


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What an iteration's idle windows carry."""

    nbytes: float
    """Of one snapshot; infinite where nothing limits it."""
    why: str
    """Why so few, for a person; empty where nothing limits it."""
    is_settled: bool
    """Whether as many iterations were measured as windows are derived from."""


class Scheduler:
    """Owns the gate that the channel asks and the recorder that the hooks fill.

    ``schedule`` is ``bubble`` (in the gaps), ``steady`` (evenly) or ``eager`` (at once). ``stopwatch`` times training
    on its device, and ``clock`` everything else; the sending thread waits on ``condition``. ``draw`` gets what a trace
    shows. ``is_waited_for``: training waits at the end of each iteration until its snapshot has left.
    ``packing_share``: share of an iteration that passes before a snapshot travels, where its bytes leave a device at a
    pace.
    """

    def __init__(
        self,
        schedule: str,
        stopwatch: Stopwatch,
        *,
        clock: Clock,
        condition: threading.Condition,
        eager_slice_bytes: int,
        draw: Draw,
        is_waited_for: bool = False,
        packing_share: float = 0.0,
    ) -> None:
        self.schedule = schedule
        self._steady_share = DEADLINE_SHARE - packing_share
        """Of an iteration, for a transfer that leaves evenly: so it is over in the one in which it was packed."""
        self._is_waited_for = is_waited_for
        self._clock = clock
        self._draw = draw
        gate = make_gate(schedule, self._moved, clock, condition, eager_slice_bytes)
        self.gate: Gate = gate
        self._meter: Meter = gate
        self._paced = gate if isinstance(gate, Paced) else None
        self._pacer = gate if isinstance(gate, Pacer) else None
        self.recorder = Recorder(stopwatch, clock, self._pacer)
        self._timelines: deque[Timeline] = deque(maxlen=TIMELINES)
        self._is_again = False
        self._atypical: deque[int] = deque(maxlen=TIMELINES)
        """The last iterations that are no examples; a timeline is there two iterations later at most."""
        self._unrecorded = 0
        self._num_dropped = 0
        self._rhythm = planner.Rhythm()
        self._rhythm_bytes_per_s = 0.0
        self._fillable: Sequence[Window] = ()  # what slices fill of the rhythm's windows
        self._packing = Meter(clock)
        self._origin_s = clock.monotonic()
        self._unplaced_bytes = 0
        self._late_bytes, self._held_s = 0, 0.0

    @property
    def needs_windows(self) -> bool:
        """Whether snapshots go by what training sends."""
        return self._paced is not None

    @property
    def draws(self) -> bool:
        """Whether a trace shows everything that training does."""
        return self._draw is not no_drawing

    def run_again(self) -> None:
        """Training does once more what it has done in the iteration under way, which is no example for others."""
        self._is_again |= self.recorder.has_spans

    def cut(self, iteration: int, *, is_typical: bool = True) -> str | None:
        """An iteration has just ended. Call it once an iteration, in the training thread.

        ``is_typical``: False of one that was not like others (it took no step): no window is derived from it.
        Returns why a timeline could not be read, where that has just happened; it is dropped and counted.
        """
        if self._is_again or not is_typical:
            self._atypical.append(iteration)
        self._is_again = False
        self._origin_s = self._clock.monotonic()
        records_next = self.draws or records(tuple(self._timelines), self._unrecorded)
        self._unrecorded = 0 if records_next else self._unrecorded + 1
        timeline = self.recorder.cut(iteration, records_next=records_next)
        is_example = timeline is not None and timeline.iteration not in self._atypical
        if timeline is not None and is_example:
            self._timelines.append(timeline)
            if self._paced is not None:
                self._paced.hasten(typical_duration(tuple(self._timelines)))
        if self._pacer is not None:
            rate = self._pacer.bytes_per_s
            if is_example or rate != self._rhythm_bytes_per_s:
                self._find_rhythm(self._pacer, rate)
            else:
                self._pacer.begin_iteration(self._rhythm)
        if timeline is not None and self.draws:
            self._draw_iteration(timeline)
        if self.recorder.num_dropped == self._num_dropped:
            return None
        self._num_dropped = self.recorder.num_dropped
        return self.recorder.problem

    def _find_rhythm(self, pacer: Pacer, bytes_per_s: float) -> None:
        """An iteration begins, and there is news of the ones before or of the network."""
        self._rhythm, self._rhythm_bytes_per_s = planner.rhythm(tuple(self._timelines), bytes_per_s), bytes_per_s
        pacer.begin_iteration(self._rhythm)
        self._fillable = planner.whole_slices(self._rhythm.windows, pacer.slice_bytes() / bytes_per_s)

    def learn(self, bytes_per_s: float) -> None:
        """The network carries this, as was seen otherwise than by a transfer. Call it right after ``cut``."""
        self._meter.learn(bytes_per_s)
        if self._pacer is not None:
            self._find_rhythm(self._pacer, self._pacer.bytes_per_s)

    def _draw_iteration(self, timeline: Timeline) -> None:
        at = timeline.begin_s
        self._draw(Lane.ITERATION.value, at, at + timeline.duration_s, timeline.iteration)
        free_s = 0.0  # when the outgoing link is
        for span in timeline.spans:
            begin_s, end_s = span.begin_s, span.end_s
            if span.lane is Lane.PIPELINE and span.sent_bytes:  # the call itself only waits
                self._draw(Lane.WAIT.value, at + begin_s, at + end_s, 0)
                begin_s = max(span.quiet_since_s, free_s)
                end_s = free_s = begin_s + span.sent_bytes / self._meter.bytes_per_s
            self._draw(span.lane.value, at + begin_s, at + end_s, span.sent_bytes)
        for begin, end in computing(timeline):
            self._draw(Lane.COMPUTE.value, at + begin, at + end, 0)

    @property
    def newest_timeline(self) -> Timeline:
        """The last iteration that is known; an empty one before the first."""
        return self._timelines[-1] if self._timelines else Timeline(iteration=0, begin_s=0.0, duration_s=0.0)

    @contextmanager
    def transfer(self, nbytes: int, turns: int = 1) -> Iterator[None]:
        """Wrap the transfer of a snapshot of ``nbytes``. Its deadline counts from now on.

        ``turns``: so many like it, to one holder after the other, share the time.
        """
        timelines = tuple(self._timelines)
        typical_s = typical_duration(timelines) if timelines else 0.0
        if self._paced is not None and typical_s > 0 and nbytes:
            since_s = (self._clock.monotonic() - self._origin_s) % typical_s
            windows = self._windows(timelines, typical_s)
            iterations = 1 if self._is_waited_for else iterations_for(nbytes * turns, windows, self._paced.bytes_per_s)
            deadline_s = (self._deadline_s(since_s, typical_s) + (iterations - 1) * typical_s) / turns
            is_tight = nbytes * turns > TIGHT_SHARE * room_bytes(windows, self._paced.bytes_per_s)
            self._paced.follow(nbytes, deadline_s, typical_s, is_tight=is_tight)
            self._unplaced_bytes = planner.unplaced_bytes(
                windows_after(since_s, windows, typical_s, iterations),
                self._paced.bytes_per_s,
                nbytes,
                deadline_s,
                max(self._paced.slice_bytes(), nbytes // CHUNKS_MAX),
            )
        with self._meter.transfer(nbytes):
            yield
        if self._paced is not None and nbytes:  # kept, because the next plan resets it
            self._late_bytes, self._held_s = self._paced.report()

    def _deadline_s(self, since_s: float, typical_s: float) -> float:
        """How long a transfer may take that begins ``since_s`` into an iteration and is to be over in it.

        One that leaves evenly has no place in the iteration: it takes as long wherever it begins, so that its rate is
        the same, and is over before the next one begins. With the time in which its bytes leave a device, too: a
        snapshot that takes longer than an iteration leaves no slots for every third one.
        """
        if self._pacer is None and not self._is_waited_for:
            return self._steady_share * typical_s
        return max(DEADLINE_SHARE * typical_s - since_s, LATEST_SHARE * typical_s)

    def _windows(self, timelines: Sequence[Timeline], typical_s: float) -> Sequence[Window]:
        """When bytes of snapshots find room on the network in a typical iteration."""
        if self._pacer is not None:
            return self._fillable
        # Evenly, beside training's own bytes: what these leave of the time until the deadline, wherever in it.
        sending_s = float(timelines[-1].sends.nbytes.sum()) / self._meter.bytes_per_s
        return (Window(begin_s=0.0, end_s=max(0.0, self._steady_share * typical_s - sending_s)),)

    def urgent(self) -> AbstractContextManager[None]:
        """While it is entered, training waits for snapshots to leave, and none of their bytes is held back."""
        return self._paced.urgent() if self._paced is not None else nullcontext()

    def packed(self, begin_s: float, end_s: float, nbytes: int) -> None:
        """A snapshot of ``nbytes`` was copied from the device (or from memory) in this time. Called by any thread."""
        self._draw(Lane.D2H.value, begin_s, end_s, nbytes)
        if nbytes >= MEASURED_MIN_BYTES and end_s > begin_s:
            self._packing.learn(nbytes / (end_s - begin_s))

    def carries(self, times: float) -> Carried:
        """Bytes of a snapshot that the windows of both links carry in an iteration.

        A snapshot leaves the device once and crosses the network ``times`` times. Training moves nothing between
        device and host, so that link's window is the iteration. A link that nothing has gone over yet limits nothing.
        Infinite in schedule ``eager``, and before any iteration was measured.
        """
        is_settled = len(self._timelines) == TIMELINES
        nothing_limits = Carried(nbytes=math.inf, why="", is_settled=is_settled)
        if self._paced is None or not self._timelines:
            return nothing_limits
        typical_s = typical_duration(self._timelines)
        windows: dict[Link, Sequence[Window]] = {}
        rates: dict[Link, float] = {}
        if self._packing.is_known:
            windows[Link.D2H] = (Window(begin_s=0.0, end_s=typical_s),)
            rates[Link.D2H] = self._packing.bytes_per_s
        if times and self._paced.is_known:
            windows[Link.NETWORK] = self._windows(self._timelines, typical_s)
            rates[Link.NETWORK] = self._paced.bytes_per_s / times
        if not windows:
            return nothing_limits
        capacity, link = planner.capacity_bytes(windows, rates)
        idle_s = sum(w.duration_s for w in windows[link])
        name = "network" if link is Link.NETWORK else "link from device to host"
        each = f" for each of the {times:.3g} times that they cross it" if link is Link.NETWORK and times > 1 else ""
        why = (
            f"the {name} has {idle_s:.2f} of {typical_s:.2f} s for them at {rates[link] / 1e6:.0f} MB/s{each}, "
            f"so an iteration carries {capacity / 1e6:.1f} MB"
        )
        return Carried(nbytes=capacity, why=why, is_settled=is_settled)

    def scalars(self) -> dict[str, float]:
        """Numbers for a dashboard. What was late or held back is of the last snapshot that has left."""
        return {
            "moetion/network-mb-per-s": self._meter.bytes_per_s / 1e6,
            "moetion/device-to-host-mb-per-s": self._packing.bytes_per_s / 1e6,
            "moetion/unplaced-mb": self._unplaced_bytes / 1e6,
            "moetion/late-mb": self._late_bytes / 1e6,
            "moetion/held-s": self._held_s,
            "moetion/timelines-dropped": float(self._num_dropped),
        }

    def _moved(self, begin_s: float, end_s: float, nbytes: int) -> None:
        self._draw(Lane.REPLICATION.value, begin_s, end_s, nbytes)


def make_gate(
    schedule: str, moved: Moved, clock: Clock, condition: threading.Condition, eager_slice_bytes: int
) -> Eager | Steady | Pacer:
    """What the channel asks under a schedule."""
    match schedule:
        case "bubble":
            return Pacer(moved, clock, condition)
        case "steady":
            return Steady(moved, clock, condition)
        case "eager":
            return Eager(eager_slice_bytes, moved, clock)
    raise AssertionError(f"schedule {schedule!r} has no gate")


def records(timelines: Sequence[Timeline], unrecorded: int) -> bool:
    """Whether spans of the next iteration are recorded, after ``unrecorded`` iterations of which they were not.

    All are until the last ``TIMELINES`` are alike.
    """
    if len(timelines) < TIMELINES or unrecorded >= SAMPLE_EVERY - 1:
        return True
    durations = [t.duration_s for t in timelines]
    sends = {len(t.sends.nbytes) for t in timelines}
    return len(sends) > 1 or max(durations) > ALIKE * min(durations)


def typical_duration(timelines: Sequence[Timeline]) -> float:
    """The median iteration, in seconds; of an even number the shorter one, because a run's first iteration is long."""
    return statistics.median_low(t.duration_s for t in timelines)


def computing(timeline: Timeline) -> list[tuple[float, float]]:
    """Where training computes, as the training thread sees it: it neither communicates nor waits."""
    busy = planner.merge([(s.begin_s, s.end_s) for s in timeline.spans])
    edges = [0.0, *(edge for span in busy for edge in span), timeline.duration_s]
    return [(b, e) for b, e in zip(edges[::2], edges[1::2], strict=True) if e > b]


def iterations_for(nbytes: int, windows: Sequence[Window], bytes_per_s: float) -> int:
    """How many iterations a transfer may take: as many as carry it, headroom left, at most ``ITERATIONS_MAX``.

    Snapshots that do not fit one iteration are made rarer, by as much.
    """
    room = room_bytes(windows, bytes_per_s)
    return max(1, math.ceil(nbytes / room)) if nbytes < ITERATIONS_MAX * room else ITERATIONS_MAX


def room_bytes(windows: Sequence[Window], bytes_per_s: float) -> float:
    """What the windows of an iteration carry, headroom left."""
    return planner.HEADROOM * sum(w.duration_s for w in windows) * bytes_per_s


def windows_after(since_s: float, windows: Sequence[Window], typical_s: float, iterations: int = 1) -> list[Window]:
    """The windows of so many iterations and the next, in seconds since ``since_s`` after the first one's beginning."""
    turns = [k * typical_s for k in range(iterations + 1)]
    found = [
        Window(begin_s=w.begin_s + turn - since_s, end_s=w.end_s + turn - since_s) for turn in turns for w in windows
    ]
    return [Window(begin_s=max(w.begin_s, 0.0), end_s=w.end_s) for w in found if w.end_s > max(w.begin_s, 0.0)]
