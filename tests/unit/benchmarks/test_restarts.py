# SPDX-License-Identifier: Apache-2.0
"""The phases of a restart, from ends and beginnings of processes, lines, and what a recovery reports."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks._restarts import PHASES, Log, Restart, losses_in, pids, process_began

SLEEP = (sys.executable, "-c", "import time; time.sleep(60)")


def rank(memory: Path, number: int) -> subprocess.Popen[bytes]:
    """A process that stands for a rank, with the note that a rank leaves."""
    process = subprocess.Popen(SLEEP)
    folder = memory / "run" / f"node{number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"rank{number:05d}.pid").write_text(json.dumps({"pid": process.pid, "rank": number, "attempt": 0}))
    return process


def test_phases_follow_one_another_and_add_up(tmp_path: Path) -> None:
    log, events, began = Log(), tmp_path / "events.jsonl", time.monotonic()
    old = [rank(tmp_path, number) for number in range(2)]
    restart = Restart(log, tmp_path, events, hurt=[1])
    log.lines.append((began - 1, "> training from iteration 0 to 9\n"))
    for process in reversed(old):
        process.kill()
        process.wait()
        time.sleep(0.05)
    new = [rank(tmp_path, number) for number in range(2)]
    seconds = {"detect": 9.0, "restart": 9.0, "survey": 0.01, "network": 0.01, "fetch": 0.01}
    for text in ("> connecting 2 rank(s)", "> 2 rank(s) are connected", "> 9 parameters on rank 0, 1 micro batches"):
        log.lines.append((time.monotonic(), f"{text}\n"))
        time.sleep(0.05)
    events.write_text(json.dumps({"event": "recovered", "time": time.time(), "phases_s": seconds}) + "\n")
    log.lines.append((trains := time.monotonic(), "> training from iteration 4 to 9\n"))
    log.lines.append((done := trains + 0.1, " [2026] iteration 5/ 9 | loss\n"))
    phases = restart.await_phases(by_torchrun=False)
    for process in new:
        process.kill()
        process.wait()
    assert tuple(phases) == PHASES
    assert sum(phases.values()) == pytest.approx(done - restart.began_s)
    assert phases["detect"] >= 0.05, "the rank that was hurt says nothing of when it was noticed"
    assert phases["kill"] == 0.0
    assert phases["survey"] == pytest.approx(0.02)
    assert phases["first step"] == pytest.approx(0.1)
    assert restart.recovered() == {"survey": 0.01, "network": 0.01, "fetch": 0.01}


def test_a_process_began_when_it_was_started() -> None:
    before = time.monotonic()
    process = subprocess.Popen(SLEEP)
    try:
        assert before - 0.5 <= process_began(process.pid) <= time.monotonic() + 0.5
    finally:
        process.kill()
        process.wait()


def test_notes_of_all_stores_are_read(tmp_path: Path) -> None:
    processes = [rank(tmp_path / str(number), number) for number in range(2)]
    for process in processes:
        process.kill()
        process.wait()
    assert pids(tmp_path) == {number: process.pid for number, process in enumerate(processes)}


def test_losses_of_all_executions_of_an_iteration(tmp_path: Path) -> None:
    lines = [{"iteration": 1, "loss_hex": "a"}, {"iteration": 1, "loss_hex": "b"}, {"iteration": 1, "validation": 0}]
    (tmp_path / "metrics").write_text("\n".join(map(json.dumps, lines)))
    assert losses_in(tmp_path / "metrics") == {1: {"a", "b"}}
