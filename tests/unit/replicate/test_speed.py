# SPDX-License-Identifier: Apache-2.0
"""A probe tells how fast a link is, within bounds, and never costs a start more than that."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fabrics import Faults, loopback_fabrics
from session_job import Job, together

from megatron_moetion.arrays import Bytes
from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import ChannelError
from megatron_moetion.observe.journal import Journal
from megatron_moetion.replicate.placement import place
from megatron_moetion.replicate.speed import measure_link, serve_probes
from megatron_moetion.run.host import Host
from megatron_moetion.run.network import Network, look_at_network, say_network


class SlowWire(Faults):
    """Every block takes its time."""

    sent_bytes = 0

    def sending(self, rank: int, peer: int, purpose: str, parts: Any) -> Any:
        if purpose == "probe" and len(parts) > 1:
            data: Bytes = parts[-1]
            self.sent_bytes += data.nbytes
            time.sleep(0.02)
        return parts


def test_a_probe_is_bounded_by_bytes_and_by_time() -> None:
    wire = SlowWire()
    fabrics = loopback_fabrics(2, cuts=wire)
    serve_probes(fabrics[1].mesh)
    measure = partial(measure_link, fabrics[0].mesh, 1, clock=SystemClock(), timeout_s=10.0)
    speed = measure(most_bytes=(5 << 20) + 1, most_s=60.0)
    assert wire.sent_bytes == (5 << 20) + 1
    assert 0 < speed < (1 << 20) / 0.02
    began_s = time.monotonic()
    assert measure(most_bytes=1 << 40, most_s=0.1) < (1 << 20) / 0.02
    assert time.monotonic() - began_s < 5
    assert wire.sent_bytes < 20 << 20


def test_a_peer_that_serves_no_probe_is_a_channel_error_in_time() -> None:
    fabrics = loopback_fabrics(2)
    with pytest.raises(ChannelError, match="cannot be reached"):
        measure_link(fabrics[0].mesh, 1, clock=SystemClock(), timeout_s=0.2)


def test_ranks_look_at_the_network_together_and_a_failed_probe_is_counted() -> None:
    faults = Faults()
    fabrics = loopback_fabrics(4, cuts=faults)
    for fabric in fabrics:
        serve_probes(fabric.mesh)
    host = Host(link_probe_bytes=1 << 16)
    placement = place(["a", "a", "b", "b"], 1)
    look = [partial(look_at_network, fabric, placement, host, 0.5) for fabric in fabrics]
    whole = together(*look)
    first = whole[0]
    assert all(replace(seen, bytes_per_s=None) == replace(first, bytes_per_s=None) for seen in whole)
    assert first.unknown == 0
    assert first.least == whole[first.rank].bytes_per_s
    assert 0 < first.least <= first.mean
    assert first.interfaces == ("lo",)
    with faults.cut({0}, {2}, "probe"):
        parts = together(*look)
    assert [seen.bytes_per_s is None for seen in parts] == [True, False, True, False]
    assert parts[3].unknown == 2
    assert parts[3].rank in (1, 3)
    alone = place(["a", "a", "b", "b"], 0)
    assert look_at_network(fabrics[0], alone, host, 0.5) is None


def test_a_network_that_nobody_could_measure_is_no_number_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, "megatron_moetion"):
        unknown = Network(bytes_per_s=None, least=0.0, rank=-1, mean=0.0, unknown=4, interfaces=("lo",))
        say_network(Journal(0, 0, None, SystemClock()), 7, unknown, "10.0.0.1")
    assert "replicas go over lo (rank 0 at 10.0.0.1): 4 rank(s) could not measure it" in caplog.text


@pytest.mark.parametrize("replicas", [0, 1])
def test_the_start_says_what_carries_replicas(tmp_path: Path, caplog: pytest.LogCaptureFixture, replicas: int) -> None:
    with caplog.at_level(logging.INFO):
        Job(tmp_path, replicas=replicas).start()
    lines = [m for r in caplog.records if "replicas go over" in (m := r.getMessage())]
    assert len(lines) == replicas
    assert all("lo (rank 0 at 127.0.0.1): " in line and " GB/s a rank" in line for line in lines)
