# SPDX-License-Identifier: Apache-2.0
"""What is said and done once snapshots have stopped for good; who knows whether there was ever anything to lose."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch import distributed as dist

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
    assert [n for n in range(40) if distance.is_too_far(n)] == list(range(20, 40))
    assert not any(Distance(0).is_too_far(n) for n in (0, 1, 10**6))
    jump = Distance(0).worth_saying(1000)
    assert jump is not None
    assert "costs 1000 iterations; restart the job" in jump


def test_a_store_that_saw_the_first_start_knows_whether_there_was_a_baseline() -> None:
    store = dist.HashStore()
    first = StoreWitness(store, "run", is_first=False)
    assert first.arrive() == Past(is_known=False, had_baseline=False)
    second = StoreWitness(store, "run", is_first=False)
    assert second.arrive() == Past(is_known=True, had_baseline=False)
    second.has_baseline()
    assert StoreWitness(store, "run", is_first=False).arrive() == Past(is_known=True, had_baseline=True)
    assert StoreWitness(store, "other", is_first=True).arrive() == Past(is_known=True, had_baseline=False)


def test_torchruns_store_is_asked_where_it_outlives_an_attempt() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5), wait_for_workers=False)
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port)}
    assert witness_of(shared, "a").arrive() == Past(is_known=True)
    witness_of(shared, "a").has_baseline()
    assert witness_of(shared, "a").arrive() == Past(is_known=True, had_baseline=True)
    assert witness_of({**shared, "SLURM_RESTART_COUNT": "1"}, "b").arrive() == Past(is_known=False)
    per_round = {**shared, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    assert witness_of(per_round, "a") is NO_WITNESS
    named = {**per_round, "MOETION_RENDEZVOUS": f"127.0.0.1:{server.port}"}
    assert witness_of(named, "a").arrive() == Past(is_known=True, had_baseline=True)
    assert witness_of({}, "a") is NO_WITNESS


@pytest.mark.parametrize("endpoint", ["nonsense", "127.0.0.1:x"])
def test_a_store_that_nobody_answers_at_knows_nothing(endpoint: str) -> None:
    assert witness_of({"MOETION_RENDEZVOUS": endpoint}, "a") is NO_WITNESS
