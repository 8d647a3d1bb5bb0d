# SPDX-License-Identifier: Apache-2.0
"""Records when training uses which link, without waiting for the device: one timeline an iteration."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_moetion.schedule.timeline import Lane, Span, Timeline


class Clock(Protocol):
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


class HostClock:
    """The host's monotonic clock: right where the host computes."""

    def stamp(self) -> float:
        """See ``Clock``."""
        return time.monotonic()

    def is_known(self, stamp: float) -> bool:
        """See ``Clock``."""
        return True

    def seconds(self, since: float, until: float) -> float:
        """See ``Clock``."""
        return until - since

    def recycle(self, stamps: Iterable[float]) -> None:
        """See ``Clock``."""


class EventClock:
    """CUDA events on the current stream. They are read an iteration later and used again."""

    def __init__(self) -> None:
        import torch

        self._make: Callable[..., Any] = torch.cuda.Event
        self._spare: deque[Any] = deque()

    def stamp(self) -> Any:
        """See ``Clock``."""
        event = self._spare.popleft() if self._spare else self._make(enable_timing=True)
        event.record()
        return event

    def is_known(self, stamp: Any) -> bool:
        """See ``Clock``."""
        return bool(stamp.query())

    def seconds(self, since: Any, until: Any) -> float:
        """See ``Clock``."""
        return float(since.elapsed_time(until)) / 1e3

    def recycle(self, stamps: Iterable[Any]) -> None:
        """See ``Clock``."""
        self._spare.extend(stamps)


class Listener(Protocol):
    """Is told at once when training's own traffic starts and ends; called in the training thread, must not wait."""

    def traffic_begins(self, lane: Lane, sent_bytes: int) -> None:
        """Training is about to use the network between nodes."""
        ...

    def traffic_ends(self, lane: Lane, sent_bytes: int) -> None:
        """The network has taken what the call sends, or the call has returned."""
        ...


class Silent:
    """A ``Listener`` that does nothing."""

    def traffic_begins(self, lane: Lane, sent_bytes: int) -> None:
        """See ``Listener``."""

    def traffic_ends(self, lane: Lane, sent_bytes: int) -> None:
        """See ``Listener``."""


@dataclass
class _Open:
    lane: Lane
    begin: Any
    end: Any = None
    taken: Any = None
    sent_bytes: int = 0
    received_bytes: int = 0


@dataclass
class _Iteration:
    origin: Any
    begin_s: float
    spans: list[_Open] = field(default_factory=list)


class Recorder:
    """Collects the spans of the iteration under way. Any thread may record; the training thread cuts."""

    def __init__(self, clock: Clock, listener: Listener | None = None, num_spans_max: int = 20_000) -> None:
        self._clock = clock
        self._listener: Listener = listener or Silent()
        self._num_spans_max = num_spans_max
        self._lock = threading.Lock()
        self._now = _Iteration(clock.stamp(), time.monotonic())
        self._past: tuple[int, _Iteration, Any] | None = None

    def begin(self, lane: Lane, sent_bytes: int = 0, received_bytes: int = 0) -> _Open:
        """A span starts; give the answer to ``end``. Spans beyond the limit are left out of the timeline."""
        if sent_bytes or received_bytes:
            self._listener.traffic_begins(lane, sent_bytes)
        span = _Open(lane, self._clock.stamp(), sent_bytes=sent_bytes, received_bytes=received_bytes)
        with self._lock:
            if len(self._now.spans) < self._num_spans_max:
                self._now.spans.append(span)
        return span

    def taken(self, span: _Open) -> None:
        """The network has taken all that the span sends.

        Once the span is over, this says nothing new: who waits for a request later than in the call that posted it, as
        Megatron does between virtual stages, may have sent again by then, or never wait.
        """
        if span.taken is None and span.end is None:
            span.taken = self._clock.stamp()
            if span.sent_bytes:
                self._listener.traffic_ends(span.lane, span.sent_bytes)

    def end(self, span: _Open) -> None:
        """The span ends."""
        span.end = self._clock.stamp()
        if span.taken is None and (span.sent_bytes or span.received_bytes):
            self._listener.traffic_ends(span.lane, span.sent_bytes)

    @contextmanager
    def span(self, lane: Lane, sent_bytes: int = 0, received_bytes: int = 0) -> Iterator[_Open]:
        """Record what happens inside."""
        opened = self.begin(lane, sent_bytes, received_bytes)
        try:
            yield opened
        finally:
            self.end(opened)

    def cut(self, iteration: int) -> Timeline | None:
        """An optimizer step has just ended: ``iteration`` is over.

        Returns the newest timeline that can be read without waiting: on a host clock the one of ``iteration``, with
        events the one before; None if there is none yet.
        """
        end = self._clock.stamp()
        with self._lock:
            done, self._now = self._now, _Iteration(end, time.monotonic())
        older, self._past = self._past, (iteration, done, end)
        for number, what, until in filter(None, (self._past, older)):
            if self._clock.is_known(until):
                return self._read(number, what, until)
        return None

    def _read(self, iteration: int, what: _Iteration, until: Any) -> Timeline:
        def at(stamp: Any) -> float:
            return self._clock.seconds(what.origin, stamp)

        duration = at(until)
        spans = tuple(
            Span(
                lane=s.lane,
                begin_s=at(s.begin),
                end_s=at(s.end) if s.end is not None else duration,
                sent_bytes=s.sent_bytes,
                received_bytes=s.received_bytes,
                accepted_s=at(s.taken) if s.taken is not None else None,
            )
            for s in what.spans
        )
        if self._past is not None and self._past[1] is not what:
            stamps = (s for span in what.spans for s in (span.begin, span.taken, span.end))
            self._clock.recycle(s for s in stamps if s is not None)
        return Timeline(iteration=iteration, begin_s=what.begin_s, duration_s=duration, spans=spans)
