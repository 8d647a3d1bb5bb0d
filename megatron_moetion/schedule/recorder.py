# SPDX-License-Identifier: Apache-2.0
"""Records when training uses which link, without waiting for the device: one timeline an iteration."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_moetion.clock import Clock
from megatron_moetion.schedule.timeline import Lane, Span, Timeline


class Stopwatch(Protocol):
    """Marks moments on the device that trains, without waiting for it."""

    def stamp(self) -> Any:
        """Now, in the order of what the training thread has enqueued."""
        ...

    def is_known(self, stamp: Any) -> bool:
        """Whether ``seconds`` may be asked for."""
        ...

    def seconds(self, since: Any, until: Any) -> float:
        """From one stamp to another."""
        ...

    def recycle(self, stamps: Iterable[Any]) -> None:
        """These are not needed any more."""
        ...


class HostStopwatch:
    """The host's monotonic clock: right where the host computes."""

    def __init__(self, clock: Clock) -> None:
        self._now = clock.monotonic

    def stamp(self) -> float:
        return self._now()

    def is_known(self, stamp: float) -> bool:
        return True

    def seconds(self, since: float, until: float) -> float:
        return until - since

    def recycle(self, stamps: Iterable[float]) -> None:
        pass


class EventStopwatch:
    """CUDA events on the current stream. They are used again once they were read.

    ``make_event`` is ``torch.cuda.Event``.
    """

    def __init__(self, make_event: Callable[..., Any]) -> None:
        self._make = make_event
        self._spare: deque[Any] = deque()

    def stamp(self) -> Any:
        event = self._spare.popleft() if self._spare else self._make(enable_timing=True)
        event.record()
        return event

    def is_known(self, stamp: Any) -> bool:
        return bool(stamp.query())

    def seconds(self, since: Any, until: Any) -> float:
        return float(since.elapsed_time(until)) / 1e3

    def recycle(self, stamps: Iterable[Any]) -> None:
        self._spare.extend(stamps)


class Listener(Protocol):
    """Called at once when training's own traffic starts and ends, in the training thread; must not wait."""

    def traffic_begins(self, lane: Lane, sent_bytes: int) -> None:
        """Training is about to use the network between nodes."""
        ...

    def traffic_ends(self, lane: Lane, sent_bytes: int) -> None:
        """The network has accepted what the call sends, or the call has returned."""
        ...


class Silent:
    """A ``Listener`` that does nothing."""

    def traffic_begins(self, lane: Lane, sent_bytes: int) -> None:
        pass

    def traffic_ends(self, lane: Lane, sent_bytes: int) -> None:
        pass


class OpenSpan:
    """A span under way, for ``Recorder.end``; or a context manager that ends it."""

    __slots__ = ("_recorder", "accepted", "begin", "end", "lane", "received_bytes", "sent_bytes")

    def __init__(self, recorder: Recorder, lane: Lane, begin: Any, sent_bytes: int, received_bytes: int) -> None:
        self._recorder = recorder
        self.lane = lane
        self.sent_bytes = sent_bytes
        self.received_bytes = received_bytes
        self.begin = begin
        self.accepted: Any = None
        self.end: Any = None

    def until_now(self) -> OpenSpan:
        """A copy that no later event changes."""
        copy = OpenSpan(self._recorder, self.lane, self.begin, self.sent_bytes, self.received_bytes)
        copy.accepted = self.accepted
        return copy

    def __enter__(self) -> OpenSpan:
        return self

    def __exit__(self, *exception: object) -> None:
        self._recorder.end(self)


@dataclass
class _Iteration:
    origin: Any
    begin_s: float
    spans: list[OpenSpan] = field(default_factory=list)


@dataclass(frozen=True)
class _Ended:
    """An iteration whose timeline was not returned yet."""

    number: int
    content: _Iteration
    until: Any


class Recorder:
    """Collects the spans of the iteration under way. Any thread may record; the training thread cuts."""

    def __init__(
        self, stopwatch: Stopwatch, clock: Clock, listener: Listener | None = None, num_spans_max: int = 20_000
    ) -> None:
        self._stopwatch = stopwatch
        self._clock = clock
        self._listener: Listener = listener or Silent()
        self._num_spans_max = num_spans_max
        self._lock = threading.Lock()
        self._now = _Iteration(stopwatch.stamp(), clock.monotonic())
        self._unread: tuple[_Ended, ...] = ()
        """The last iterations, the newest last: two at most."""

    def begin(self, lane: Lane, sent_bytes: int = 0, received_bytes: int = 0) -> OpenSpan:
        """A span starts; give the result to ``end``. Spans beyond the limit are left out of the timeline."""
        if sent_bytes or received_bytes:
            self._listener.traffic_begins(lane, sent_bytes)
        span = OpenSpan(self, lane, self._stopwatch.stamp(), sent_bytes, received_bytes)
        with self._lock:
            if len(self._now.spans) < self._num_spans_max:
                self._now.spans.append(span)
        return span

    def accepted(self, span: OpenSpan) -> None:
        """The network has accepted all that the span sends.

        Without effect once the span is over. Megatron waits, between virtual stages, for a request in a later call than
        the one that posted it: training may have sent again by then, or never wait.
        """
        if span.accepted is None and span.end is None:
            span.accepted = self._stopwatch.stamp()
            if span.sent_bytes:
                self._listener.traffic_ends(span.lane, span.sent_bytes)

    def end(self, span: OpenSpan) -> None:
        """The span ends."""
        span.end = self._stopwatch.stamp()
        if span.accepted is None and (span.sent_bytes or span.received_bytes):
            self._listener.traffic_ends(span.lane, span.sent_bytes)

    def span(self, lane: Lane, sent_bytes: int = 0, received_bytes: int = 0) -> OpenSpan:
        """Record what happens in a ``with`` block."""
        return self.begin(lane, sent_bytes, received_bytes)

    def cut(self, iteration: int) -> Timeline | None:
        """An optimizer step has just ended: ``iteration`` is over.

        Returns the newest timeline that can be read without waiting and was not returned before: on a host's stopwatch
        that of ``iteration``, with events as a rule the one before; None if there is none yet.
        """
        end = self._stopwatch.stamp()
        with self._lock:
            done, self._now = self._now, _Iteration(end, self._clock.monotonic())
        # A stamp that an open span gets later may not be known yet when the iteration is.
        done.spans = [s if s.end is not None else s.until_now() for s in done.spans]
        self._unread = (*self._unread[-1:], _Ended(iteration, done, end))
        known = [e for e in self._unread if self._stopwatch.is_known(e.until)]
        if not known:
            return None
        timeline = self._read(known[-1])
        self._unread = self._unread[self._unread.index(known[-1]) + 1 :]
        for ended in known:
            stamps = [s for span in ended.content.spans for s in (span.begin, span.accepted, span.end)]
            self._stopwatch.recycle(s for s in (ended.content.origin, *stamps) if s is not None)
        return timeline

    def _read(self, ended: _Ended) -> Timeline:
        origin, seconds = ended.content.origin, self._stopwatch.seconds
        duration = seconds(origin, ended.until)
        spans = tuple(
            Span(
                lane=s.lane,
                begin_s=seconds(origin, s.begin),
                end_s=seconds(origin, s.end) if s.end is not None else duration,
                sent_bytes=s.sent_bytes,
                received_bytes=s.received_bytes,
                accepted_s=seconds(origin, s.accepted) if s.accepted is not None else None,
            )
            for s in ended.content.spans
        )
        return Timeline(iteration=ended.number, begin_s=ended.content.begin_s, duration_s=duration, spans=spans)
