# SPDX-License-Identifier: Apache-2.0
"""Log lines are rare and carry rank and iteration; events are JSON lines."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from megatron_moetion.clock import SystemClock
from megatron_moetion.observe.journal import Journal, Phases


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("megatron_moetion"), "propagate", True)
    caplog.set_level(logging.INFO, logger="megatron_moetion")
    return caplog


def test_lines_carry_rank_and_iteration(lines: pytest.LogCaptureFixture) -> None:
    Journal(3, 0, None, SystemClock()).info(17, "something")
    assert lines.messages == ["[moetion] rank 3 iteration 17: something"]


def test_trouble_of_one_kind_is_said_once(lines: pytest.LogCaptureFixture) -> None:
    journal = Journal(0, 0, None, SystemClock())
    for iteration in range(5):
        journal.warn_once("late", iteration, "late")
        journal.warn_once("refused", iteration, "refused")
    assert lines.messages == ["[moetion] rank 0 iteration 0: late", "[moetion] rank 0 iteration 0: refused"]


def test_events_are_appended_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "events.jsonl"
    Journal(0, 0, path, SystemClock()).event("summary", snapshots=3)
    Journal(0, 1, path, SystemClock()).event("recovered", iteration=9, phases_s={"fetch": 0.5})
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["event"], first["attempt"], first["rank"], first["snapshots"]) == ("summary", 0, 0, 3)
    assert (second["event"], second["attempt"], second["phases_s"]) == ("recovered", 1, {"fetch": 0.5})
    assert second["time"] >= first["time"]


def test_no_path_no_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Journal(0, 0, None, SystemClock()).event("summary")
    assert list(tmp_path.iterdir()) == []


def test_phases_add_up() -> None:
    phases = Phases(SystemClock())
    for name in ("survey", "fetch", "survey"):
        phases.done(name)
    assert list(phases.seconds) == ["survey", "fetch"]
    assert all(s >= 0 for s in phases.seconds.values())
