# SPDX-License-Identifier: Apache-2.0
"""Audits every rank of a job from its first connection on: which files of the store it touches, what it unpickles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from jobs import Job, Outcome

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

MakeJob = Callable[..., Job]


def touched(outcome: Outcome, rank: int) -> set[str]:
    """Paths below the store."""
    return {n["what"] for n in outcome.of("audit", rank) if n["kind"] != "pickle"}


def unpickled(outcome: Outcome) -> set[str]:
    return {n["what"] for rank in range(len(outcome.notes)) for n in outcome.of("audit", rank) if n["kind"] == "pickle"}


def assert_own_files_only(outcome: Outcome, places: Sequence[int]) -> None:
    for rank, place in enumerate(places):
        paths = touched(outcome, rank)
        own = f"job/node{place // 2}"
        foreign = {p for p in paths if p not in (".", "job", own) and not p.startswith(f"{own}/")}
        assert not foreign, f"rank {rank} of {own} touched {sorted(foreign)}"
        assert f"{own}/rank{rank:05d}.arena" in paths, "the audit sees what it is there for"


@pytest.mark.parametrize("mode", ["full", "popularity"])
def test_a_rank_opens_files_of_its_own_node_and_unpickles_nothing(job: MakeJob, mode: str) -> None:
    """Fresh, after the loss of a node, and on other nodes than before, with replicas and damage all around."""
    run = job(mode=mode, audit=True)
    straight, turned = [0, 1, 2, 3], [2, 3, 0, 1]
    first = run.fail([(2, i, "mid-replication") for i in range(5, 10)])
    run.lose(1)
    second = run.fail([(0, i, "before-commit") for i in range(8, 13)])
    assert sum(second.fetched) > 0
    third = run.finish(places=turned)
    for outcome, places in ((first, straight), (second, straight), (third, turned)):
        assert_own_files_only(outcome, places)
        assert not unpickled(outcome)


def test_the_audit_finds_a_rank_that_does_either(job: MakeJob) -> None:
    run = job(audit=True, misbehave=True, iterations=1)
    outcome = run.finish()
    assert {"pickle.loads", "fractions.Fraction"} <= unpickled(outcome)
    assert "job/node1/node.id" in touched(outcome, rank=0)
    with pytest.raises(AssertionError, match="rank 0 of job/node0 touched"):
        assert_own_files_only(outcome, [0, 1, 2, 3])
