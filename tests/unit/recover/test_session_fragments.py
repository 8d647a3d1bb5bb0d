# SPDX-License-Identifier: Apache-2.0
"""A job whose nodes keep fragments of each other's snapshots: what it loses, and what it comes back with."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from session_job import Job

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError, NothingRecoverable
from megatron_moetion.store.sharedfile import open_arena, peek_arena

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


def assert_back(folder: Path, attempt: int, last: int, before: list[bytes], **settings: object) -> Job:
    """The job goes on from this state, bit for bit."""
    job = Job(folder, attempt=attempt, **{**FOUR, **settings})  # type: ignore[arg-type]
    assert [r.iteration for r in job.start() if r is not None] == [last] * 4
    assert [s.image() for s in job.states] == before
    return job


@pytest.mark.parametrize("lost", [(0, 1), (1, 3)])
def test_any_two_nodes_may_vanish_again_and_again(tmp_path: Path, lost: tuple[int, int]) -> None:
    last, before = trained(tmp_path)
    lose(tmp_path, *lost)
    job = assert_back(tmp_path, 1, last, before)
    before, last = job.train(2), job.iteration
    job.crash()
    lose(tmp_path, *(rank for rank in range(4) if rank not in lost))
    assert_back(tmp_path, 2, last, before).crash()


def test_what_nodes_keep_is_a_share_of_a_copy(tmp_path: Path) -> None:
    trained(tmp_path)
    whole = peek_arena(tmp_path / "job" / "node0" / "rank00000.arena")[0]
    held = [peek_arena(p)[0] for p in sorted((tmp_path / "job" / "node0").glob("rank*.2+1.*.arena"))]
    assert sorted(spec.identity.owner for spec in held) == [1, 2, 3]
    captures = sum(nbytes * count for nbytes, count in whole.slots)
    for spec in held:
        assert 0.5 * captures < sum(nbytes * count for nbytes, count in spec.pools) < 0.6 * captures


def test_without_enough_fragments_nothing_is_begun_by_itself(tmp_path: Path) -> None:
    trained(tmp_path)
    lose(tmp_path, 0, 1, 2)
    with pytest.raises(NothingRecoverable, match="no copy of"):
        Job(tmp_path, attempt=1, **FOUR).start()  # type: ignore[arg-type]


def test_a_damaged_fragment_counts_as_lost_and_is_made_again(tmp_path: Path) -> None:
    last, before = trained(tmp_path)
    for path in (tmp_path / "job" / "node1").glob("rank00000.2+1.*"):
        arena = open_arena(path)
        for record in arena.page.records:
            arena.payload(record.slot)[-1] ^= 1
        arena.close()
    lose(tmp_path, 0)
    job = assert_back(tmp_path, 1, last, before)
    job.crash()
    lose(tmp_path, 0, 3)  # now the one that was made again is needed
    assert_back(tmp_path, 2, last, before).crash()


def test_ranks_that_come_back_on_other_nodes_keep_the_fragments_that_they_have(tmp_path: Path) -> None:
    last, before = trained(tmp_path)
    nodes = [tmp_path / "job" / f"node{rank}" for rank in range(4)]
    for rank, node in enumerate(nodes):
        node.rename(tmp_path / f"away{rank}")
    for rank, now in enumerate((1, 2, 0, 3)):
        (tmp_path / f"away{rank}").rename(nodes[now])
    lose(tmp_path, 3)
    assert_back(tmp_path, 1, last, before).crash()


def test_a_restart_may_go_over_to_fragments_and_back(tmp_path: Path) -> None:
    last, before = trained(tmp_path, coding_nodes=0)
    lose(tmp_path, 1)
    assert_back(tmp_path, 1, last, before).crash()
    lose(tmp_path, 0, 2)
    assert_back(tmp_path, 2, last, before, coding_nodes=0).crash()
    assert not list(tmp_path.glob("job/*/*+*.arena"))
    lose(tmp_path, 0, 1)
    assert_back(tmp_path, 3, last, before, coding_nodes=0).crash()


def test_without_the_library_the_flag_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyeclib.ec_iface", None)
    with pytest.raises(ConfigError, match=r"megatron-moetion\[coding\]"):
        Job(tmp_path, **FOUR)  # type: ignore[arg-type]


def test_without_the_library_fragments_that_are_needed_stay_where_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restart asks for whole copies, and what is left to make them of is fragments."""
    last, before = trained(tmp_path)
    lose(tmp_path, 0)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyeclib.ec_iface", None)
        job = Job(tmp_path, attempt=1, **{**FOUR, "coding_nodes": 0})  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"rank 0 .*megatron-moetion\[coding\]"):
            job.start()
        job.crash()
    assert_back(tmp_path, 2, last, before, coding_nodes=0).crash()


@pytest.mark.parametrize("settings", [{"replicas": 1}, {"replicas": -1}, {"replicas": 2, "coding_nodes": 3}])
def test_settings_that_save_nothing_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="--moetion-coding-nodes"):
        MoetionConfig(**{"coding_nodes": 4, **settings})  # type: ignore[arg-type]
