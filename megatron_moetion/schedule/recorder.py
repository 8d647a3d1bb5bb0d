# SPDX-License-Identifier: Apache-2.0
"""Records when training uses which link, without waiting for the device: one timeline an iteration that is recorded.

Spans are marked in training's hot path. Threads mark one at a time there, the main one or autograd's, so that nothing
is locked; and in an iteration that is not recorded, with nobody who listens, a span costs two calls that do nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_moetion.clock import Clock
from megatron_moetion.schedule.timeline import Lane, Span, Timeline


class StampError(Exception):
    """A stamp cannot be read: it was never taken, it was taken on a stream that is behind, or the device failed."""


class Stopwatch(Protocol):
    """Marks moments on the device that trains, without waiting for it."""

    def stamp(self) -> Any:
        """Now, in the order of what the training thread has enqueued. Raises nothing."""
        ...

    def is_known(self, stamp: Any) -> bool:
        """Whether ``seconds`` may be asked for. Raises ``StampError`` where it never may."""
        ...

    def seconds(self, since: Any, until: Any) -> float:
        """From one stamp to another. Raises ``StampError`` where one of them cannot be read."""
        ...

    def recycle(self, stamps: Iterable[Any]) -> None:
        """These were read, and are not needed any more."""
        ...


class HostStopwatch:
    """The host's monotonic clock: right where the host computes."""

    def __init__(self, clock: Clock) -> None:
        self.stamp: Callable[[], float] = clock.monotonic

    def is_known(self, stamp: float) -> bool:
        return True

    def seconds(self, since: float, until: float) -> float:
        return until - since

    def recycle(self, stamps: Iterable[float]) -> None:
        pass


_NO_MOMENT = object()
"""The stamp of a moment that could not be marked."""


class EventStopwatch:
    """CUDA events on the current stream. They are used again once they were read.

    ``make_event`` is ``torch.cuda.Event``. ``is_capturing`` says whether the current stream is being captured into a
    CUDA graph, None where none ever is: an event in a capture marks no moment.
    """

    def __init__(self, make_event: Callable[..., Any], is_capturing: Callable[[], bool] | None = None) -> None:
        self._make = make_event
        self._is_capturing = is_capturing
        self._spare: deque[Any] = deque()

    def stamp(self) -> Any:
        try:
            if self._is_capturing is not None and self._is_capturing():
                return _NO_MOMENT
            event = self._spare.popleft() if self._spare else self._make(enable_timing=True)
            event.record()
        except RuntimeError:  # of the device; training's own next call meets it, and says more about it
            return _NO_MOMENT
        return event

    def is_known(self, stamp: Any) -> bool:
        _check(stamp)
        try:
            return bool(stamp.query())
        except RuntimeError as error:
            raise StampError(_first_line(error)) from error

    def seconds(self, since: Any, until: Any) -> float:
        _check(since, until)
        try:
            return float(since.elapsed_time(until)) / 1e3
        except (RuntimeError, ValueError) as error:  # torch has raised both for an event that is not over
            raise StampError(_first_line(error)) from error

    def recycle(self, stamps: Iterable[Any]) -> None:
        self._spare.extend(s for s in stamps if s is not _NO_MOMENT)


def _check(*stamps: Any) -> None:
    if any(s is _NO_MOMENT for s in stamps):
        raise StampError("a moment was not marked, in the capture of a CUDA graph or because the device failed")


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


class Listener(Protocol):
    """Called at once when training's own sends start and end, in training's threads; must not wait."""

    def traffic_begins(self, lane: Lane, sent_bytes: int) -> None:
        """Training is about to send over the network between nodes."""
        ...

    def traffic_ends(self, lane: Lane, sent_bytes: int) -> None:
        """The network has accepted what the call sends, or the call has returned."""
        ...


class OpenSpan:
    """A span under way, for ``Recorder.accepted`` and ``Recorder.end``."""

    __slots__ = ("accepted", "begin", "end", "is_told", "lane", "received_bytes", "sent_bytes")

    def __init__(self, lane: Lane, sent_bytes: int, received_bytes: int) -> None:
        self.lane = lane
        self.sent_bytes = sent_bytes
        self.received_bytes = received_bytes
        self.begin: Any = None
        self.accepted: Any = None
        self.end: Any = None
        self.is_told = False

    def until_now(self) -> OpenSpan:
        """A copy that no later event changes."""
        copy = OpenSpan(self.lane, self.sent_bytes, self.received_bytes)
        copy.begin, copy.accepted = self.begin, self.accepted
        return copy


_UNSEEN = OpenSpan(Lane.WAIT, 0, 0)
"""Every span that is not recorded while nobody listens."""
_UNSEEN.is_told = True


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

    def stamps(self) -> Iterable[Any]:
        """All that were taken, the last one aside: it is the next iteration's first."""
        yield self.content.origin
        for span in self.content.spans:
            yield from (s for s in (span.begin, span.accepted, span.end) if s is not None)


class Recorder:
    """Collects the spans of the iteration under way. Training's threads record; the training thread cuts.

    ``listener`` hears of every send, whether the iteration is recorded or not; None: nobody does.
    """

    def __init__(
        self, stopwatch: Stopwatch, clock: Clock, listener: Listener | None = None, num_spans_max: int = 20_000
    ) -> None:
        self._stopwatch = stopwatch
        self._clock = clock
        self._listener = listener
        self._num_spans_max = num_spans_max
        self._now = _Iteration(stopwatch.stamp(), clock.monotonic())
        self._is_recording = True
        self._unread: tuple[_Ended, ...] = ()
        """The last iterations, the newest last: two at most."""
        self.is_watching = True
        """Whether anybody needs the spans of this iteration."""
        self.num_dropped = 0
        """Timelines that could not be read."""
        self.problem: str | None = None
        """Why the last of them could not be."""

    @property
    def has_spans(self) -> bool:
        """Whether any span of the iteration under way is recorded."""
        return bool(self._now.spans)

    def begin(self, lane: Lane, sent_bytes: int = 0, received_bytes: int = 0) -> OpenSpan:
        """A span starts; give the result to ``end``. Spans beyond the limit are left out of the timeline."""
        if not self.is_watching:
            return _UNSEEN
        if sent_bytes and self._listener is not None:
            self._listener.traffic_begins(lane, sent_bytes)
        span = OpenSpan(lane, sent_bytes, received_bytes)
        if self._is_recording:
            span.begin = self._stopwatch.stamp()
            spans = self._now.spans
            if len(spans) < self._num_spans_max:
                spans.append(span)
        return span

    def accepted(self, span: OpenSpan) -> None:
        """The network has accepted all that the span sends.

        Without effect once the span is over. Megatron waits, between virtual stages, for a request in a later call than
        the one that posted it: training may have sent again by then, or never wait.
        """
        if span.is_told:
            return
        span.is_told = True
        if span.begin is not None:
            span.accepted = self._stopwatch.stamp()
        if span.sent_bytes and self._listener is not None:
            self._listener.traffic_ends(span.lane, span.sent_bytes)

    def end(self, span: OpenSpan) -> None:
        """The span ends."""
        if span.begin is not None:
            span.end = self._stopwatch.stamp()
        if not span.is_told:
            span.is_told = True
            if span.sent_bytes and self._listener is not None:
                self._listener.traffic_ends(span.lane, span.sent_bytes)

    def cut(self, iteration: int, *, records_next: bool = True) -> Timeline | None:
        """An optimizer step has just ended: ``iteration`` is over. ``records_next``: whether spans of the next count.

        Returns the newest timeline that can be read without waiting and was not returned before: on a host's stopwatch
        that of ``iteration``, with events as a rule the one before; None if there is none yet. One that cannot be read
        is dropped and counted.
        """
        end = self._stopwatch.stamp()
        done, self._now = self._now, _Iteration(end, self._clock.monotonic())
        if self._is_recording:
            # A stamp that an open span gets later may not be known yet when the iteration is.
            done.spans = [s if s.end is not None else s.until_now() for s in done.spans]
            self._unread = (*self._unread[-1:], _Ended(iteration, done, end))
        self._is_recording = records_next
        self.is_watching = records_next or self._listener is not None
        for position in reversed(range(len(self._unread))):
            ended = self._unread[position]
            try:
                if not self._stopwatch.is_known(ended.until):
                    continue
                timeline = self._read(ended)
            except StampError as error:
                self.num_dropped += 1
                self.problem = str(error)
                self._unread = self._unread[position + 1 :]
                return None
            for read in self._unread[: position + 1]:
                self._stopwatch.recycle(read.stamps())
            self._unread = self._unread[position + 1 :]
            return timeline
        return None

    def _read(self, ended: _Ended) -> Timeline:
        origin, seconds = ended.content.origin, self._stopwatch.seconds
        duration = seconds(origin, ended.until)
        spans = tuple(
            Span(
                s.lane,
                seconds(origin, s.begin),
                seconds(origin, s.end) if s.end is not None else duration,
                s.sent_bytes,
                s.received_bytes,
                seconds(origin, s.accepted) if s.accepted is not None else None,
            )
            for s in ended.content.spans
        )
        return Timeline(iteration=ended.number, begin_s=ended.content.begin_s, duration_s=duration, spans=spans)
