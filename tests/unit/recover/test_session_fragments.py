# SPDX-License-Identifier: Apache-2.0
"""A job whose nodes keep fragments of each other's snapshots: what it loses, and what it comes back with."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path

import pytest
from session_job import Job

FOUR = {"ranks": 4, "replicas": 2, "coding_nodes": 4}
"""Any two fragments of three rebuild a capture."""


def lose(folder: Path, *ranks: int) -> None:
    """The memory of these ranks' nodes is gone."""
    for rank in ranks:
        shutil.rmtree(folder / "job" / f"node{rank}")


def trained(folder: Path, steps: int = 3, **settings: object) -> tuple[int, list[bytes]]:
    """A job's last iteration and state; its processes have ended."""
    job = Job(folder, **{**FOUR, **settings})  # type: ignore[arg-type]
    job.start()
    images = job.train(steps)
    assert all(s.running.agreement.redundancy == job.config.replicas for s in job.sessions)
    job.crash()
    return job.iteration, images


def again(folder: Path, attempt: int = 1, **settings: object) -> tuple[Job, list[int]]:
    """The job after a restart, and the iterations that its ranks are at."""
    job = Job(folder, attempt=attempt, **{**FOUR, **settings})  # type: ignore[arg-type]
    return job, [r.iteration for r in job.start() if r is not None]


@pytest.mark.parametrize("mode", ["full", "popularity", "exact"])
def test_any_two_nodes_may_vanish(tmp_path: Path, mode: str) -> None:
    last, before = trained(tmp_path, mode=mode)
    for attempt, lost in enumerate(combinations(range(4), 2), 1):
        lose(tmp_path, *lost)
        job, iterations = again(tmp_path, attempt, mode=mode)
        assert iterations == [last] * 4
        assert [s.image() for s in job.states] == before
        assert all(s.running.pipeline.redundancy(last) >= 0 for s in job.sessions)
        before = job.train(2)
        last = job.iteration
        job.crash()
