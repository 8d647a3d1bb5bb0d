# SPDX-License-Identifier: Apache-2.0
"""Which network carries replicas, and how fast it is as a run starts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
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


@dataclass(frozen=True, kw_only=True)
class Network:
    """What ranks have seen of the network, each on its way to the first rank that holds its replicas, all at once."""

    bytes_per_s: float | None
    """This rank's; None where its probe failed. All else is the same on all ranks."""
    least: float
    """Of one rank."""
    rank: int
    """The one that saw the least; -1 where every probe failed."""
    mean: float
    unknown: int
    """Ranks whose probe failed, which is no reason for a start to fail."""
    interfaces: tuple[str, ...]
    """Some of their names."""


def look_at_network(fabric: Fabric, placement: Placement, host: Host, timeout_s: float) -> Network | None:
    """Each rank sends something to the first rank that holds its replicas, all at once. Collective.

    None without replicas. Waits ``PROBE_PATIENCE_S`` for an answer, or ``timeout_s`` if that is less.
    """
    holders = placement.holders[fabric.rank]
    if not holders:
        return None
    speed = None
    with suppress(ChannelError):
        speed = measure_link(
            fabric.mesh,
            holders[0],
            clock=host.clock,
            timeout_s=min(PROBE_PATIENCE_S, timeout_s),
            most_bytes=host.link_probe_bytes,
        )
    mine = {
        "least": None if speed is None else [speed, fabric.rank],
        "sum": speed or 0.0,
        "unknown": int(speed is None),
        "interfaces": [fabric.address.interface],
    }
    found = fabric.reduce(mine, _both)
    known = fabric.world_size - found["unknown"]
    least, rank = found["least"] or (0.0, -1)
    return Network(
        bytes_per_s=speed,
        least=least,
        rank=rank,
        mean=found["sum"] / known if known else 0.0,
        unknown=found["unknown"],
        interfaces=tuple(found["interfaces"]),
    )


def _both(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    known = [each["least"] for each in (one, other) if each["least"] is not None]
    return {
        "least": min(known) if known else None,
        "sum": one["sum"] + other["sum"],
        "unknown": one["unknown"] + other["unknown"],
        "interfaces": sorted({*one["interfaces"], *other["interfaces"]})[:_NAMES],
    }


def say_network(journal: Journal, iteration: int, seen: Network, address: str) -> None:
    """One line, and an event. ``address`` is the one at which others reach this rank, which is rank 0."""
    names = ", ".join(name or "?" for name in seen.interfaces)
    speeds = (
        f"{seen.mean / 1e9:.2f} GB/s a rank, with all of them sending at once for a moment; the least "
        f"{seen.least / 1e9:.2f} GB/s (rank {seen.rank})"
    )
    failed = f"{seen.unknown} rank(s) could not measure it"
    found = failed if seen.rank < 0 else f"{speeds}; {failed}" if seen.unknown else speeds
    journal.info(iteration, f"replicas go over {names} (rank 0 at {address}): {found}")
    journal.event("network", address=address, **asdict(seen))
