# SPDX-License-Identifier: Apache-2.0
"""Log lines are rare and carry rank and iteration; events are JSON lines."""

from __future__ import annotations

import json
import logging
from functools import reduce
from pathlib import Path

import pytest
from support import ManualClock

from megatron_moetion.clock import SystemClock
from megatron_moetion.observe.journal import PATIENCE_S, Journal, Phases
from megatron_moetion.observe.notes import KINDS, TEXT_CHARS
from megatron_moetion.replicate.notes import merge_notes


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


def test_trouble_of_many_ranks_is_said_once_by_rank_0(lines: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    journals = [Journal(rank, 0, path if rank == 0 else None, SystemClock()) for rank in range(8)]
    for journal in journals:
        journal.share()
    rounds = ([6, 5], [7], [], [3, 4, 5])  # the ranks that report it, before each round
    for iteration, ranks in enumerate(rounds):
        for rank in ranks:
            journals[rank].warn_once("disk", iteration, f"disk {rank} is full")
        told = reduce(merge_notes, (journal.take_notes() for journal in journals))
        for journal in journals:
            journal.hear(told)
    assert lines.messages == [
        "[moetion] 2 ranks, first rank 5 iteration 0: disk 5 is full",
        "[moetion] 5 ranks, first rank 3 iteration 3: disk 3 is full",
    ]
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["event"], e["kind"], e["ranks"], e["first"]) for e in events] == [
        ("trouble", "disk", 2, 5),
        ("trouble", "disk", 5, 3),
    ]


def test_a_single_ranks_trouble_reads_as_if_it_had_said_it(lines: pytest.LogCaptureFixture) -> None:
    teller, listener = Journal(3, 0, None, SystemClock()), Journal(0, 0, None, SystemClock())
    for journal in (teller, listener):
        journal.share()
    teller.warn_once("disk", 17, "the disk is full")
    listener.hear(teller.take_notes())
    assert lines.messages == ["[moetion] rank 3 iteration 17: the disk is full"]


def test_a_rank_whose_trouble_is_not_heard_of_says_it_itself(lines: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    journal = Journal(3, 0, None, clock)
    journal.share()
    journal.warn_once("disk", 17, "the disk is full")
    told = journal.take_notes()
    assert list(told) == ["disk"]
    clock.sleep(PATIENCE_S)
    assert not journal.take_notes()
    assert not lines.messages
    clock.sleep(1)
    assert not journal.take_notes()
    journal.hear(told)  # the others have it at last
    clock.sleep(2 * PATIENCE_S)
    assert not journal.take_notes()
    assert lines.messages == ["[moetion] rank 3 iteration 17: the disk is full"]


def test_what_is_on_its_way_when_a_run_ends_is_said(lines: pytest.LogCaptureFixture) -> None:
    journal = Journal(3, 0, None, SystemClock())
    journal.share()
    journal.warn_once("disk", 17, "the disk is full")
    journal.take_notes()
    journal.warn_once("late", 18, "it is late")
    journal.unshare()
    journal.warn_once("summary", 18, "no summary")
    assert lines.messages == [
        "[moetion] rank 3 iteration 17: the disk is full",
        "[moetion] rank 3 iteration 18: it is late",
        "[moetion] rank 3 iteration 18: no summary",
    ]


def test_no_round_carries_more_kinds_than_its_limit_and_none_is_forgotten() -> None:
    journal = Journal(3, 0, None, SystemClock())
    journal.share()
    for number in range(KINDS + 3):
        journal.warn_once(f"kind {number}", 0, "x" * 10_000)
    first, second = journal.take_notes(), journal.take_notes()
    assert (len(first), len(second)) == (KINDS, 3)
    assert all(len(note.text) == TEXT_CHARS for note in [*first.values(), *second.values()])


def test_a_journal_remembers_a_bounded_number_of_kinds(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(0, 0, None, SystemClock())
    for iteration in range(3000):
        journal.warn_once(f"holder {iteration}", iteration, "a holder is away")
    said = len(caplog.records)
    journal.warn_once("holder 2999", 3000, "a holder is away")
    assert len(caplog.records) == said == 3000
    journal.warn_once("holder 0", 3000, "a holder is away")
    assert len(caplog.records) == said + 1, "forgotten long ago, so it is said again"
