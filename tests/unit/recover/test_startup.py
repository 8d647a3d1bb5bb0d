# SPDX-License-Identifier: Apache-2.0
"""Whole sessions of two ranks in one process: start, train, drop, fail, recover, go on."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from session_job import Job
from support import together

from megatron_moetion.errors import ChannelError, ConfigError, IdentityMismatch, NothingRecoverable


def trained(folder: Path, steps: int) -> Job:
    job = Job(folder)
    job.start()
    job.train(steps)
    return job


def reference(folder: Path, steps: int) -> list[bytes]:
    job = Job(folder / "reference")
    job.start()
    images = job.train(steps)
    job.crash()
    return images


@pytest.mark.parametrize("lost_node", [None, 0, 1])
def test_mode_full_goes_on_bitwise(tmp_path: Path, lost_node: int | None) -> None:
    expected = reference(tmp_path, 12)
    first = Job(tmp_path)
    assert first.start() == [None, None]
    first.train(7)
    first.crash()
    if lost_node is not None:
        shutil.rmtree(tmp_path / "job" / f"node{lost_node}")
    second = Job(tmp_path, attempt=1)
    resumed = second.start()[0]
    assert resumed is not None
    assert (resumed.iteration, resumed.epoch, resumed.lost_tokens) == (7, 1, 0)
    assert [s.resyncs for s in second.states] == [1, 1]
    assert second.train(12 - 7) == expected
    second.crash()


def test_two_faults_in_a_row_with_a_dead_history_about(tmp_path: Path) -> None:
    expected = reference(tmp_path, 12)
    for attempt, (steps, lost) in enumerate([(4, 1), (3, 0), (2, None)]):
        job = Job(tmp_path, attempt=attempt)
        job.start()
        job.train(steps)
        job.crash()
        if lost is not None:
            shutil.rmtree(tmp_path / "job" / f"node{lost}")
    last = Job(tmp_path, attempt=3)
    resumed = last.start()[0]
    assert resumed is not None
    assert (resumed.iteration, resumed.epoch) == (9, 3)
    assert last.train(3) == expected
    last.crash()


def test_a_crash_loop_of_any_length_loses_nothing_where_it_is_not_limited(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.start()
    images = job.train(3)
    job.crash()
    for attempt in range(1, 36):
        job = Job(tmp_path, attempt=attempt, max_fruitless_recoveries=0)
        resumed = job.start()[0]
        assert resumed is not None
        assert (resumed.iteration, resumed.epoch) == (3, attempt)
        assert [s.image() for s in job.states] == images
        job.crash()


@pytest.mark.parametrize("mode", ["full", "popularity"])
@pytest.mark.parametrize("late", [{(0, 3), (0, 4)}, {(0, 3), (1, 4)}, {(0, 3), (0, 4), (0, 5), (1, 6), (1, 7)}])
def test_snapshots_become_stable_again_after_drops(tmp_path: Path, mode: str, late: set[tuple[int, int]]) -> None:
    job = Job(tmp_path, mode=mode)
    job.start()
    for rank in range(2):
        job.drop(rank, {i for r, i in late if r == rank})
    job.train(20)
    assert [s.stable_iteration for s in job.sessions] == [18, 18]
    dropped = [s.scalars()["moetion/snapshots-dropped"] for s in job.sessions]
    assert sum(dropped) <= len(late) + 4
    job.crash()


@pytest.mark.parametrize("interval", [1, 2, 64, 1000])
def test_snapshots_become_stable_at_every_interval(tmp_path: Path, interval: int) -> None:
    job = Job(tmp_path, interval=interval)
    job.start()
    for number in range(1, 5):
        job.iteration = number * interval - 1
        job.train(1)
    assert job.sessions[0].stable_iteration == 2 * interval
    job.crash()


@pytest.mark.parametrize("gap", [2, 40, 5000])
def test_snapshots_become_stable_however_far_apart_the_calls_are(tmp_path: Path, gap: int) -> None:
    """The loop may call ``on_step_end`` more rarely than ``interval`` says, and pause for long."""
    job = Job(tmp_path)
    job.start()
    for number in range(1, 12):
        job.iteration = number * gap - 1
        job.train(1)
    assert job.sessions[0].stable_iteration == 9 * gap
    assert job.sessions[0].scalars()["moetion/snapshots-dropped"] == 0
    job.crash()


@pytest.mark.parametrize("recalibrates", ["on", "off"])
def test_mode_popularity_keeps_the_cap_and_counts_what_is_lost(tmp_path: Path, recalibrates: str) -> None:
    first = Job(tmp_path, mode="popularity", staleness_cap=4, experts_per_snapshot=1, lost_token_budget=0.0)
    first.start()
    first.train(9)
    first.crash()
    shutil.rmtree(tmp_path / "job" / "node1")
    fields = {"mode": "popularity", "staleness_cap": 4, "experts_per_snapshot": 1, "lost_token_budget": 0.0}
    second = Job(tmp_path, attempt=1, capacity_recalibration=recalibrates, **fields)  # type: ignore[arg-type]
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration == 9
    assert resumed.lost_tokens > 0
    assert 0 < resumed.plt < 1
    assert [s.host["iteration"] for s in second.states] == [9, 9]
    lost = {a.name: a.lost for a in second.sessions[0].experts() if a.lost}
    assert sum(lost.values()) == resumed.lost_tokens
    told = lost if recalibrates == "on" else {}
    assert [state.recalibrated for state in second.states] == [told, told], "every rank knows what all have lost"
    accounts = second.sessions[0].experts()
    assert {a.lost_before for a in accounts} == {0}
    second.train(3)
    assert sum(a.at_risk for a in second.sessions[0].experts()) > 0
    second.crash()


def test_within_the_budget_of_lost_tokens_k_grows_and_the_loss_stays_small(tmp_path: Path) -> None:
    first = Job(tmp_path, mode="popularity", staleness_cap=4, lost_token_budget=0.01, max_experts_per_snapshot=4)
    first.start()
    first.train(9)
    first.crash()
    second = Job(
        tmp_path, attempt=1, mode="popularity", staleness_cap=4, lost_token_budget=0.01, max_experts_per_snapshot=4
    )
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.plt <= 0.01
    second.crash()


def test_k_from_a_budget_of_bytes_is_what_the_tightest_rank_affords(tmp_path: Path) -> None:
    units = Job(tmp_path / "any", mode="popularity").prepared[0].mode.inventory  # its host state has the book too
    always = sum(u.nbytes for u in units.units if u.expert is None)
    expert = next(u.nbytes for u in units.units if u.expert is not None)
    job = Job(tmp_path, mode="popularity", snapshot_bytes=always + 2 * expert + 100, lost_token_budget=0.0)
    job.start()
    job.train(3)
    assert {s.scalars()["moetion/experts-per-snapshot"] for s in job.sessions} == {2.0}
    job.crash()
    with pytest.raises(ConfigError, match=r"--moetion-snapshot-bytes 64 \(0 experts\)"):
        Job(tmp_path / "other", mode="popularity", snapshot_bytes=64)


def test_a_lost_network_stops_snapshots_and_not_training(tmp_path: Path) -> None:
    job = Job(tmp_path, mode="popularity", staleness_cap=2, timeout_s=1)
    job.start()
    job.train(4)
    stable = job.sessions[0].stable_iteration
    with job.network.cut({0}, {1}):
        job.train(5)
    assert job.states[0].host["iteration"] == 9
    assert job.sessions[0].stable_iteration >= stable
    assert job.sessions[0].scalars()["moetion/snapshots-dropped"] > 0
    job.crash()
    second = Job(tmp_path, attempt=1, mode="popularity", staleness_cap=2)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration >= stable
    second.crash()


# -- never silently from zero ---------------------------------------------------------------------------------


def test_a_restart_that_finds_nothing_is_refused(tmp_path: Path) -> None:
    first = Job(tmp_path)
    first.start()
    first.train(2)
    first.crash()
    shutil.rmtree(tmp_path / "job")
    with pytest.raises(NothingRecoverable, match="--moetion-allow-fresh") as refusal:
        Job(tmp_path, attempt=1).start()
    assert refusal.value.exit_code == 3
    allowed = Job(tmp_path, attempt=1, allow_fresh=True)
    assert allowed.start() == [None, None]
    allowed.train(1)
    allowed.crash()


def test_a_persistent_checkpoint_is_loaded_only_when_memory_has_nothing(tmp_path: Path) -> None:
    def never() -> int | None:
        raise AssertionError("memory has it")

    first = Job(tmp_path)
    first.start()
    first.train(2)
    first.crash()
    second = Job(tmp_path, attempt=1)
    assert second.start(never)[0] is not None
    second.crash()
    shutil.rmtree(tmp_path / "job")
    third = Job(tmp_path, attempt=2)
    assert third.start(lambda: 40) == [None, None]
    assert third.sessions[0].stable_iteration == 40
    third.crash()


def test_a_baseline_is_stable_before_the_first_step(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.start()
    images = [s.image() for s in job.states]
    job.crash()
    shutil.rmtree(tmp_path / "job" / "node0")
    second = Job(tmp_path, attempt=1)
    resumed = second.start()[0]
    assert resumed is not None
    assert resumed.iteration == 0
    assert [s.image() for s in second.states] == images
    second.crash()


def test_a_node_that_was_away_while_the_run_began_anew_brings_nothing_back(tmp_path: Path) -> None:
    first = Job(tmp_path)
    first.start()
    first.train(9)
    first.crash()
    shutil.move(tmp_path / "job" / "node1", tmp_path / "away")
    shutil.rmtree(tmp_path / "job")
    second = Job(tmp_path, attempt=1, allow_fresh=True)
    assert second.start() == [None, None]
    second.train(2)
    images = second.train(1)
    second.crash()
    shutil.rmtree(tmp_path / "job" / "node1")
    shutil.move(tmp_path / "away", tmp_path / "job" / "node1")
    third = Job(tmp_path, attempt=2)
    resumed = third.start()[0]
    assert resumed is not None
    assert resumed.iteration == 3
    assert [s.image() for s in third.states] == images
    third.crash()


# -- never a stranger -----------------------------------------------------------------------------------------


STRANGERS: list[tuple[dict[str, object], str]] = [
    ({"mode": "popularity"}, r"\(--moetion-mode: the arena has 'full', this run has 'popularity'\)"),
    ({"elements": 900}, r"\(layout: the model, or how it is spread over ranks, is another one\)"),
    ({"chunk_bytes": 8192}, r"\(--moetion-chunk-bytes: the arena has 4096, this run has 8192\)"),
]


@pytest.mark.parametrize(("change", "why"), STRANGERS, ids=[next(iter(change)) for change, _ in STRANGERS])
def test_another_models_arenas_are_refused_and_kept(tmp_path: Path, change: dict[str, object], why: str) -> None:
    first = Job(tmp_path)
    first.start()
    first.train(2)
    first.crash()
    # Rank 0's own arena is gone, so rank 0 looks at the arena of rank 1 only.
    (tmp_path / "job" / "node0" / "rank00000.arena").unlink()
    with pytest.raises(IdentityMismatch, match=why):
        Job(tmp_path, attempt=1, **change).start()  # type: ignore[arg-type]
    again = Job(tmp_path, attempt=1)
    resumed = again.start()[0]
    assert resumed is not None
    assert resumed.iteration == 2
    again.crash()


def test_ranks_that_were_started_differently_are_refused(tmp_path: Path) -> None:
    job = Job(tmp_path)
    other = Job(tmp_path, chunk_bytes=8192).prepared[1]
    job.prepared[1] = replace(job.prepared[1], mode=other.mode)
    with pytest.raises(ConfigError, match="ranks 0 and 1 were started differently: chunk_bytes is 4096"):
        job.start()


@pytest.mark.parametrize("change", [{"interval": 2}, {"replicas": 0}, {"in_flight_bytes": 1 << 20}])
def test_ranks_whose_settings_differ_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    job = Job(tmp_path)
    config = replace(job.prepared[1].config, **change)  # type: ignore[arg-type]
    job.prepared[1] = replace(job.prepared[1], config=config)
    with pytest.raises(ConfigError, match=f"ranks 0 and 1 were started differently: {next(iter(change))} is"):
        job.start()


def test_settings_of_one_rank_may_differ(tmp_path: Path) -> None:
    job = Job(tmp_path)
    config = replace(job.prepared[1].config, pack_threads=2, max_stall_ms=7, report="elsewhere", network_interface="x")
    job.prepared[1] = replace(job.prepared[1], config=config)
    assert job.start() == [None, None]
    job.crash()


def test_on_step_end_after_close_is_refused(tmp_path: Path) -> None:
    job = trained(tmp_path, 2)
    together(*(s.close for s in job.sessions))
    with pytest.raises(ConfigError, match=r"closed; on_step_end\(\) cannot follow"):
        job.sessions[0].on_step_end(3)
    job.sessions[0].before_optimizer_step()
    assert job.sessions[0].stable_iteration >= 0


def test_close_reports_and_leaves_the_arenas(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.start()
    job.train(3)
    together(*(s.close for s in job.sessions))
    left = sorted(p.name for p in (tmp_path / "job" / "node1").glob("*.arena"))
    assert left == ["rank00000.arena", "rank00001.arena"]
    again = Job(tmp_path, attempt=1)
    resumed = again.start()[0]
    assert resumed is not None
    assert resumed.iteration == 3
    again.crash()


def test_a_rank_lost_while_ranks_start_is_a_channel_error(tmp_path: Path) -> None:
    job = Job(tmp_path, timeout_s=1)
    with pytest.raises(ChannelError):
        job.start_rank(0)


ROOM = {"mode": "popularity", "staleness_cap": 4}


@pytest.mark.parametrize(
    ("then", "now", "sides"),
    [
        ({"lost_token_budget": 0.0}, {"max_experts_per_snapshot": 4}, (2, 4)),
        ({"experts_per_snapshot": 1, "lost_token_budget": 0.0}, {"lost_token_budget": 0.0}, (1, 2)),
        ({"max_experts_per_snapshot": 3}, {"max_experts_per_snapshot": 2}, (3, 2)),
    ],
    ids=["budget", "experts", "most experts"],
)
def test_arenas_with_other_room_for_experts_name_it_and_its_flags(
    tmp_path: Path, then: dict[str, object], now: dict[str, object], sides: tuple[int, int]
) -> None:
    first = Job(tmp_path, **ROOM, **then)  # type: ignore[arg-type]
    first.start()
    first.train(2)
    first.crash()
    with pytest.raises(IdentityMismatch) as refusal:
        Job(tmp_path, attempt=1, **ROOM, **now).start()  # type: ignore[arg-type]
    said = str(refusal.value)
    assert f"room for {sides[0]} experts a snapshot, this run wants {sides[1]}" in said
    for flag in ("--moetion-[max-]experts-per-snapshot", "-lost-token-budget", "-snapshot-bytes"):
        assert flag in said
    assert len(said.replace(str(tmp_path), "/dev/shm/moetion-1000")) < 300
    again = Job(tmp_path, attempt=1, **ROOM, **then)  # type: ignore[arg-type]
    resumed = again.start()[0]
    assert resumed is not None
    assert resumed.iteration == 2
    again.crash()
