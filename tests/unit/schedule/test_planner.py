# SPDX-License-Identifier: Apache-2.0
"""Windows are what training leaves free, what finds no room in them is counted."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.schedule import planner
from megatron_moetion.schedule.planner import Window, rhythm, unplaced_bytes
from megatron_moetion.schedule.timeline import Lane, Link, Span, Timeline

RATE = 1e6


def iteration(spans: Sequence[tuple[float, float]], duration: float = 1.0, lane: Lane = Lane.PIPELINE) -> Timeline:
    """Sends that keep the network busy from begin to end at ``RATE``."""
    return Timeline(
        iteration=1,
        begin_s=0.0,
        duration_s=duration,
        spans=tuple(Span(lane=lane, begin_s=b, end_s=b, sent_bytes=round((e - b) * RATE)) for b, e in spans),
    )


def collectives(spans: Sequence[tuple[float, float]], duration: float, lane: Lane = Lane.ALL_TO_ALL) -> Timeline:
    """Collectives that last from begin to end, whatever they move."""
    found = tuple(Span(lane=lane, begin_s=b, end_s=e, sent_bytes=1000) for b, e in spans)
    return Timeline(iteration=1, begin_s=0.0, duration_s=duration, spans=found)


def windows_of(*timelines: Timeline) -> list[tuple[float, float]]:
    found = rhythm(timelines, RATE).windows
    return [(round(w.begin_s, 6), round(w.end_s, 6)) for w in found]


def test_windows_are_what_traffic_leaves() -> None:
    """Messages that overlap queue on the wire: 0.1 s and 0.25 s of bytes from 0.2 on."""
    assert windows_of(iteration([(0.2, 0.3), (0.25, 0.5), (0.9, 1.0)])) == [(0.0, 0.2), (0.55, 0.9)]


def test_no_gap_all_gap_no_iteration() -> None:
    assert windows_of(iteration([(0.0, 1.0)])) == []
    assert windows_of(iteration([])) == [(0.0, 1.0)]
    assert windows_of() == []
    assert windows_of(iteration([], duration=0.0)) == []


def test_a_send_that_returns_at_once_is_still_on_the_wire() -> None:
    """The span is empty; its bytes take 0.1 s."""
    assert windows_of(iteration([(0.4, 0.5)])) == [(0.0, 0.4), (0.5, 1.0)]


def test_a_send_that_waits_for_its_peer_is_busy_until_the_network_has_its_bytes_and_for_as_long_as_they_take() -> None:
    """Taken after 0.2 s in most iterations, later in some; then 0.1 s on the wire, and 0.2 s or more until the end."""

    def waits(accepted_s: float | None, lane: Lane = Lane.PIPELINE) -> Timeline:
        span = Span(lane=lane, begin_s=0.3, end_s=0.8, sent_bytes=round(0.1 * RATE), accepted_s=accepted_s)
        return Timeline(iteration=1, begin_s=0.0, duration_s=1.0, spans=(span,))

    assert windows_of(*[waits(0.5)] * 7, waits(0.7)) == [(0.0, 0.3), (0.6, 1.0)]
    assert windows_of(*[waits(0.5)] * 5, *[waits(0.7)] * 2) == [(0.0, 0.3), (0.6, 0.8)]
    found = rhythm([waits(0.5)], RATE)
    assert (found.sends_s, found.accepted_s) == (pytest.approx((0.3,)), pytest.approx((0.5,)))
    assert windows_of(waits(None)) == [(0.0, 0.3), (0.9, 1.0)]  # nothing better is known than that the call returned


def test_waiting_and_traffic_inside_the_node_leave_the_network_idle() -> None:
    waits = Span(lane=Lane.PIPELINE, begin_s=0.1, end_s=0.8, received_bytes=10)
    inside = Span(lane=Lane.ALL_TO_ALL, begin_s=0.1, end_s=0.8)
    assert windows_of(Timeline(iteration=1, begin_s=0, duration_s=1.0, spans=(waits, inside))) == [(0.0, 1.0)]


def test_one_odd_iteration_of_eight_changes_nothing_but_three_do() -> None:
    usual, odd = iteration([(0.5, 0.6)]), iteration([(0.2, 0.3)])
    assert windows_of(*[usual] * 7, odd) == [(0.0, 0.5), (0.6, 1.0)]
    assert windows_of(*[usual] * 5, *[odd] * 2) == [(0.0, 0.2), (0.3, 0.7)]  # the shorter gap of each


def test_iterations_that_sent_more_or_less_often_than_the_newest_do_not_count() -> None:
    usual, validated = iteration([(0.5, 0.6)]), iteration([(0.1, 0.2), (0.3, 0.4), (0.7, 0.8)])
    assert windows_of(*[validated] * 5, usual) == [(0.0, 0.5), (0.6, 1.0)]
    assert windows_of(*[usual] * 5, validated) == [(0.0, 0.1), (0.2, 0.3), (0.4, 0.7), (0.8, 1.0)]


def test_windows_count_from_the_sends_so_that_a_late_beginning_does_not_blur_the_rest() -> None:
    late = [iteration([(at + 0.1, at + 0.2), (at + 0.5, at + 0.6)], duration=at + 1.0) for at in (0.0, 0.3, 0.1, 0.4)]
    assert windows_of(*late) == [(0.0, 0.1), (0.2, 0.5), (0.6, 1.0)]
    assert rhythm(late, RATE).sends_s == pytest.approx((0.1, 0.5))


SENDS = st.lists(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=6), min_size=1, max_size=8)


@given(SENDS, st.booleans())
def test_windows_are_ordered_disjoint_and_inside(sends: list[list[tuple[float, float]]], is_pipeline: bool) -> None:
    timelines = [[(min(s), max(s)) for s in each] for each in sends]
    found = rhythm([iteration(t) if is_pipeline else collectives(t, 1.0) for t in timelines], RATE)
    ends = [0.0, *(w.end_s for w in found.windows)]
    assert all(w.begin_s >= end for w, end in zip(found.windows, ends, strict=False))
    assert all(planner.WINDOW_MIN_S <= w.duration_s <= 1 for w in found.windows)
    assert all(w.end_s <= found.duration_s <= 1 + 1e-9 for w in found.windows)
    assert list(found.sends_s) == sorted(found.sends_s)
    assert all(not w.begin_s < send < w.end_s for w in found.windows for send in found.sends_s)


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_half_an_iteration_of_jitter_only_makes_windows_smaller(seed: int) -> None:
    import random

    rng = random.Random(seed)
    jittered = [iteration([(max(0, 0.4 + j), min(1, 0.6 + j))]) for j in (rng.uniform(-0.5, 0.5) for _ in range(8))]
    found = rhythm(jittered, RATE)
    assert sum(w.duration_s for w in found.windows) <= 0.8


SIXTY_FOURTHS = st.integers(0, 40).map(lambda n: n / 64)
"""Times that are exact as floats, and so is all that follows from them at a rate that is a power of two."""
GAPS = st.lists(st.tuples(SIXTY_FOURTHS, SIXTY_FOURTHS.filter(bool)), max_size=6)


@settings(max_examples=200)
@given(GAPS, SIXTY_FOURTHS, st.integers(1, 3_000_000), st.integers(1, 300_000))
def test_what_finds_no_room_is_what_sending_chunk_by_chunk_leaves(
    gaps: list[tuple[float, float]], deadline: float, nbytes: int, chunk_bytes: int
) -> None:
    rate, at, deadline = 2.0**20, 0.0, 4 * deadline
    windows: list[Window] = []
    for gap, length in gaps:
        windows.append(Window(begin_s=at + gap, end_s=at + gap + length))
        at += gap + length
    left, room = nbytes, [int((min(w.end_s, deadline) - w.begin_s) * rate) for w in windows if w.begin_s < deadline]
    while left and sum(room) >= min(chunk_bytes, left):
        chunk = min(chunk_bytes, left)
        left -= chunk
        while chunk:
            part = min(chunk, room[0])
            chunk, room[0] = chunk - part, room[0] - part
            if not room[0]:
                room.pop(0)
    assert unplaced_bytes(windows, rate, nbytes, deadline, chunk_bytes) == left


def test_room_is_counted_in_whole_chunks_and_before_the_deadline_only() -> None:
    windows = [Window(begin_s=0.0, end_s=0.25), Window(begin_s=0.5, end_s=1.0)]
    found = [
        unplaced_bytes(windows, RATE, nbytes, deadline, 100_000)
        for nbytes, deadline in ((700_000, 9.0), (1_000_000, 9.0), (1_000_000, 0.25), (150_000, 0.25), (150_000, 0.0))
    ]
    assert found == [0, 300_000, 800_000, 0, 150_000]
    assert unplaced_bytes([], RATE, 5, 9.0, 100_000) == 5


def test_room_in_two_windows_at_once_is_counted_once() -> None:
    """A rhythm that is longer than the typical iteration runs into the next one."""
    windows = [Window(begin_s=0.0, end_s=0.5), Window(begin_s=0.25, end_s=0.75)]
    assert unplaced_bytes(windows, RATE, 1_000_000, 9.0, 50_000) == 250_000


def test_capacity_is_the_tightest_links() -> None:
    windows = {Link.D2H: [Window(begin_s=0, end_s=1)], Link.NETWORK: [Window(begin_s=0, end_s=0.5)]}
    found = planner.capacity_bytes(windows, {Link.D2H: RATE, Link.NETWORK: RATE})
    assert found == (pytest.approx(0.5 * RATE * planner.HEADROOM), Link.NETWORK)


def one_f_one_b(stage: int, stages: int, microbatches: int, chunks: int = 1) -> Timeline:
    """When a stage sends: forward results onwards, gradients back. A forward takes 1, a backward 2, a send 0.3.

    Interleaved (``chunks`` > 1): every chunk's turn is shorter, and every rank sends in both directions.
    """
    forward, backward, wire = 1.0 / chunks, 2.0 / chunks, 0.3
    warmup = min(stages - stage - 1 + (chunks - 1) * stages, microbatches * chunks)
    at, spans = stage * forward, []

    def send() -> None:
        spans.append(Span(lane=Lane.PIPELINE, begin_s=at, end_s=at, sent_bytes=round(wire * RATE)))

    steady = microbatches * chunks - warmup
    for kind in (*["f"] * warmup, *["f", "b"] * steady, *["b"] * warmup):
        at += forward if kind == "f" else backward
        is_end = stage == stages - 1 if kind == "f" else stage == 0
        if chunks > 1 or not is_end:
            send()
    return Timeline(iteration=1, begin_s=0.0, duration_s=at + 1.0, spans=tuple(spans))


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("chunks", [1, 2])
def test_pipelines_leave_windows_between_their_sends(stages: int, chunks: int) -> None:
    """1F1B and interleaved 1F1B: no window meets a send, and the bubbles are used."""
    for stage in range(stages):
        timeline = one_f_one_b(stage, stages, 8, chunks)
        sends = planner.merge([(s.begin_s, s.begin_s + s.sent_bytes / RATE) for s in timeline.spans])
        windows = rhythm([timeline] * 8, RATE).windows
        idle = sum(w.duration_s for w in windows)
        assert idle == pytest.approx(timeline.duration_s - sum(e - b for b, e in sends), abs=0.02)
        assert unplaced_bytes(windows, RATE, int(0.9 * idle * RATE), 99.0, 100_000) == 0
        for window in windows:
            assert all(window.end_s <= b + 1e-6 or window.begin_s >= e - 1e-6 for b, e in sends)


def test_without_a_pipeline_the_windows_are_around_the_gradients() -> None:
    """The whole forward and backward pass is free until gradients are reduced; then parameters are gathered."""
    assert windows_of(*[collectives([(0.7, 0.8), (0.9, 0.95)], 1.0, Lane.GRADIENT)] * 4) == [
        (0.0, 0.7), (0.8, 0.9), (0.95, 1.0),
    ]  # fmt: skip


def test_a_collective_keeps_the_link_busy_from_its_beginning_to_its_end() -> None:
    """Peers may be late by any time: windows are the time that training computes between two of them."""
    usual = [(0.05, 0.1), (0.14, 0.2), (0.24, 0.3)]
    late = [(0.05, 0.4), (0.44, 0.5), (0.54, 0.6)]
    found = rhythm([collectives(usual, 0.35)] * 4 + [collectives(late, 0.65)] * 4, RATE)
    assert [round(w.duration_s, 6) for w in found.windows] == [0.05, 0.04, 0.04, 0.05]
    assert found.accepted_s[0] == pytest.approx(0.1), "the earliest that was usual"


def test_collectives_that_overlap_are_one() -> None:
    found = rhythm([collectives([(0.1, 0.8), (0.3, 0.5)], 1.0)], RATE)
    assert [(round(w.begin_s, 6), round(w.end_s, 6)) for w in found.windows] == [(0.0, 0.1), (0.8, 1.0)]
    assert found.duration_s == pytest.approx(1.0)


def test_slices_are_as_long_as_the_windows_let_whole_ones_fill_them() -> None:
    def chosen(*durations: float) -> float:
        return planner.slice_of([Window(begin_s=n, end_s=n + d) for n, d in enumerate(durations)])

    assert chosen() == chosen(0.5, 0.3) == planner.SLICES_S[0] == 0.02
    assert chosen(0.035, 0.035) == 0.01, "a slice of 20 ms would leave 15 of 35"
    assert chosen(0.009, 0.015) == 0.005
    assert chosen(0.5, 0.5, 0.012) == 0.02, "what is short may be lost"
    assert chosen(0.001) == planner.SLICES_S[-1] == planner.WINDOW_MIN_S, "no window is too short for all"


def test_short_windows_carry_whole_slices_alone() -> None:
    windows = [Window(begin_s=0.0, end_s=0.035), Window(begin_s=1.0, end_s=1.015), Window(begin_s=2.0, end_s=2.005)]
    filled = planner.whole_slices(windows, 0.01)
    assert filled == (Window(0.0, pytest.approx(0.03)), Window(1.0, pytest.approx(1.01)))
    assert planner.whole_slices([], 0.01) == ()
