# SPDX-License-Identifier: Apache-2.0
"""Timelines of a real device: CUDA graphs that are captured and replayed, and streams that are behind."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from megatron_moetion.clock import SystemClock
from megatron_moetion.schedule.recorder import EventStopwatch, Recorder
from megatron_moetion.schedule.timeline import Lane, Timeline

BUSY_CYCLES = 500_000_000


def recording(is_capturing: Callable[[], bool] | None) -> Recorder:
    return Recorder(EventStopwatch(torch.cuda.Event, is_capturing), SystemClock())


def cut(recorder: Recorder, number: int) -> Timeline | None:
    """The timeline of an iteration that ends here, read after the device has come to its end."""
    assert recorder.cut(number) is None or number > 1
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)  # the end of the next one is not known at its cut
    return recorder.cut(number + 1)


def test_a_span_lasts_as_long_as_the_device_works() -> None:
    recorder = recording(None)
    source = torch.ones(4096, 4096, device="cuda")
    span = recorder.begin(Lane.ALL_TO_ALL, 9, 9)
    for _ in range(20):
        source = source @ source * 0
    recorder.end(span)
    torch.cuda._sleep(BUSY_CYCLES)
    found = cut(recorder, 1)
    assert found is not None
    (seen,) = found.spans
    assert 0 <= seen.begin_s < seen.end_s <= found.duration_s
    assert recorder.num_dropped == 0


@pytest.mark.parametrize("asks", [True, False])
def test_a_graph_is_captured_with_hooks_in_it_and_costs_its_timeline_alone(asks: bool) -> None:
    """Where the stopwatch does not ask, events become part of the graph, and reading them fails."""
    recorder = recording(torch.cuda.is_current_stream_capturing if asks else None)
    source = torch.ones(1024, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        span = recorder.begin(Lane.ALL_TO_ALL, 9, 9)
        result = source * 2
        recorder.end(span)
    graph.replay()
    torch.cuda._sleep(BUSY_CYCLES)
    assert cut(recorder, 1) is None
    assert recorder.num_dropped == 1
    assert torch.equal(result, source * 2), "the graph is whole"
    recorder.end(recorder.begin(Lane.ALL_TO_ALL, 9, 9))
    found = cut(recorder, 3)
    assert found is not None
    assert recorder.num_dropped == 1


def test_a_span_on_a_stream_that_is_behind_costs_its_timeline_alone() -> None:
    recorder, side = recording(None), torch.cuda.Stream()
    span = recorder.begin(Lane.ALL_TO_ALL, 9, 9)
    with torch.cuda.stream(side):
        torch.cuda._sleep(4 * BUSY_CYCLES)
        recorder.end(span)
    assert recorder.cut(1) is None
    torch.cuda.current_stream().synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    assert recorder.cut(2) is None
    assert recorder.num_dropped == 1
    assert cut(recorder, 3) is not None
