# SPDX-License-Identifier: Apache-2.0
"""Timelines are what the hooks said, on a clock that answers at once or one iteration later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import pytest
from support import ManualClock, spanning

from megatron_moetion.schedule.recorder import EventStopwatch, Listener, Recorder, Stopwatch
from megatron_moetion.schedule.timeline import Lane


class LateStopwatch:
    """Stamps are numbers that can be read only once ``readable`` has passed them, as with events on a device."""

    def __init__(self) -> None:
        self.now = 0
        self.readable = 10**9
        self.recycled: list[int] = []

    def stamp(self) -> int:
        self.now += 1
        return self.now

    def is_known(self, stamp: int) -> bool:
        return stamp <= self.readable

    def seconds(self, since: int, until: int) -> float:
        assert until <= self.readable, "read before it was known"
        return float(until - since)

    def recycle(self, stamps: Iterable[int]) -> None:
        self.recycled += stamps


class Ear:
    def __init__(self) -> None:
        self.heard: list[tuple[str, Lane, int]] = []

    def traffic_begins(self, lane: Lane, sent_bytes: int) -> None:
        self.heard.append(("begins", lane, sent_bytes))

    def traffic_ends(self, lane: Lane, sent_bytes: int) -> None:
        self.heard.append(("ends", lane, sent_bytes))


def recording(stopwatch: Stopwatch, listener: Listener | None = None, num_spans_max: int = 100) -> Recorder:
    return Recorder(stopwatch, ManualClock(), listener, num_spans_max)


def test_spans_count_from_the_end_of_the_step_before() -> None:
    recorder = recording(LateStopwatch())  # stamp 1
    with spanning(recorder, Lane.PIPELINE, 5, 6):  # 2, 3
        pass
    first = recorder.cut(7)  # 4
    assert first is not None
    assert (first.iteration, first.duration_s) == (7, 3.0)
    (span,) = first.spans
    assert (span.lane, span.begin_s, span.end_s, span.sent_bytes, span.received_bytes) == (Lane.PIPELINE, 1, 2, 5, 6)
    second = recorder.cut(8)  # 5
    assert second is not None
    assert (second.iteration, second.duration_s, second.spans) == (8, 1.0, ())


def test_a_device_that_is_behind_is_never_waited_for() -> None:
    stopwatch = LateStopwatch()
    recorder = recording(stopwatch)
    stopwatch.readable = 1
    with spanning(recorder, Lane.GRADIENT) as span:
        recorder.accepted(span)
    assert recorder.cut(1) is None
    stopwatch.readable = stopwatch.now
    found = recorder.cut(2)
    assert found is not None
    assert found.iteration == 1
    assert stopwatch.recycled == [1, 2, 3, 4]


def test_a_span_that_is_still_open_lasts_to_the_end() -> None:
    recorder = recording(LateStopwatch())
    opened = recorder.begin(Lane.PARAMETER)
    found = recorder.cut(1)
    assert found is not None
    assert found.spans[0].end_s == found.duration_s
    recorder.end(opened)
    assert recorder.cut(2) is not None


def test_what_a_span_does_after_the_cut_is_not_waited_for() -> None:
    """Parameters are gathered across the cut; the device has not come to their end when it has come to the cut."""
    stopwatch = LateStopwatch()
    recorder = recording(stopwatch)
    opened = recorder.begin(Lane.PARAMETER, 9, 9)
    stopwatch.readable = 1
    assert recorder.cut(1) is None
    stopwatch.readable = stopwatch.now
    recorder.accepted(opened)
    recorder.end(opened)
    found = recorder.cut(2)
    assert found is not None
    assert found.iteration == 1
    assert [(s.accepted_s, s.end_s) for s in found.spans] == [(None, found.duration_s)]


class Event:
    """What ``EventStopwatch`` needs of ``torch.cuda.Event``, on a device that may be behind the host."""

    made = 0
    is_behind = False
    enqueued: ClassVar[list[Event]] = []
    now_ms = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        Event.made += 1
        self.at_ms: float | None = None

    def record(self) -> None:
        self.at_ms = None
        self.enqueued.append(self)
        if not self.is_behind:
            self.catch_up()

    def query(self) -> bool:
        return self.at_ms is not None

    def elapsed_time(self, until: Event) -> float:
        if self.at_ms is None or until.at_ms is None:
            raise RuntimeError("Both events must be completed before calculating elapsed time.")
        return until.at_ms - self.at_ms

    @classmethod
    def catch_up(cls) -> None:
        for event in cls.enqueued:
            cls.now_ms += 1000.0
            event.at_ms = cls.now_ms
        cls.enqueued.clear()


def test_no_iteration_is_returned_twice_although_the_device_is_behind_now_and_then() -> None:
    recorder = recording(EventStopwatch(Event))
    found = []
    for iteration, is_behind in enumerate([False, True, False, True, True, False] * 5):
        Event.is_behind = is_behind
        with spanning(recorder, Lane.GRADIENT, 1, 1):
            pass
        timeline = recorder.cut(iteration)
        found.append(None if timeline is None else timeline.iteration)
        assert timeline is None or timeline.duration_s == 3.0
        Event.catch_up()  # before the next iteration ends
    assert found[:6] == [0, None, 2, None, 3, 5]
    returned = [n for n in found if n is not None]
    assert returned == sorted(set(returned))
    assert Event.made <= 3 * 3, "events are used again"


def test_who_listens_hears_of_network_traffic_alone() -> None:
    ear = Ear()
    recorder = recording(LateStopwatch(), ear)
    with spanning(recorder, Lane.ALL_TO_ALL) as inside_the_node:
        recorder.accepted(inside_the_node)
    with spanning(recorder, Lane.PIPELINE, 9, 0):
        pass
    assert ear.heard == [("begins", Lane.PIPELINE, 9), ("ends", Lane.PIPELINE, 9)]


def test_that_the_network_has_taken_what_is_sent_is_told_once_and_noted() -> None:
    ear, stopwatch = Ear(), LateStopwatch()
    recorder = recording(stopwatch, ear)  # stamp 1
    with spanning(recorder, Lane.PIPELINE, 9, 0) as span:  # 2, 5
        recorder.accepted(span)  # 3
        assert ear.heard[-1] == ("ends", Lane.PIPELINE, 9)
        recorder.accepted(span)
        stopwatch.stamp()  # 4
    with spanning(recorder, Lane.PIPELINE, 9, 0) as late:  # 6, 7
        pass
    recorder.accepted(late)
    assert [what for what, *_ in ear.heard] == ["begins", "ends"] * 2
    found = recorder.cut(1)
    assert found is not None
    assert [(s.begin_s, s.accepted_s, s.end_s) for s in found.spans] == [(1, 2, 4), (5, None, 6)]


def test_the_number_of_spans_is_bounded() -> None:
    recorder = recording(LateStopwatch(), num_spans_max=10)
    for _ in range(50):
        with spanning(recorder, Lane.PIPELINE, 1):
            pass
    found = recorder.cut(1)
    assert found is not None
    assert len(found.spans) == 10


def test_an_iteration_that_is_not_recorded_costs_no_stamp_and_is_still_heard() -> None:
    ear, stopwatch = Ear(), LateStopwatch()
    recorder = recording(stopwatch, ear)
    recorder.cut(1, records_next=False)
    taken = stopwatch.now
    with spanning(recorder, Lane.PIPELINE, 9, 0) as span:
        recorder.accepted(span)
    assert stopwatch.now == taken
    assert [what for what, *_ in ear.heard] == ["begins", "ends"]
    assert recorder.is_watching
    assert recorder.cut(2) is None
    with spanning(recorder, Lane.PIPELINE, 9, 0):
        pass
    found = recorder.cut(3)
    assert found is not None
    assert (found.iteration, len(found.spans)) == (3, 1)


def test_where_nobody_listens_a_span_that_is_not_recorded_is_nothing() -> None:
    recorder = recording(LateStopwatch())
    recorder.cut(1, records_next=False)
    assert not recorder.is_watching
    first, second = (recorder.begin(Lane.GRADIENT, 9, 9) for _ in range(2))
    assert first is second, "no object is made for it"
    recorder.accepted(first)
    recorder.end(first)
    recorder.cut(2)
    assert recorder.is_watching


def test_a_span_that_goes_on_into_an_iteration_that_is_not_recorded_lasts_to_the_cut() -> None:
    recorder = recording(LateStopwatch())
    opened = recorder.begin(Lane.PARAMETER, 9, 9)
    found = recorder.cut(1, records_next=False)
    recorder.end(opened)
    assert found is not None
    assert found.spans[0].end_s == found.duration_s
    assert recorder.cut(2) is None


class FaultyEvent(Event):
    """An event whose device says no, in a call that is named."""

    fails: ClassVar[set[str]] = set()

    def record(self) -> None:
        self.refuse("record")
        super().record()

    def query(self) -> bool:
        self.refuse("query")
        return super().query()

    def elapsed_time(self, until: Event) -> float:
        self.refuse("elapsed_time")
        return super().elapsed_time(until)

    def refuse(self, call: str) -> None:
        if call in self.fails:
            raise RuntimeError(f"CUDA error: {call}\nCUDA kernel errors might be asynchronously reported")


@pytest.mark.parametrize("call", ["record", "query", "elapsed_time"])
def test_a_timeline_that_cannot_be_read_is_dropped_and_counted_and_the_next_is_there(call: str) -> None:
    Event.is_behind, FaultyEvent.fails = False, set()
    recorder = recording(EventStopwatch(FaultyEvent))
    recorder.cut(1)
    FaultyEvent.fails = {call}
    with spanning(recorder, Lane.GRADIENT, 1, 1):
        pass
    assert recorder.cut(2) is None
    assert recorder.num_dropped == 1
    assert recorder.problem is not None
    assert "\n" not in recorder.problem
    assert (call if call != "record" else "not marked") in recorder.problem
    FaultyEvent.fails = set()
    recorder.cut(3)
    with spanning(recorder, Lane.GRADIENT, 1, 1):
        pass
    found = recorder.cut(4)
    assert found is not None
    assert (found.iteration, len(found.spans)) == (4, 1)


def test_a_span_that_another_stream_has_not_ended_costs_its_timeline() -> None:
    """The iteration's last event is over, and one of a span is not: ``elapsed_time`` raises."""
    Event.is_behind = False
    recorder = recording(EventStopwatch(Event))
    opened = recorder.begin(Lane.ALL_TO_ALL, 1, 1)
    Event.is_behind = True
    recorder.end(opened)
    Event.enqueued.clear()  # it stays so
    Event.is_behind = False
    assert recorder.cut(1) is None
    assert recorder.num_dropped == 1
    assert recorder.cut(2) is not None


def test_no_event_is_recorded_while_a_graph_is_captured() -> None:
    Event.is_behind = False
    capturing = [False]
    recorder = recording(EventStopwatch(FaultyEvent, lambda: capturing[0]))
    capturing[0] = True
    FaultyEvent.fails = {"record"}
    with spanning(recorder, Lane.ALL_TO_ALL, 1, 1) as span:
        recorder.accepted(span)
    capturing[0], FaultyEvent.fails = False, set()
    assert recorder.cut(1) is None
    assert recorder.problem is not None
    assert "capture of a CUDA graph" in recorder.problem
    with spanning(recorder, Lane.ALL_TO_ALL, 1, 1):
        pass
    assert recorder.cut(2) is not None
