# SPDX-License-Identifier: Apache-2.0
"""What do the hooks on training's traffic cost the training thread?

One process, no network. An iteration has 4,000 spans; its cost is that of marking them, and of ``Scheduler.cut`` and
``carries``, which read the marks and derive windows. Two machines are stood in for: the host computes (its clock,
schedule ``bubble``, where every send is told to the pacer), and a GPU does (events that cost nothing to record,
schedule ``steady``, where nobody listens). A real event costs the driver's call besides, which this does not measure.

Once the rhythm is known, one iteration in ``SAMPLE_EVERY`` is recorded. Reported are a recorded iteration, one that is
not, and the mean of a run that goes on; each is a median over iterations of the thread's processor time, divided by the
spans. The target is 0.2% of an iteration of 4 s. The token dispatcher's hook is measured forward and backward on a
small autograd graph, less the same graph without it, and without ``cut``: half of it is what torch takes for hooks on
nodes of the graph.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SPANS = 4000
ITERATION_S = 4.0
TARGET_SHARE = 0.002
ITERATIONS, QUICK_ITERATIONS = 96, 32
PAUSE_S = 0.1
"""Between iterations, so that they take alike long on a machine that does other things too."""
SEND_BYTES = 1 << 20
CALLS = 4000
"""Of the dispatcher, each with two spans."""
MACHINES = (("host", "bubble"), ("GPU, events stubbed", "steady"))


class FreeEvent:
    """An event of a device on which nothing takes time."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """Nothing is enqueued."""

    def query(self) -> bool:
        """It is over."""
        return True

    def elapsed_time(self, until: FreeEvent) -> float:
        """Milliseconds: all events are alike."""
        return 1.0


def main() -> int:
    """Measure and report."""
    from benchmarks._common import Result, at_most, parser, report
    from megatron_moetion.schedule.scheduler import SAMPLE_EVERY

    args = parser(__doc__ or "").parse_args()
    count = QUICK_ITERATIONS if args.quick else ITERATIONS
    target_us = TARGET_SHARE * ITERATION_S / SPANS * 1e6
    results: list[Result] = []
    for machine, schedule in MACHINES:
        for what, costs in (
            ("spans of a pipeline", iteration_us(schedule, count)),
            ("the token dispatcher's", tuple(dispatcher_us(schedule, is_recorded) for is_recorded in (True, False))),
        ):
            name, (recorded, other) = f"{machine}, {schedule}: {what}", costs
            mean = (recorded + (SAMPLE_EVERY - 1) * other) / SAMPLE_EVERY
            results += [
                Result(name=f"{name}, in an iteration that is recorded", value=recorded, unit="us/span"),
                Result(name=f"{name}, in one that is not", value=other, unit="us/span"),
                at_most(f"{name}, in a run that goes on", mean, "us/span", target_us),
            ]
    report("hook_cost", results, args.json, [f"{SPANS} spans an iteration, {count} iterations"])
    return 0


def make_scheduler(schedule: str) -> Any:
    """A scheduler of a machine that this schedule is for."""
    from megatron_moetion.clock import SystemClock
    from megatron_moetion.schedule.recorder import EventStopwatch, HostStopwatch
    from megatron_moetion.schedule.scheduler import Scheduler, no_drawing

    clock = SystemClock()
    return Scheduler(
        schedule,
        HostStopwatch(clock) if schedule == "bubble" else EventStopwatch(FreeEvent),
        clock=clock,
        condition=threading.Condition(),
        eager_slice_bytes=1 << 20,
        draw=no_drawing,
    )


def iteration_us(schedule: str, count: int) -> tuple[float, float]:
    """Microseconds a span, in iterations that are recorded and in those that are not."""
    from megatron_moetion.schedule.timeline import Lane

    scheduler = make_scheduler(schedule)
    recorder = scheduler.recorder
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(1, count + 1):
        time.sleep(PAUSE_S)
        began = time.thread_time()
        for _ in range(SPANS):
            span = recorder.begin(Lane.PIPELINE, SEND_BYTES, SEND_BYTES)
            recorder.accepted(span)
            recorder.end(span)
        scheduler.cut(number)
        scheduler.carries(1)
        took = time.thread_time() - began
        found[scheduler.newest_timeline.iteration == number].append(took / SPANS * 1e6)
    return statistics.median(found[True]), statistics.median(found[False])


def dispatcher_us(schedule: str, is_recorded: bool) -> float:
    """Microseconds a span that the hook adds to a call of the dispatcher and its backward pass."""
    import torch

    from megatron_moetion.mcore.replace import replace_method
    from megatron_moetion.mcore.traffic import dispatcher_hook

    recorder = make_scheduler(schedule).recorder
    recorder.cut(0, records_next=is_recorded)
    hooked = SimpleNamespace(exchange=lambda hidden: hidden * 1.0)
    plain = SimpleNamespace(exchange=lambda hidden: hidden * 1.0)
    source = torch.zeros(64, requires_grad=True)

    def seconds(owner: Any) -> float:
        began = time.thread_time()
        for _ in range(50):
            owner.exchange(source * 1.0).sum().backward()
        return time.thread_time() - began

    with ExitStack() as undo:
        replace_method(hooked, "exchange", dispatcher_hook(recorder, 0.5), undo)
        pairs = []
        for _ in range(CALLS // 50):
            pairs.append(seconds(hooked) - seconds(plain))
            recorder.cut(0, records_next=is_recorded)
    return statistics.median(pairs) / 50 / 2 * 1e6


if __name__ == "__main__":
    sys.exit(main())
