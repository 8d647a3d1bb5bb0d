# SPDX-License-Identifier: Apache-2.0
"""How many experts a snapshot takes, and how many captures of each unit an arena must hold. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_moetion.config import MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.units import Unit, UnitKind


def experts_per_snapshot(config: MoetionConfig, total: int) -> tuple[int, int]:
    """The fewest and the most experts (K) in a snapshot of a rank whose layers hold ``total``.

    A number fixes K. Where the user gave none, K moves between what the staleness cap needs and twice that, of which
    half follows popularity. ``ConfigError`` where the cap cannot be kept.
    """
    if config.mode == "full":
        return total, total
    needed = -(-total // config.staleness_cap)
    chosen = config.experts_per_snapshot
    if not chosen:
        return needed, min(-(-2 * total // config.staleness_cap), total)
    if chosen < needed:
        raise ConfigError(
            f"--moetion-experts-per-snapshot {chosen} x --moetion-staleness-cap {config.staleness_cap} is less than "
            f"the {total} experts of this rank's layers, so the cap cannot be kept; raise either"
        )
    return min(chosen, total), min(chosen, total)


def copies(units: Sequence[Unit], mode: str, num_experts: int) -> dict[str, int]:
    """Slots per unit name: three (stable, awaiting agreement, in flight) for what every snapshot takes.

    In ``popularity`` an expert has one, and two selections' worth are shared among experts of one size. What
    never changes has one.
    """
    found = {}
    shared: dict[int, int] = {}
    for unit in units:
        if unit.kind is UnitKind.FROZEN:
            found[unit.name] = 1
        elif unit.kind is UnitKind.EXPERT and mode != "full":
            given = shared.get(unit.nbytes, 0)
            extra = min(2, 2 * num_experts - given)
            shared[unit.nbytes] = given + extra
            found[unit.name] = 1 + extra
        else:
            found[unit.name] = 3
    return found
