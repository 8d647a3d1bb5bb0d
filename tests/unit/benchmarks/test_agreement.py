# SPDX-License-Identifier: Apache-2.0
"""The arithmetic of the agreement benchmark."""

from __future__ import annotations

from typing import Any

import pytest
from torch import distributed as dist

from benchmarks.agreement import CountedStore, Law, fit, most_sockets
from megatron_moetion.clock import SystemClock
from megatron_moetion.replicate.addresses import Directory


def test_the_law_is_fitted_to_chains_and_stars() -> None:
    law = fit({d: 100e-6 + 50e-6 * d for d in (1, 3, 5)}, {c: 1.0 + 20e-6 * c for c in (2, 4, 8)})
    assert (law.fixed_s, law.step_s, law.child_s) == pytest.approx((100e-6, 50e-6, 20e-6))


def test_the_law_counts_the_steps_and_children_of_the_longest_path() -> None:
    steps = Law(fixed_s=0.0, step_s=1.0, child_s=0.0)
    assert [steps.latency_s(world, 8) for world in (8, 16, 40, 16384)] == [1, 2, 2, 7]
    assert steps.latency_s(2048, 1) == 6
    children = Law(fixed_s=0.0, step_s=0.0, child_s=1.0)
    assert children.latency_s(8, 8) == 6, "the first child is that of the step"
    assert children.latency_s(40, 8) == 4 + 7 + 7 - 2


def test_the_busiest_rank_has_as_many_connections_at_any_size() -> None:
    assert [most_sockets(world, 8) for world in (8, 64, 1024)] == [7, 11, 12]


def test_requests_and_bytes_of_a_store_are_counted() -> None:
    store: Any = CountedStore(dist.HashStore())
    directory = Directory(store, 0, SystemClock())
    directory.join("127.0.0.1", 5, 8, 1.0, token=b"")
    assert store.requests == 3
    before = store.nbytes
    assert directory.find(0, 1.0) == ("127.0.0.1", 5)
    assert store.requests == 5
    assert store.nbytes - before == 2 * len("moetion/net/1/at/0") + len('["127.0.0.1", 5]')
