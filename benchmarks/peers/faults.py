# SPDX-License-Identifier: Apache-2.0
"""The same faults for every system: a killed rank, a lost host, and one flipped bit in a copy that recovery reads."""

from __future__ import annotations

import mmap
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers.jobs import RANKS, RANKS_PER_HOST, Job, JobStuck
from benchmarks.peers.judge import REFUSED, Events, Truth, flip_verdict, reached, recovery

TRAINED_ON = 3
"""Iterations that are compared after the one that a run came back to."""
TRUTH_UNTIL = 20
KILLED_RANK, LOST_HOST, FLIPPED_RANK = 3, 1, 1
START_LIMIT_S, RESTART_LIMIT_S = 180.0, 120.0
BYTE, BIT = 34, 3
"""Of the marked bytes: a bit in the middle of a mantissa, which changes a value by about 1%."""


def run_truth(job: Job) -> Truth:
    """Train without a fault, and without any system."""
    job.start("train", "--digests", "--until", str(TRUTH_UNTIL))
    job.await_all(_said("ended"), START_LIMIT_S)
    return Truth.of(_events(job))


def run_killed_rank(job: Job, truth: Truth, fault_at: int) -> dict[str, Any]:
    """SIGKILL to one rank in the middle of an iteration; the others get SIGTERM, and all are started again.

    ``fault_at``: the iteration that all ranks have finished when a fault comes.
    """

    def fault() -> None:
        job.kill(KILLED_RANK)
        job.end_survivors()

    return _run_fault(job, truth, fault, fault_at)


def run_lost_host(job: Job, truth: Truth, fault_at: int) -> dict[str, Any]:
    """A host goes with its processes and its memory, and an empty one takes its place."""

    def fault() -> None:
        job.testbed.lose(LOST_HOST, silent=False)
        job.end_survivors(range(RANKS_PER_HOST))
        job.testbed.restore(LOST_HOST)

    return _run_fault(job, truth, fault, fault_at)


def _run_fault(job: Job, truth: Truth, fault: Callable[[], None], fault_at: int) -> dict[str, Any]:
    job.start("train", "--until", "100000")
    job.await_all(_has_step(fault_at), START_LIMIT_S)
    before = _events(job)
    time.sleep(_iteration_s(before[0]) / 2)
    began = time.monotonic()
    fault()
    before = _events(job)
    job.start("train", "--digests", "--until", str(reached(before) + TRAINED_ON))
    problem = ""
    try:
        job.await_all(_said("ended"), RESTART_LIMIT_S)
    except JobStuck as error:
        problem = str(error)
    found = recovery(before, _events(job), began, truth)
    job.end()
    return asdict(found) | ({"problem": problem} if problem else {})


def run_flipped_bit(job: Job, truth: Truth, fault_at: int) -> dict[str, Any]:
    """All copies are whole and all ranks are ended with SIGTERM; then one bit of a copy is flipped, and they start."""
    job.start("train", "--until", "100000", "--hold-at", str(fault_at))
    job.await_all(_said("held"), START_LIMIT_S)
    job.end_survivors()
    flipped = flip(_files(job), truth.needles[FLIPPED_RANK])
    if flipped is None:
        return {"verdict": None, "problem": "the marked bytes are in no copy"}
    job.start("train", "--digests", "--until", str(fault_at + TRAINED_ON))
    problem = ""
    try:
        job.await_all(_has_step(1), RESTART_LIMIT_S)
    except JobStuck as error:
        problem = str(error)
    verdict = flip_verdict(_events(job), fault_at, FLIPPED_RANK, flipped["bytes"], truth)
    starts = [event for events in _events(job) for event in events if event["event"] == "started"]
    job.end()
    said = {"words": problem} if verdict == REFUSED else {"problem": problem} if problem else {}
    return {"verdict": verdict, "resumed": sorted({start["at"] for start in starts}), **flipped, **said}


def flip(files: Iterable[Path], needles: Mapping[int, str]) -> dict[str, Any] | None:
    """Flip a bit in the newest of the marked bytes that a file has; where it was, and what is there now."""
    listed = [path for path in files if path.stat().st_size >= len(next(iter(needles.values()))) // 2]
    for iteration in sorted(needles, reverse=True):
        right = bytes.fromhex(needles[iteration])
        for path in listed:
            with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as content:
                place = content.find(right)
                if place < 0:
                    continue
                content[place + BYTE] ^= 1 << BIT
                now = content[place : place + len(right)]
                return {"copy_of": iteration, "file": path.name, "offset": place, "bytes": now.hex()}
    return None


def _files(job: Job) -> list[Path]:
    """Those in the memory of the host whose rank is hit, then those on the disk that all hosts see."""
    memory = job.testbed.memory(FLIPPED_RANK // RANKS_PER_HOST)  # all of it: DLRover's copies are in no folder
    return [path for folder in (memory, job.shared) for path in sorted(folder.rglob("*")) if path.is_file()]


def _events(job: Job) -> list[Events]:
    return [job.events(rank) for rank in range(RANKS)]


def _said(event: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda found: found["event"] == event


def _has_step(iteration: int) -> Callable[[Mapping[str, Any]], bool]:
    return lambda found: found["event"] == "step" and found["iteration"] >= iteration


def _iteration_s(events: Events) -> float:
    moments = [event["over_s"] for event in events if event["event"] == "step"]
    return (moments[-1] - moments[0]) / max(1, len(moments) - 1)
