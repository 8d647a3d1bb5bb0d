# SPDX-License-Identifier: Apache-2.0
"""What is said and done once snapshots have stopped for good; who knows whether there was ever anything to lose."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch import distributed as dist

from megatron_moetion.rendezvous import HOSTED
from megatron_moetion.replicate.protection import USUAL_LIMIT, Distance, limit_of, restarts_left
from megatron_moetion.replicate.witness import NO_WITNESS, Past, StoreWitness, witness_of


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 0),
        ({"TORCHELASTIC_MAX_RESTARTS": "3"}, 3),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "3"}, 0),
        ({"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RESTART_COUNT": "4"}, 0),
    ],
)
def test_a_process_ends_by_itself_only_where_it_would_be_started_again(
    environment: dict[str, str], expected: int
) -> None:
    assert restarts_left(environment) == expected
    assert limit_of(-1, environment) == (USUAL_LIMIT if expected else 0)
    assert limit_of(0, environment) == 0
    assert limit_of(7, environment) == 7


def test_the_distance_is_said_each_time_it_has_doubled() -> None:
    distance = Distance(20)
    said = [n for n in range(1, 40) if distance.worth_saying(n)]
    assert said == [4, 8, 16, 32]
    assert [n for n in range(40) if distance.is_too_far(n, helps=True)] == list(range(20, 40))
    assert not any(distance.is_too_far(n, helps=False) for n in range(40))
    assert not any(Distance(0).is_too_far(n, helps=True) for n in (0, 1, 10**6))
    jump = Distance(0).worth_saying(1000)
    assert jump is not None
    assert "costs 1000 iterations; restart the job" in jump


@pytest.mark.parametrize("is_first", [True, False])
def test_a_store_knows_of_a_baseline_and_of_none_only_if_it_is_as_old_as_the_run(is_first: bool) -> None:
    store = dist.HashStore()
    witness = StoreWitness(store, "run", is_first=is_first)
    assert [witness.past() for _ in range(2)] == [Past(is_known=is_first, had_baseline=False)] * 2
    witness.note_baseline()
    assert StoreWitness(store, "run", is_first=is_first).past() == Past(is_known=is_first, had_baseline=True)
    assert not StoreWitness(store, "other", is_first=is_first).past().had_baseline


def test_torchruns_store_is_asked_where_it_outlives_an_attempt() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    assert witness_of(shared, "a").past() == Past(is_known=True)
    witness_of(shared, "a").note_baseline()
    assert witness_of(shared, "a").past() == Past(is_known=True, had_baseline=True)
    assert witness_of({**shared, "SLURM_RESTART_COUNT": "1"}, "b").past() == Past(is_known=False)
    per_round = {**shared, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    assert witness_of(per_round, "a") is NO_WITNESS
    named = {**per_round, "MOETION_RENDEZVOUS": f"127.0.0.1:{server.port}"}
    assert witness_of(named, "a").past() == Past(is_known=True, had_baseline=True)
    hosted = {**per_round, HOSTED: "0"}
    assert witness_of(hosted, "b").past() == Past(is_known=True), "by warm parents, from the first start on"
    assert witness_of({**hosted, HOSTED: "1"}, "b").past() == Past(is_known=False), "that the launcher started again"
    assert witness_of({}, "a") is NO_WITNESS


@pytest.mark.parametrize("endpoint", ["nonsense", "127.0.0.1:x"])
def test_a_store_that_nobody_answers_at_knows_nothing(endpoint: str) -> None:
    assert witness_of({"MOETION_RENDEZVOUS": endpoint}, "a") is NO_WITNESS
