# SPDX-License-Identifier: Apache-2.0
"""One contract over every channel and fabric: the queues that tests use, and sockets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fabrics import Fabrics, loopback_fabrics
from support import Network, together

from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Channel, Fabric

sys.path.insert(0, str(Path(__file__).parent))

from channel_cases import CHANNEL_CASES, FABRIC_CASES, SILENT_S, lost_peer


@pytest.fixture
def pair() -> Iterator[Fabrics]:
    with loopback_fabrics(2) as fabrics:
        yield fabrics


@pytest.mark.parametrize("case", CHANNEL_CASES, ids=lambda c: c.__name__)
def test_sockets(pair: Fabrics, case: Callable[[Channel, int], None]) -> None:
    together(*(lambda f=f: case(f.channel, f.rank) for f in pair))


@pytest.mark.parametrize("case", FABRIC_CASES, ids=lambda c: c.__name__)
def test_a_fabric_of_sockets(pair: Fabrics, case: Callable[[Fabric], None]) -> None:
    together(*(lambda f=f: case(f) for f in pair))


@pytest.mark.parametrize("case", CHANNEL_CASES, ids=lambda c: c.__name__)
def test_queues(case: Callable[[Channel, int], None]) -> None:
    network = Network(2, timeout_s=5)
    together(*(lambda r=r: case(network.channel(r), r) for r in range(2)))


def test_queues_lose_a_peer() -> None:
    lost_peer(Network(2, timeout_s=0.1).channel(0))


def test_sockets_have_a_silent_peer() -> None:
    with loopback_fabrics(2, timeout_s=SILENT_S) as pair:
        lost_peer(pair[0].channel)


def test_sockets_lose_a_peer(pair: Fabrics) -> None:
    together(*(lambda f=f: CHANNEL_CASES[0](f.channel, f.rank) for f in pair))
    pair[1].abandon()
    lost_peer(pair[0].channel)


def test_a_run_of_one_rank_has_no_sockets() -> None:
    (fabric,) = loopback_fabrics(1)
    assert fabric.gather({"a": 1}) == [{"a": 1}]
    assert fabric.reduce(5, lambda a, b: a + b) == 5
    reducer = fabric.reducer("own", (0,), lambda a, b: a)
    reducer.contribute(0, [3])
    assert reducer.wait(0, 0.0)
    assert [r.words for r in reducer.results()] == [(3,)]
    assert fabric.silent() == {}
    fabric.channel.exchange([], [])
    with pytest.raises(ChannelError, match="no rank 1"):
        fabric.mesh.dial(1, "hold", 1.0)
    fabric.close()
    fabric.abandon()
