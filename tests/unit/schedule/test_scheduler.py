# SPDX-License-Identifier: Apache-2.0
"""From timelines to pacing and sizes; what is drawn."""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
from fabrics import loopback_fabrics
from support import ManualClock, ManualCondition, ToyState, spanning

from megatron_moetion.clock import SystemClock
from megatron_moetion.config import MoetionConfig
from megatron_moetion.modes.full import FullBlueprint
from megatron_moetion.run.host import Host
from megatron_moetion.run.prepare import prepare
from megatron_moetion.run.starter import Starter
from megatron_moetion.schedule import planner
from megatron_moetion.schedule.pace import SHARE_BEFORE_REPLICATION
from megatron_moetion.schedule.planner import Window
from megatron_moetion.schedule.recorder import HostStopwatch, StampError
from megatron_moetion.schedule.scheduler import (
    DEADLINE_SHARE,
    ITERATIONS_MAX,
    LATEST_SHARE,
    SAMPLE_EVERY,
    TIMELINES,
    Carried,
    Draw,
    Scheduler,
    computing,
    iterations_for,
    no_drawing,
    records,
    typical_duration,
    windows_after,
)
from megatron_moetion.schedule.timeline import Lane, Span, Timeline
from megatron_moetion.session import Session

Drawn = list[tuple[str, float, float, int]]


def make(
    schedule: str, draw: Draw | None = None, is_waited_for: bool = False, packing_share: float = 0.0
) -> tuple[Scheduler, ManualClock, Drawn]:
    drawn: Drawn = []
    clock = ManualClock()
    scheduler = Scheduler(
        schedule,
        HostStopwatch(clock),
        clock=clock,
        condition=ManualCondition(clock),
        eager_slice_bytes=1 << 20,
        draw=draw or (lambda *what: drawn.append(what)),
        is_waited_for=is_waited_for,
        packing_share=packing_share,
    )
    return scheduler, clock, drawn


def iterate(scheduler: Scheduler, clock: ManualClock, number: int, seconds: float = 0.05) -> None:
    """One iteration that sends a little over the network in its middle."""
    clock.sleep(seconds / 2)
    with spanning(scheduler.recorder, Lane.PIPELINE, 1000, 0):
        pass
    clock.sleep(seconds / 2)
    scheduler.cut(number)


def test_windows_ahead_count_from_now_and_go_on_into_the_next_iteration() -> None:
    windows = [Window(begin_s=0.0, end_s=0.4), Window(begin_s=0.6, end_s=1.0)]
    found = [(round(w.begin_s, 6), round(w.end_s, 6)) for w in windows_after(0.7, windows, 1.0)]
    assert found == [(0.0, 0.3), (0.3, 0.7), (0.9, 1.3)]


def test_a_transfer_gets_as_many_iterations_as_carry_it() -> None:
    windows = [Window(begin_s=0.0, end_s=0.3), Window(begin_s=0.5, end_s=0.7)]  # half a second, at 1 MB/s
    carried = int(planner.HEADROOM * 0.5e6)
    for nbytes, expected in (
        (1, 1),
        (carried - 1, 1),
        (carried + 1, 2),
        (3 * carried - 1, 3),
        (1 << 40, ITERATIONS_MAX),
    ):
        assert iterations_for(nbytes, windows, 1e6) == expected
    assert iterations_for(1, [], 1e6) == ITERATIONS_MAX
    found = windows_after(0.6, windows, 1.0, 2)
    assert [(round(w.begin_s, 6), round(w.end_s, 6)) for w in found] == [
        (0.0, 0.1), (0.4, 0.7), (0.9, 1.1), (1.4, 1.7), (1.9, 2.1),
    ]  # fmt: skip


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_a_snapshot_that_one_iteration_does_not_carry_goes_on_in_the_next_windows(is_waited_for: bool) -> None:
    """And not beside training at the end of the first, unless training waits for it there."""
    scheduler, clock, _ = make("bubble", is_waited_for=is_waited_for)
    with scheduler.transfer(1 << 20):
        clock.sleep(1.0)  # 1 MiB/s
    for number in range(3):
        iterate(scheduler, clock, number, 1.0)
    blocked = scheduler.recorder.begin(Lane.GRADIENT, 10, 10)  # training is busy for more than an iteration
    began = clock.monotonic()
    with scheduler.transfer(3 << 19):  # twice what an iteration carries
        scheduler.gate.admit(1 << 16)
    waited_s = clock.monotonic() - began
    assert waited_s == pytest.approx(DEADLINE_SHARE + (0.0 if is_waited_for else 1.0))
    scheduler.recorder.end(blocked)


@pytest.mark.parametrize("schedule", ["bubble", "steady"])
def test_transfers_to_several_holders_share_the_time_of_one(schedule: str) -> None:
    scheduler, clock, _ = make(schedule)
    with scheduler.transfer(1 << 20):
        clock.sleep(0.1)
    for number in range(3):
        iterate(scheduler, clock, number, 1.0)
    blocked = scheduler.recorder.begin(Lane.GRADIENT, 10, 10)
    began = clock.monotonic()
    for _ in range(2):
        with scheduler.transfer(1 << 20, 2):
            for _ in range(16):
                scheduler.gate.admit(1 << 16)
    assert clock.monotonic() - began <= DEADLINE_SHARE
    scheduler.recorder.end(blocked)


def test_computing_is_what_is_left() -> None:
    spans = tuple(Span(lane=Lane.WAIT, begin_s=b, end_s=e) for b, e in ((0.2, 0.4), (0.3, 0.5), (0.9, 1.0)))
    assert computing(Timeline(iteration=1, begin_s=0, duration_s=1.0, spans=spans)) == [(0.0, 0.2), (0.5, 0.9)]
    assert typical_duration([Timeline(iteration=i, begin_s=0, duration_s=d) for i, d in enumerate((9, 1, 2))]) == 2


@pytest.mark.parametrize("schedule", ["bubble", "steady", "eager"])
def test_all_that_happens_is_drawn(schedule: str) -> None:
    scheduler, clock, drawn = make(schedule)
    iterate(scheduler, clock, 1)
    with scheduler.transfer(1 << 20):
        scheduler.gate.admit(1 << 20)
        scheduler.gate.left(1 << 20, clock.monotonic())
    lanes = [lane for lane, *_ in drawn]
    assert set(lanes) >= {"iteration", "pipeline", "compute", "replication"}
    assert ("iteration", 1) in [(lane, value) for lane, _, _, value in drawn]
    assert all(end >= begin for _, begin, end, _ in drawn)


def test_a_message_is_drawn_from_when_the_network_has_it_and_behind_the_one_before() -> None:
    scheduler, clock, drawn = make("eager")
    with scheduler.transfer(1 << 20):
        clock.sleep((1 << 20) / 1e6)  # 1 MB/s
    scheduler.cut(0)
    recorder = scheduler.recorder
    for _ in range(2):
        with spanning(recorder, Lane.PIPELINE, 50_000, 0) as span:
            clock.sleep(0.02)
            recorder.accepted(span)
    scheduler.cut(1)
    timeline = scheduler.newest_timeline
    first, second = timeline.spans
    assert first.accepted_s is not None
    assert first.accepted_s == pytest.approx(first.begin_s + 0.02)
    sent = [(begin - timeline.begin_s, end - timeline.begin_s) for lane, begin, end, _ in drawn if lane == "pipeline"]
    assert sent == [
        (pytest.approx(first.accepted_s), pytest.approx(first.accepted_s + 0.05)),
        (
            pytest.approx(first.accepted_s + 0.05),
            pytest.approx(first.accepted_s + 0.1),
        ),  # taken before, and waits its turn
    ]
    waited = [(begin - timeline.begin_s, end - timeline.begin_s) for lane, begin, end, _ in drawn if lane == "wait"]
    assert waited == [(pytest.approx(s.begin_s), pytest.approx(s.end_s)) for s in (first, second)]


def test_before_anything_is_known_nothing_is_held_back_and_all_is_afforded() -> None:
    scheduler, clock, _ = make("bubble")
    began = clock.monotonic()
    with scheduler.transfer(1 << 30):
        scheduler.gate.admit(1 << 30)
    assert clock.monotonic() == began
    assert scheduler.carries(1) == Carried(nbytes=math.inf, why="", is_settled=False)


def test_what_windows_carry_is_settled_when_all_iterations_that_count_are_known() -> None:
    scheduler, clock, _ = make("bubble")
    for number in range(TIMELINES + 1):
        assert scheduler.carries(1).is_settled == (number >= TIMELINES)
        iterate(scheduler, clock, number)


def test_a_transfer_ends_by_the_end_of_the_iteration_whatever_training_does() -> None:
    scheduler, clock, _ = make("bubble")
    for number in range(3):
        iterate(scheduler, clock, number, 0.2)
    blocked = scheduler.recorder.begin(Lane.GRADIENT, 10, 10)  # a collective that hangs
    began = clock.monotonic()
    with scheduler.transfer(1 << 20):
        scheduler.gate.admit(1 << 20)
    assert clock.monotonic() - began == pytest.approx(DEADLINE_SHARE * 0.2)
    scheduler.recorder.end(blocked)


class Training(ManualCondition):
    """While the sender waits, iterations end that take this long."""

    seconds = 0.0
    scheduler: Scheduler

    def wait(self, timeout: float | None = None) -> bool:
        self.clock.sleep(self.seconds)
        self.scheduler.cut(10)
        return True


@pytest.mark.parametrize("schedule", ["bubble", "steady"])
def test_after_a_long_first_iteration_a_snapshot_travels_for_no_more_than_two(schedule: str) -> None:
    """The first one of a run compiles, imports and connects. Training goes on meanwhile, as in a run."""
    clock = ManualClock()
    training = Training(clock)
    scheduler = Scheduler(
        schedule, HostStopwatch(clock), clock=clock, condition=training, eager_slice_bytes=1 << 20, draw=no_drawing
    )
    training.seconds, training.scheduler = 0.5, scheduler
    with scheduler.transfer(4 << 20):
        clock.sleep(0.1)
    clock.sleep(60.0)
    scheduler.cut(1)
    began = clock.monotonic()
    with scheduler.transfer(4 << 20):
        for _ in range(8):
            scheduler.gate.admit(1 << 19)
    assert clock.monotonic() - began <= 2 * 0.5
    with scheduler.transfer(4 << 20):
        for _ in range(8):
            scheduler.gate.admit(1 << 19)
    assert clock.monotonic() - began <= 4 * 0.5


def test_a_slow_link_affords_less_and_says_why() -> None:
    scheduler, clock, _ = make("bubble")
    for number in range(3):
        iterate(scheduler, clock, number, 0.1)
    with scheduler.transfer(1 << 20):  # 1 MiB in 0.1 s: about 10 MB/s, so about 0.8 MB fit an iteration
        clock.sleep(0.1)
    carries = scheduler.carries(1)
    carried, why = carries.nbytes, carries.why
    assert 400_000 < carried < 1_000_000
    assert "the network has 0.08 of 0.10 s for them" in why
    assert f"so an iteration carries {carried / 1e6:.1f} MB" in why
    assert make("eager")[0].carries(1).nbytes == math.inf
    assert scheduler.scalars()["moetion/network-mb-per-s"] == pytest.approx(10, rel=0.5)
    assert scheduler.scalars()["moetion/unplaced-mb"] == 0
    with scheduler.transfer(1 << 30):
        pass
    assert scheduler.scalars()["moetion/unplaced-mb"] > 1000


def test_a_slow_device_affords_less_too_and_replicas_share_the_network() -> None:
    scheduler, clock, drawn = make("bubble")
    for number in range(3):
        iterate(scheduler, clock, number, 0.1)
    scheduler.packed(1.0, 1.1, 1 << 20)  # about 10 MB/s
    carries = scheduler.carries(0)
    carried, why = carries.nbytes, carries.why
    assert 400_000 < carried < 1_500_000
    assert "the link from device to host has 0.10 of 0.10 s for them" in why
    assert ("device to host", 1.0, 1.1, 1 << 20) in drawn
    fast, clock, _ = make("bubble")
    for number in range(3):
        iterate(fast, clock, number, 0.1)
    fast.packed(1.0, 1.001, 1 << 20)
    with fast.transfer(1 << 20):
        clock.sleep(0.05)
    one, two = (fast.carries(n) for n in (1, 2))
    assert two.nbytes == pytest.approx(one.nbytes / 2)
    assert "for each of the 2 times that they cross it" in two.why


def test_what_a_link_has_shown_counts_in_the_next_iteration() -> None:
    """The order of a run: a vote after each cut, and packing between two of them."""
    scheduler, clock, _ = make("bubble")
    iterate(scheduler, clock, 1, 0.1)
    at_first = scheduler.carries(0).nbytes
    scheduler.packed(1.0, 1.1, 1 << 20)  # about 10 MB/s
    iterate(scheduler, clock, 2, 0.1)
    carries = scheduler.carries(0)
    assert carries.nbytes < at_first / 50
    assert "at 10 MB/s" in carries.why
    assert scheduler.scalars()["moetion/device-to-host-mb-per-s"] == pytest.approx(10, rel=0.1)


def test_steady_carries_what_training_leaves_of_the_link_until_the_deadline() -> None:
    scheduler, clock, _ = make("steady")
    assert scheduler.carries(1) == Carried(nbytes=math.inf, why="", is_settled=False)
    with scheduler.transfer(1 << 20):
        clock.sleep(1.0)  # nothing is known of iterations yet: it goes at once, and shows the link
    for number in range(3):
        with spanning(scheduler.recorder, Lane.ALL_TO_ALL, (1 << 20) // 10, 0):
            clock.sleep(1.0)
        scheduler.cut(number)
    carries = scheduler.carries(1)
    assert carries.nbytes == pytest.approx(planner.HEADROOM * (DEADLINE_SHARE - 0.1) * (1 << 20), rel=1e-5)
    assert "the network has 0.80 of 1.00 s for them" in carries.why
    with spanning(scheduler.recorder, Lane.ALL_TO_ALL, 1 << 30, 0):
        clock.sleep(1.0)
    scheduler.cut(4)
    assert scheduler.carries(1).nbytes == 0, "and never less"


def test_a_steady_transfer_takes_most_of_an_iteration_and_never_listens() -> None:
    scheduler, clock, _ = make("steady")
    for number in range(3):
        iterate(scheduler, clock, number, 1.0)
    blocked = scheduler.recorder.begin(Lane.GRADIENT, 10, 10)
    began, gone = clock.monotonic(), []
    with scheduler.transfer(4 << 20):
        for _ in range(4):
            scheduler.gate.admit(1 << 20)
            gone.append(clock.monotonic() - began)
    assert gone == [pytest.approx(DEADLINE_SHARE * n / 4) for n in range(4)]
    assert scheduler.scalars()["moetion/late-mb"] == 0
    scheduler.recorder.end(blocked)


def test_a_snapshot_that_leaves_a_device_at_a_pace_has_left_for_good_within_the_iteration() -> None:
    """It keeps its slots until then: where packing and sending take longer, every third snapshot finds none."""
    scheduler, clock, _ = make("steady", packing_share=SHARE_BEFORE_REPLICATION)
    for number in range(3):
        iterate(scheduler, clock, number, 1.0)
    began = clock.monotonic()
    clock.sleep(SHARE_BEFORE_REPLICATION * 1.0)  # its bytes leave the device
    with scheduler.transfer(4 << 20):
        for _ in range(4):
            scheduler.gate.admit(1 << 20)
        clock.sleep((DEADLINE_SHARE - SHARE_BEFORE_REPLICATION) / 4)  # the last of them travels
    assert clock.monotonic() - began == pytest.approx(DEADLINE_SHARE)
    assert scheduler.scalars()["moetion/late-mb"] == 0


def test_a_steady_transfer_has_the_same_rate_wherever_it_begins_unless_training_waits_for_it() -> None:
    """Packing at a pace of its own is over late in the iteration."""
    for is_waited_for, expected_s in ((False, DEADLINE_SHARE * 1.0 / 2), (True, LATEST_SHARE * 1.0 / 2)):
        scheduler, clock, _ = make("steady", is_waited_for=is_waited_for)
        for number in range(3):
            iterate(scheduler, clock, number, 1.0)
        clock.sleep(0.8)
        with scheduler.transfer(2 << 20):
            scheduler.gate.admit(1 << 20)
            began = clock.monotonic()
            scheduler.gate.admit(1 << 20)
        assert clock.monotonic() - began == pytest.approx(expected_s)


def test_once_the_rhythm_is_known_one_iteration_in_so_many_is_recorded() -> None:
    """Until then, and as long as iterations differ, all are."""
    scheduler, clock, _ = make("bubble", draw=no_drawing)
    known = []
    for number in range(1, TIMELINES + 2 * SAMPLE_EVERY + 2):
        iterate(scheduler, clock, number)
        known.append(scheduler.newest_timeline.iteration)
    first = TIMELINES + 1  # it was under way when the last timeline that was missing came
    assert known[:first] == list(range(1, first + 1))
    assert sorted(set(known[first:])) == [first, first + SAMPLE_EVERY, first + 2 * SAMPLE_EVERY]
    alike = [Timeline(iteration=i, begin_s=0, duration_s=1.0) for i in range(TIMELINES)]
    sent = Timeline(iteration=9, begin_s=0, duration_s=1.0, spans=(Span(Lane.PIPELINE, 0, 1, sent_bytes=1),))
    assert not records(alike, 0)
    assert records(alike, SAMPLE_EVERY - 1)
    assert records(alike[1:], 0)
    assert records([*alike[1:], sent], 0), "it sent more often"
    assert records([*alike[1:], Timeline(iteration=9, begin_s=0, duration_s=1.5)], 0), "it took longer"


def test_no_window_is_derived_from_iterations_that_took_no_step_or_ran_again() -> None:
    scheduler, clock, drawn = make("bubble")
    for number in range(1, 5):
        iterate(scheduler, clock, number, 1.0)
    scheduler.run_again()  # nothing was sent in this iteration yet: it has only begun
    iterate(scheduler, clock, 5, 1.0)
    clock.sleep(0.01)
    scheduler.cut(6, is_typical=False)
    scheduler.recorder.end(scheduler.recorder.begin(Lane.GRADIENT, 1000))
    scheduler.run_again()
    iterate(scheduler, clock, 7, 2.0)
    assert scheduler.newest_timeline.iteration == 5
    assert [value for lane, *_, value in drawn if lane == Lane.ITERATION.value] == [1, 2, 3, 4, 5, 6, 7]
    iterate(scheduler, clock, 8, 1.0)
    assert scheduler.newest_timeline.iteration == 8


def test_a_trace_shows_every_iteration() -> None:
    scheduler, clock, _ = make("bubble")
    for number in range(1, 3 * TIMELINES):
        iterate(scheduler, clock, number)
        assert scheduler.newest_timeline.iteration == number


def alone(folder: Path, state: ToyState, scheduler: Scheduler) -> Session:
    """A run of one rank in mode ``full``, without replicas."""
    prepared = prepare(
        config=MoetionConfig(mode="full", run_id="r", store=str(folder), replicas=0, pack_threads=1),
        adapter=state,
        blueprint=FullBlueprint(),
        fabric=loopback_fabrics(1)[0],
        topology="toy",
        scheduler=scheduler,
        host=Host(environment={}),
    )
    return Session(Starter(prepared).start()[0])


class Unreadable(HostStopwatch):
    """A stopwatch whose stamps cannot be read while something is wrong."""

    is_broken = False

    def seconds(self, since: float, until: float) -> float:
        if self.is_broken:
            raise StampError("an event of a capture")
        return super().seconds(since, until)


def test_timelines_that_cannot_be_read_cost_one_line_and_snapshots_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run whose stopwatch is broken for some iterations, and works again."""
    state, stopwatch = ToyState(), Unreadable(SystemClock())
    scheduler = Scheduler(
        "bubble",
        stopwatch,
        clock=SystemClock(),
        condition=threading.Condition(),
        eager_slice_bytes=1 << 20,
        draw=no_drawing,
    )
    session = alone(tmp_path, state, scheduler)
    for iteration in range(1, 10):
        stopwatch.is_broken = 3 <= iteration < 6
        session.before_optimizer_step()
        state.step(iteration)
        session.on_step_end(iteration)
        session.drain()
    scalars, stable = session.scalars(), session.stable_iteration
    session.close()
    assert scalars["moetion/timelines-dropped"] == 3
    assert scalars["moetion/snapshots-dropped"] == 0
    assert stable >= 7
    said = [r.getMessage() for r in caplog.records if "timeline" in r.getMessage()]
    assert len(said) == 1
    assert "iteration 3: a timeline of training cannot be read" in said[0]
    assert "an event of a capture" in said[0]


class FastLink(Scheduler):
    """A scheduler that sees every snapshot packed at 25 GB/s."""

    def packed(self, begin_s: float, end_s: float, nbytes: int) -> None:
        super().packed(begin_s, begin_s + nbytes / 25e9, nbytes)


def test_a_fast_device_has_no_snapshot_dropped_for_the_budget(tmp_path: Path) -> None:
    state, clock = ToyState(num_experts=0, elements=100_000), ManualClock()
    nbytes = state.inventory().nbytes
    scheduler = FastLink(
        "bubble",
        HostStopwatch(clock),
        clock=SystemClock(),
        condition=threading.Condition(),
        eager_slice_bytes=1 << 20,
        draw=no_drawing,
    )
    session = alone(tmp_path, state, scheduler)
    for iteration in range(1, 31):
        clock.now_s += nbytes / 5e9
        session.before_optimizer_step()
        state.step(iteration)
        session.on_step_end(iteration)
        session.drain()
    scalars = session.scalars()
    session.close()
    assert scalars["moetion/snapshots-dropped"] == 0
    assert scalars["moetion/device-to-host-mb-per-s"] == pytest.approx(25_000, rel=0.01)


def test_what_was_late_is_told_until_the_next_snapshot_has_left() -> None:
    scheduler, clock, _ = make("bubble")
    for number in range(3):
        iterate(scheduler, clock, number, 0.02)
    with spanning(scheduler.recorder, Lane.GRADIENT, 10, 10), scheduler.transfer(1 << 20):
        scheduler.gate.admit(1 << 20)  # beside training's own traffic, because the deadline came
    assert scheduler.scalars()["moetion/late-mb"] == pytest.approx((1 << 20) / 1e6)
    with scheduler.transfer(1 << 19):
        assert scheduler.scalars()["moetion/late-mb"] == pytest.approx((1 << 20) / 1e6)
