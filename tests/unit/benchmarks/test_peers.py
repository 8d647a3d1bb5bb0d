# SPDX-License-Identifier: Apache-2.0
"""The benchmark beside peers: what it says of a recovery, of a flipped bit and of costs, from what ranks wrote down."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import catalogue, environments, pages, tables
from benchmarks.peers.faults import BIT, BYTE, flip
from benchmarks.peers.judge import (
    FROM_ZERO,
    LOSSY_SOUND,
    OLDER,
    REFUSED,
    UNNOTICED,
    WHOLE,
    Truth,
    flip_verdict,
    reached,
    recovery,
)  # fmt: skip

RANKS = 4
NEWEST = 12
FLIPPED = "ff"


def step(rank: int, iteration: int, digest: str = "") -> dict[str, Any]:
    mine = digest or f"digest {rank} {iteration}"
    return {"event": "step", "iteration": iteration, "over_s": 100.0 + iteration + rank / 10, "digest": mine,
            "needle": f"{rank:02x}{iteration:02x}"}  # fmt: skip


def started(rank: int, at: int, digest: str = "", needle: str = "") -> dict[str, Any]:
    found = step(rank, at, digest)
    own = {"digest": found["digest"], "needle": needle or found["needle"]}
    return {"event": "started", "at": at, "seconds": 0.1 * (rank + 1), **own}


def steps(first: int, last: int) -> list[list[dict[str, Any]]]:
    return [[step(rank, i) for i in range(first, last + 1)] for rank in range(RANKS)]


def restarted(at: int, last: int) -> list[list[dict[str, Any]]]:
    return [[started(rank, at), *own] for rank, own in enumerate(steps(at + 1, last))]


TRUTH = Truth.of(steps(1, 20))


def test_a_bitwise_resume_is_reported_with_what_it_lost() -> None:
    before = steps(1, 13)
    before[2].pop()  # this rank was killed before the end of iteration 13
    assert reached(before) == 12
    found = recovery(before, restarted(11, 15), fault_s=112.5, truth=TRUTH)
    assert (found.resumed, found.lost, found.bitwise, found.problem) == (11, 1, True, "")
    assert found.load_s == pytest.approx(0.4)
    assert found.seconds == pytest.approx(100 + 12 + 0.3 - 112.5)


@pytest.mark.parametrize("late", [False, True])
def test_a_resume_that_is_not_bitwise_is_reported(late: bool) -> None:
    after = restarted(11, 15)
    if late:
        after[3][-1]["digest"] = "other"  # as where random generators were not restored
    else:
        after[3][0]["digest"] = "other"
    assert recovery(steps(1, 12), after, 112.5, TRUTH).bitwise is False


def test_ranks_that_come_back_to_different_iterations_are_no_recovery() -> None:
    after = restarted(11, 15)
    after[0][0]["at"] = 10
    found = recovery(steps(1, 12), after, 112.5, TRUTH)
    assert (found.resumed, found.bitwise) == (None, False)
    assert "10, 11" in found.problem


def test_what_begins_from_zero_or_does_not_come_back_is_no_recovery() -> None:
    from_zero = recovery(steps(1, 12), restarted(0, 3), 112.5, TRUTH)
    assert (from_zero.resumed, from_zero.lost, from_zero.bitwise) == (None, 12, None)
    assert "no copy" in from_zero.problem
    gone = restarted(11, 15)
    gone[1] = []
    assert recovery(steps(1, 12), gone, 112.5, TRUTH).problem == "not every rank came back"


def verdict(after: Sequence[Sequence[dict[str, Any]]]) -> str:
    return flip_verdict(after, NEWEST, 1, FLIPPED, TRUTH)


def test_a_flipped_bit_that_is_restored_is_reported() -> None:
    after = restarted(NEWEST, 15)
    after[1][0] = started(1, NEWEST, "other", FLIPPED)
    assert verdict(after) == UNNOTICED


def test_a_flipped_bit_that_was_changed_by_replayed_steps_is_reported() -> None:
    after = restarted(NEWEST, 15)
    after[1][0] = started(1, NEWEST, "other", "ee")
    assert verdict(after) == UNNOTICED


def test_a_copy_that_differs_elsewhere_is_reported_though_the_marked_bytes_are_right() -> None:
    after = restarted(NEWEST, 15)
    after[1][0] = started(1, NEWEST, "other")
    assert verdict(after) == UNNOTICED


def test_what_notices_a_flipped_bit_has_names() -> None:
    assert verdict(restarted(NEWEST, 15)) == WHOLE
    assert verdict(restarted(NEWEST - 1, 15)) == OLDER
    assert verdict(restarted(0, 3)) == FROM_ZERO
    refused = restarted(NEWEST, 15)
    refused[1] = []
    assert verdict(refused) == REFUSED


def test_a_mode_that_restores_older_state_by_design_is_judged_by_the_marked_bytes() -> None:
    after = [[started(rank, NEWEST, f"stale {rank}")] for rank in range(RANKS)]
    after[1][0]["needle"] = step(1, NEWEST - 4)["needle"]
    assert verdict(after) == LOSSY_SOUND
    after[1][0]["needle"] = FLIPPED
    assert verdict(after) == UNNOTICED
    after[1][0]["needle"] = step(1, NEWEST + 1)["needle"]  # a state that this run had not reached
    assert verdict(after) == UNNOTICED


def test_a_bit_is_flipped_in_the_newest_copy_and_nowhere_else(tmp_path: Path) -> None:
    older, newest = bytes(range(64)), bytes(range(1, 65))
    for name, content in (("a", older), ("b", b"." * 100 + newest + b"." * 100), ("c", newest), ("small", b".")):
        (tmp_path / name).write_bytes(content)
    found = flip(sorted(tmp_path.iterdir()), {3: older.hex(), 4: newest.hex(), 5: "ee" * 64})
    assert found is not None
    assert (found["copy_of"], found["file"], found["offset"]) == (4, "b", 100)
    right = b"." * 100 + newest + b"." * 100
    differing = [
        i for i, (now, then) in enumerate(zip((tmp_path / "b").read_bytes(), right, strict=True)) if now != then
    ]
    assert differing == [100 + BYTE]
    assert bytes.fromhex(found["bytes"])[BYTE] == newest[BYTE] ^ 1 << BIT
    assert (tmp_path / "a").read_bytes() == older
    assert (tmp_path / "c").read_bytes() == newest
    assert flip([tmp_path / "a"], {4: newest.hex()}) is None


def measured(each_s: float, whole: int, sent: int) -> dict[str, Any]:
    """Two cycles of four ranks; 1 s an iteration, training alone sends 100 bytes and takes 1 CPU second in each."""
    ranks = []
    for rank in range(RANKS):
        host = rank % 2 == 0
        events: list[dict[str, Any]] = []
        for cycle in range(2):
            for arm, seconds, counted, copies in (
                ("off", 1.0, 4, 0),
                ("each", each_s, 4, whole),
                ("rarely", 1.1, 10, 1),
            ):
                events.append({
                    "event": "block", "cycle": cycle, "arm": arm, "iterations": counted, "seconds": [seconds] * counted,
                    "stalls": [(rank + 1) * 0.01] * counted, "whole": copies, "cpu_s": counted + copies * 0.5,
                    "sent": (counted * 100 + copies * sent) if host else 0,
                })  # fmt: skip
        events.append({"event": "memory", "private": 1000 + 10 * whole, "shared": 5 * whole if host else 0})
        events.append({"event": "ended", "state_bytes": 12})
        ranks.append(events)
    return {"ranks": ranks}


def test_costs_are_ratios_within_a_run_and_counted_for_each_whole_copy() -> None:
    found = tables.cost(measured(1.5, whole=2, sent=50), measured(1.0, whole=0, sent=0), rare=True)
    assert (found.each, found.rarely, found.each_cycles) == (1.5, pytest.approx(1.1), (1.5, 1.5))
    assert found.stall_s == 0.04  # of the slowest rank
    assert found.whole == 0.5
    assert found.cpu_s == pytest.approx(RANKS * 0.5)
    assert found.sent == pytest.approx(2 * 50)  # two hosts
    assert found.memory == RANKS * 20 + 2 * 10
    assert found.state == RANKS * 12
    needs_each = tables.cost(measured(1.5, whole=4, sent=50), None, rare=False)
    assert (needs_each.rarely, needs_each.memory, needs_each.whole) == (None, None, 1.0)


def test_a_single_cycle_has_the_range_of_its_iterations_without_copies() -> None:
    record = measured(1.5, 4, 0)
    for events in record["ranks"]:
        events[:] = [event for event in events if event.get("cycle", 0) == 0]
        events[0]["seconds"] = [0.75, 1.0, 1.0, 1.25]
    assert tables.cost(record, None, rare=True).each_cycles == (1.2, 1.5, 2.0)


def test_tables_name_what_was_not_measured(tmp_path: Path) -> None:
    (tmp_path / "torch-save-2x2-free.json").write_text(json.dumps(measured(1.5, 4, 0)))
    lost = {"resumed": None, "lost": 12, "seconds": 9.0, "load_s": 0.1, "bitwise": None, "problem": "no copy\nmore"}
    (tmp_path / "torch-save-lost-host.json").write_text(json.dumps(lost))
    (tmp_path / "torch-save-flipped-bit.json").write_text(json.dumps({"verdict": UNNOTICED}))
    records = tables.read(tmp_path)
    assert (
        f"| torch.save to /dev/shm | {tables.MISSING} | **not recovered** | **restored unnoticed** | 1.50 (1.50 to"
        in tables.summary(records)
    )
    text = tables.render(records)
    assert "| torch.save to /dev/shm | 1.50 (1.50 to 1.50) | 1.10" in text
    assert (
        f"| torch.save to /dev/shm | {tables.MISSING} | **not recovered**: no copy | **restored unnoticed** |" in text
    )
    assert all(absent.reason in text for absent in catalogue.ABSENT.values())


def test_slow_links_are_told_with_the_copies_that_became_whole(tmp_path: Path) -> None:
    for name, each_s, whole, sent in (("torch-save", 1.2, 4, 0), ("lm", 2.5, 4, 50), ("full", 1.3, 2, 50)):
        (tmp_path / f"{name}-2x2-slow.json").write_text(json.dumps(measured(each_s, whole, sent)))
    records = tables.read(tmp_path)
    full = next(line for line in tables.summary(records).splitlines() if line.startswith("| ours, full"))
    assert full.endswith(f"| {tables.MISSING} | 1.30 (1.30 to 1.30); 50% |")
    best = {line.split(" | ")[0].strip("| "): line for line in tables.best_table(records).splitlines()}
    assert "1.20 (1.20 to 1.20) torch.save" in best["the same, 400 Mbit/s links"]
    senders = best["the same, 400 Mbit/s links, systems that send copies to another host"]
    assert "2.50 (2.50 to 2.50) lm-resiliency" in senders
    assert "1.30 (1.30 to 1.30) ours, full" in senders


def test_every_system_has_requirements_and_a_module() -> None:
    for peer in catalogue.PEERS.values():
        assert (environments.REQUIREMENTS / f"{peer.environment}.txt").is_file()
        module = peer.system.partition(":")[0]
        assert not module or (environments.HERE / "systems" / f"{module}.py").is_file()


def test_pages_show_the_committed_results() -> None:
    root = Path(tables.__file__).parents[2]
    records = tables.read(root / "benchmarks" / "results" / "peers")
    for page, table in (("docs/peers.md", tables.render(records)), ("README.md", tables.summary(records))):
        text = (root / page).read_text()
        assert pages.filled(text, table) == text


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="has no lines"):
        pages.filled("a page", "a table")
