# SPDX-License-Identifier: Apache-2.0
"""Stores for tests of the tools: what a job of two ranks has left, and a job of another process that still trains."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from session_job import Job

OPTIONS = {"full": {}, "popularity": {"experts_per_snapshot": 1}}
"""Settings of a job, by mode."""


def left_by_a_job(store: Path, run_id: str = "tools-run", mode: str = "full", late: int = 0) -> list[Path]:
    """The folders of both nodes of a job that has crashed after 6 steps. ``late``: rank 1 drops this snapshot."""
    job = Job(store, mode=mode, run_id=run_id, **OPTIONS[mode])
    job.start()
    job.drop(1, {late})
    job.train(6)
    job.crash()
    job._end()
    return [store / run_id / f"node{n}" for n in range(2)]


@contextmanager
def living_job(store: Path, run_id: str = "tools-run", mode: str = "full") -> Iterator[subprocess.Popen[str]]:
    """A process in which a job trains until the end; it has taken its first step."""
    command = [sys.executable, __file__, str(store), run_id, mode]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "training\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _train(store: Path, run_id: str, mode: str) -> None:
    job = Job(store, mode=mode, run_id=run_id, elements=60_000, **OPTIONS[mode])
    job.start()
    job.train(1)
    print("training", flush=True)
    while True:
        job.train(1)


if __name__ == "__main__":
    _train(Path(sys.argv[1]), *sys.argv[2:])
