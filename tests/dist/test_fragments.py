# SPDX-License-Identifier: Apache-2.0
"""Real processes whose nodes keep fragments of each other's snapshots: two of four nodes vanish, at any moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from jobs import Job

from megatron_moetion.coding import Part
from megatron_moetion.store.sharedfile import open_arena
from megatron_moetion.store.spec import arena_name

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

MakeJob = Callable[..., Job]
FOUR = {"world_size": 4, "ranks_per_node": 1, "replicas": 2, "coding_nodes": 4}
"""Any two of three fragments rebuild a snapshot."""
SPARSE = {"mode": "popularity", "experts_per_snapshot": 1, "staleness_cap": 4, "lost_token_budget": 0.0}
SETTINGS: dict[str, dict[str, Any]] = {"full": {}, "popularity": SPARSE, "exact": {"mode": "exact", "period": 3}}


def at(rank: int, iteration: int, point: str) -> list[tuple[int, int, str]]:
    """A kill at that iteration, or at the first one after it whose snapshot gets so far."""
    return [(rank, i, point) for i in range(iteration, iteration + 5)]


@pytest.mark.parametrize(("mode", "lost"), [("full", (0, 1)), ("popularity", (0, 3)), ("exact", (0, 2))])
def test_two_nodes_may_vanish_and_what_comes_back_is_what_was(job: MakeJob, mode: str, lost: tuple[int, ...]) -> None:
    run = job(**FOUR, **SETTINGS[mode], calm=True)  # three links in turn: what is whole would depend on the load
    ended = run.fail(at(0, 7, "mid-replication"))
    run.lose(*lost)
    began = run.finish()
    assert 0 <= ended.of("step")[-1]["iteration"] - began.iteration <= 2 + ended.drops
    assert all(began.fetched[rank] for rank in lost)
    assert not any(began.fetched[rank] for rank in range(4) if rank not in lost)
    if mode != "popularity":
        run.assert_as_if_nothing_had_happened()


@pytest.mark.parametrize("point", ["fetch", "restored"])
def test_a_second_node_may_go_while_the_first_is_replaced(job: MakeJob, point: str) -> None:
    run = job(**FOUR)
    run.fail(at(0, 6, "before-commit"))
    run.lose(0)
    run.fail([(2, -1, point)])
    run.lose(2)
    run.finish()
    run.assert_as_if_nothing_had_happened()


def test_a_holder_that_dies_in_an_update_is_still_worth_what_it_was(job: MakeJob) -> None:
    """Rank 0 dies with bytes of rank 2's iteration 7 that it has not listed; then rank 2's node and another go."""
    run = job(**FOUR, calm=True)
    run.fail(at(0, 7, "held-received"))
    run.lose(1, 2)
    assert run.finish().iteration in (6, 7)
    run.assert_as_if_nothing_had_happened()


def test_a_damaged_fragment_is_passed_over(job: MakeJob) -> None:
    """A flipped bit costs what the loss of its node would."""
    run = job(**FOUR, calm=True)
    run.fail(at(3, 7, "mid-pack"))
    path = run.node(2) / arena_name(1, Part(number=1, data=2, parity=1))
    arena = open_arena(path)
    for record in arena.page.records:
        arena.payload(record.slot)[100] ^= 1
    arena.close()
    run.lose(1)
    run.finish()
    run.assert_as_if_nothing_had_happened()


def test_ranks_may_come_back_on_other_nodes(job: MakeJob) -> None:
    run = job(**FOUR, iterations=14)
    run.fail(at(0, 4, "mid-replication"))
    run.fail(at(1, 7, "before-commit"), places=[2, 3, 0, 1])
    run.lose(0, 1)
    run.fail(at(2, 10, "mid-pack"), places=[0, 2, 1, 3])
    run.finish(places=[3, 0, 2, 1])
    run.assert_as_if_nothing_had_happened()
