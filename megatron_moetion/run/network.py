# SPDX-License-Identifier: Apache-2.0
"""Which network carries replicas, and how fast it is as a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_moetion.errors import ChannelError
from megatron_moetion.observe.journal import Journal
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.placement import Placement
from megatron_moetion.replicate.speed import measure_link
from megatron_moetion.run.host import Host

PROBE_PATIENCE_S = 10.0
"""For a peer's answer to a probe of the network, which may fail."""
_NAMES = 4
"""Names of interfaces that are told."""


def look_at_network(fabric: Fabric, placement: Placement, host: Host, timeout_s: float) -> dict[str, Any] | None:
    """Each rank sends something to the first rank that holds its replicas, all at once; what they saw. Collective.

    ``least`` and ``mean``: bytes per second of one rank, and ``rank``, which saw the least; ``unknown``: ranks whose
    probe failed, which is no reason for a start to fail; ``interfaces``: names of interfaces. None without replicas.
    """
    holders = placement.holders[fabric.rank]
    if not holders:
        return None
    speed, unknown = 0.0, 0
    try:
        most_bytes = host.link_probe_bytes
        speed = measure_link(fabric.mesh, holders[0], clock=host.clock, timeout_s=timeout_s, most_bytes=most_bytes)
    except ChannelError:
        unknown = 1
    mine = {
        "least": None if unknown else [speed, fabric.rank],
        "sum": speed,
        "unknown": unknown,
        "interfaces": [fabric.address.interface],
    }
    found: dict[str, Any] = fabric.reduce(mine, _both)
    known = fabric.world_size - found["unknown"]
    least, rank = found["least"] or (0.0, -1)
    return {
        "least": least,
        "rank": rank,
        "mean": found["sum"] / known if known else 0.0,
        "unknown": found["unknown"],
        "interfaces": found["interfaces"],
        "address": fabric.address.host,
    }


def _both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    known = [each["least"] for each in (one, other) if each["least"] is not None]
    return {
        "least": min(known) if known else None,
        "sum": one["sum"] + other["sum"],
        "unknown": one["unknown"] + other["unknown"],
        "interfaces": sorted({*one["interfaces"], *other["interfaces"]})[:_NAMES],
    }


def say_network(journal: Journal, iteration: int, seen: Mapping[str, Any]) -> None:
    """One line, and an event."""
    names = ", ".join(name or "?" for name in seen["interfaces"])
    failed = f"; {seen['unknown']} rank(s) could not measure it" if seen["unknown"] else ""
    journal.info(
        iteration,
        f"replicas go over {names} (rank 0 at {seen['address']}): {seen['mean'] / 1e9:.2f} GB/s a rank, with all of "
        f"them sending at once for a moment; the least {seen['least'] / 1e9:.2f} GB/s (rank {seen['rank']}){failed}",
    )
    journal.event("network", **seen)
