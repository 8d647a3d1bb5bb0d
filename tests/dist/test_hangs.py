# SPDX-License-Identifier: Apache-2.0
"""Ranks that are stopped, and go on later or never: four real processes."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from jobs import Job, logs
from toy_trainer import CRASHED

from megatron_moetion.errors import HungPeer

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(180)]

HUNG = HungPeer.exit_code


@pytest.mark.parametrize("stopped", [0, 3])
def test_the_others_end_in_time_and_the_restart_goes_on_as_if_nothing_had_happened(
    job: Callable[..., Job], stopped: int
) -> None:
    run = job(iterations=20, hang_timeout_s=4)
    outcome = run.attempt(stop=(stopped, 8, 3600))
    run.follow(outcome)
    others = [code for rank, code in enumerate(outcome.codes) if rank != stopped]
    assert HUNG in others, logs(run.folder)
    assert set(others) <= {HUNG, CRASHED}, "a rank may find that a peer has ended before it ends itself"
    assert outcome.codes[stopped] == -signal.SIGKILL, "the supervisor's"
    said = [line for line in logs(run.folder).splitlines() if "ends with exit code 5" in line]
    assert 1 <= len(said) <= 2, "one line a node"
    assert f"rank {stopped} on " in said[0]
    done = run.finish()
    assert done.iteration >= 6
    run.assert_as_if_nothing_had_happened()
    (recovered,) = [e for e in run.events if e["event"] == "recovered"]
    assert list(recovered["phases_s"])[:2] == ["detect", "restart"]
    assert recovered["phases_s"]["detect"] >= 4


def test_a_rank_that_goes_on_in_time_ends_nothing(job: Callable[..., Job]) -> None:
    run = job(iterations=30, hang_timeout_s=12, calm=True)
    outcome = run.finish(stop=(2, 8, 6))
    assert {outcome.one("end", rank)["stable"] for rank in range(4)} == {run.toy.iterations - 2}
    run.assert_as_if_nothing_had_happened()


def test_a_rank_that_goes_on_too_late_finds_its_peers_gone_and_ends_by_itself(job: Callable[..., Job]) -> None:
    run = job(iterations=20, hang_timeout_s=4)
    outcome = run.attempt(stop=(1, 8, 12))
    run.follow(outcome)
    others = {code for rank, code in enumerate(outcome.codes) if rank != 1}
    assert HUNG in others
    assert others <= {HUNG, CRASHED}
    assert outcome.codes[1] not in (0, -signal.SIGKILL), (outcome.codes, logs(run.folder))
    run.finish()
    run.assert_as_if_nothing_had_happened()
