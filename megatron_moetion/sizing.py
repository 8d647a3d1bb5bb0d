# SPDX-License-Identifier: Apache-2.0
"""How a rank's state is cut, and how large its snapshots and its arena are. Settled at start, once.

Each rank says what it affords, and all take what suits the tightest one; so making a ``Sizing`` is collective.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megatron_moetion.config import DEFAULT_PERIOD, MAX_PERIOD, MIN_PERIOD, MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.select.budget import (
    Limits,
    affordable_experts,
    copies,
    exact_copies,
    experts_per_snapshot,
    shortest_period,
)
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.store.arena import ArenaIdentity, ArenaSpec, free_bytes
from megatron_moetion.store.node import NodeFolder, period_found
from megatron_moetion.units import Inventory, UnitKind

_STORE_SHARE = 0.9
"""Of the store's free memory, what arenas may take before a shorter period is chosen; the rest is for others."""
_PERIODS = range(DEFAULT_PERIOD, MIN_PERIOD - 1, -1)
"""From the usual one down."""


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """One rank's."""

    inventory: Inventory
    """What captures are made of: the adapter's units, or in mode ``exact`` slices of them and their gradients."""
    log: GradientLog | None
    """How ``inventory`` was cut; None but in mode ``exact``."""
    always: tuple[int, ...]
    """Units that every snapshot holds."""
    limits: Limits
    """Experts in a snapshot."""
    spec: ArenaSpec
    note: str
    """Why the period is not the usual one, for a person; empty where nobody needs to know."""

    @classmethod
    def settle(
        cls,
        *,
        config: MoetionConfig,
        fabric: Fabric,
        node: NodeFolder,
        identity: ArenaIdentity,
        inventory: Inventory,
        num_experts: int,
        environment: Mapping[str, str],
    ) -> Sizing:
        """Collective. ``identity`` as far as it does not follow from the sizes; ``num_experts`` of this rank's layers.

        ``ConfigError`` where what was asked for cannot be kept on some rank.
        """
        log, note = None, ""
        if config.mode == "exact":
            sharers = int(environment.get("LOCAL_WORLD_SIZE", "1")) * (1 + config.replicas)
            period, note = _period(config, fabric, node, identity, inventory, sharers)
            log = gradient_log(inventory, period)
            inventory = log.inventory
        limits = _limits(config, fabric, inventory, num_experts)
        return cls(
            inventory=inventory,
            log=log,
            always=log.always
            if log is not None
            else (*inventory.of_kind(UnitKind.DENSE), *inventory.of_kind(UnitKind.HOST)),
            limits=limits,
            spec=_exact_spec(identity, log)
            if log is not None
            else _spec(identity, inventory, copies(inventory.units, config.mode, limits.most)),
            note=note,
        )


def _period(
    config: MoetionConfig,
    fabric: Fabric,
    node: NodeFolder,
    identity: ArenaIdentity,
    inventory: Inventory,
    sharers: int,
) -> tuple[int, str]:
    """The period that was asked for, or that the tightest rank affords; and a note. ``sharers``: arenas in memory."""
    if config.period:
        return config.period, ""
    if config.snapshot_bytes:
        whole = gradient_log(inventory, 1)
        period = max(fabric.gather(shortest_period(whole, config.snapshot_bytes)))
        if period > MAX_PERIOD:
            raise ConfigError(
                f"--moetion-snapshot-bytes {config.snapshot_bytes} is too little for mode 'exact' on some rank: "
                f"here the gradients of an iteration are {whole.log_bytes} bytes, and {whole.state_bytes} bytes of "
                f"state must be captured within {MAX_PERIOD} iterations"
            )
        return period, ""

    room = _STORE_SHARE * free_bytes(node.path)
    needs = {p: sharers * _exact_spec(identity, gradient_log(inventory, p)).nbytes for p in _PERIODS}
    held = next((p for p in _PERIODS if needs[p] <= room), MIN_PERIOD)
    facts = fabric.gather((period_found(node), held))
    found = Counter(p for p, _ in facts if p)
    if found:  # a run that goes on: its arenas take room already, and are of use with their own period only
        return found.most_common(1)[0][0], ""
    period = min(held for _, held in facts)
    if period == DEFAULT_PERIOD:
        return period, ""
    return period, (
        f"the period is {period}, not {DEFAULT_PERIOD}: on some node the store has no room for more (on this one "
        f"{free_bytes(node.path) / 2**30:.2f} GiB are free, and period {DEFAULT_PERIOD} takes "
        f"{needs[DEFAULT_PERIOD] / 2**30:.2f} GiB); enlarge shared memory, or choose with --moetion-period"
    )


def _exact_spec(identity: ArenaIdentity, log: GradientLog) -> ArenaSpec:
    return _spec(replace(identity, period=len(log.groups)), log.inventory, exact_copies(log))


def _spec(identity: ArenaIdentity, inventory: Inventory, slots: Mapping[str, int]) -> ArenaSpec:
    return ArenaSpec.of(replace(identity, layout=inventory.fingerprint), inventory, slots)


def _limits(config: MoetionConfig, fabric: Fabric, inventory: Inventory, num_experts: int) -> Limits:
    """How many experts a snapshot takes. The same on all ranks: a byte budget is what the tightest one affords."""
    fits = None
    if config.snapshot_bytes and num_experts and config.mode == "popularity":
        fits = affordable_experts(inventory.units, num_experts, config.snapshot_bytes)
    everywhere = [f for f in fabric.gather(None if fits == math.inf else fits) if f is not None]
    return experts_per_snapshot(config, num_experts, min(everywhere, default=math.inf))
