# SPDX-License-Identifier: Apache-2.0
"""How many experts a snapshot takes, and how many captures of each unit an arena must hold. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_moetion.config import MAX_PERIOD, MIN_PERIOD, MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.select.rotation import SPARE_LOGS, STATE_SLOTS
from megatron_moetion.select.shares import Shares
from megatron_moetion.snapshot.gradlog import GradientLog
from megatron_moetion.units import Unit, UnitKind

_IN_EVERY_SNAPSHOT = 3
"""Captures that an arena has room for, of a unit that each snapshot holds."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How many experts (K) of a rank a snapshot takes."""

    fewest: int
    usual: int
    """The most that idle windows may allow."""
    most: int
    """The most that the budget of lost tokens may need; the arena has room for this many."""


def experts_per_snapshot(config: MoetionConfig, total: int, affordable: float = math.inf) -> Limits:
    """The K of a rank whose layers hold ``total`` experts.

    A number fixes K, and so does ``affordable``, the experts that fit ``--moetion-snapshot-bytes`` on every rank that
    shares them. Where the user gave neither, K moves between the staleness cap's need and twice that, of which half
    follows popularity. The budget of lost tokens may ask for as many as the user says, else for half of the experts:
    then arenas hold two captures of an expert on average, and mode ``full`` three. ``ConfigError`` where the cap cannot
    be kept.
    """
    needed = -(-total // config.staleness_cap)
    given = f"--moetion-experts-per-snapshot {config.experts_per_snapshot}"
    chosen = config.experts_per_snapshot
    if config.snapshot_bytes:
        chosen = max(0, int(min(affordable, total)))
        given = f"--moetion-snapshot-bytes {config.snapshot_bytes} ({chosen} experts)"
    if (config.snapshot_bytes or chosen) and chosen < needed:
        raise ConfigError(
            f"{given} x --moetion-staleness-cap {config.staleness_cap} is less than "
            f"the {total} experts of this rank's layers, so the cap cannot be kept; raise either"
        )
    fewest = min(chosen, total) if chosen else needed
    usual = fewest if chosen else min(-(-2 * total // config.staleness_cap), total)
    most = usual
    if config.lost_token_budget and not config.snapshot_bytes:
        most = max(usual, min(config.max_experts_per_snapshot or total // 2, total))
    return Limits(fewest=fewest, usual=usual, most=most)


def affordable_experts(shares: Shares, always_bytes: Sequence[int], snapshot_bytes: int) -> int:
    """How many experts fit into a snapshot on every rank that shares them; -1 if even none does not.

    ``always_bytes``: by rank, the units of every snapshot.
    """
    room = snapshot_bytes - max(always_bytes)
    numbers = range(len(shares.nbytes) + 1)
    return max((k for k in numbers if shares.busiest_bytes(k) <= room), default=-1)


def full_copies(units: Sequence[Unit]) -> dict[str, int]:
    """Slots per unit name in mode ``full``: stable, awaiting agreement, in flight. What never changes has one."""
    return {u.name: 1 if u.kind is UnitKind.FROZEN else _IN_EVERY_SNAPSHOT for u in units}


def popularity_copies(units: Sequence[Unit], num_experts: int, expert_bytes: float = math.inf) -> dict[str, int]:
    """Slots per unit name in mode ``popularity``; ``num_experts`` are the most that a snapshot takes.

    Each expert has one, and two selections' worth are shared among experts of one size; ``expert_bytes`` is the most
    that a selection has on this rank. Other units as in mode ``full``.
    """
    found = full_copies(units)
    shared: dict[int, int] = {}
    for unit in (u for u in units if u.kind is UnitKind.EXPERT):
        taken = shared.get(unit.nbytes, 0)
        extra = min(2, 2 * int(min(num_experts, expert_bytes // unit.nbytes)) - taken)
        shared[unit.nbytes] = taken + extra
        found[unit.name] = 1 + extra
    return found


def exact_copies(log: GradientLog) -> dict[str, int]:
    """Slots per unit name in mode ``exact``: two captures of each slice, gradients of a period and a few more."""
    found = {u.name: 1 if u.kind is UnitKind.FROZEN else STATE_SLOTS for u in log.inventory.units}
    for unit in log.log_of.values():
        found[log.inventory.units[unit].name] = len(log.groups) + SPARE_LOGS
    # A snapshot that finds no room for these would break all chains: as much to spare as gradients have.
    return found | {log.inventory.units[u].name: 2 + SPARE_LOGS for u in log.always}


def shortest_period(log: GradientLog, snapshot_bytes: float) -> int:
    """The shortest period whose snapshots of one rank have at most these bytes; above ``MAX_PERIOD`` if none has."""
    room = snapshot_bytes - log.log_bytes - sum(log.inventory.units[u].nbytes for u in log.always)
    return max(MIN_PERIOD, math.ceil(log.state_bytes / room)) if room > 0 else MAX_PERIOD + 1


def longer_period(log: GradientLog, carried_bytes: float, arenas: float) -> str:
    """What to do where snapshots are larger than an iteration carries, for a person; ``arenas`` are held by a rank."""
    now = len(log.groups)
    period = max(shortest_period(log, carried_bytes), now + 1)
    if period > MAX_PERIOD:
        return (
            f"no --moetion-period would fit, since gradients are {log.log_bytes / 1e6:.1f} MB of it; smaller ones "
            f"might (--grad-reduce-in-bf16), and mode 'popularity' needs none"
        )
    more = (period - now) * log.log_bytes * arenas
    return f"here --moetion-period {period} would fit, and take {more / 2**20:.1f} MiB more memory"
