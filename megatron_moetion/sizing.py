# SPDX-License-Identifier: Apache-2.0
"""How a rank's state is cut, and how large its snapshots and its arena are. Settled at start, once.

Each rank says what it affords, and all take what suits the tightest one; so making a ``Sizing`` is collective.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_moetion.config import DEFAULT_PERIOD, MAX_PERIOD, MIN_PERIOD, MoetionConfig
from megatron_moetion.errors import ConfigError
from megatron_moetion.replicate.channel import Fabric
from megatron_moetion.replicate.collective import on_all_ranks
from megatron_moetion.select.budget import (
    Limits,
    affordable_experts,
    copies,
    exact_copies,
    experts_per_snapshot,
    shortest_period,
)
from megatron_moetion.select.rotation import remembered_steps
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.store.arena import free_bytes
from megatron_moetion.store.node import NodeFolder, bytes_here, period_found
from megatron_moetion.store.spec import ArenaIdentity, ArenaSpec
from megatron_moetion.units import Inventory, UnitKind

_STORE_SHARE = 0.9
"""Of the store's free memory, what arenas may take before a shorter period is chosen. The rest is for others."""
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
        bytes_a_step: int = 0,
        environment: Mapping[str, str],
    ) -> Sizing:
        """Collective. ``identity`` as far as it does not follow from the sizes; ``num_experts`` of this rank's layers.

        ``bytes_a_step``: of the host state for each step that it tells of, in mode ``exact``. ``ConfigError`` where
        what was asked for cannot be kept on some rank.
        """
        rank = _Rank(config, identity, inventory, num_experts, bytes_a_step)
        # One gather, so that ranks whose settings differ live to be told.
        facts = fabric.gather(on_all_ranks(fabric, lambda: rank.facts(node, environment)))
        return on_all_ranks(fabric, lambda: cls._of(rank, facts))

    @classmethod
    def _of(cls, rank: _Rank, facts: Sequence[Mapping[str, Any]]) -> Sizing:
        config, identity, inventory, num_experts = rank.config, rank.identity, rank.inventory, rank.num_experts
        if config.mode != "exact":
            experts = min((f["experts"] for f in facts if f["experts"] is not None), default=math.inf)
            limits = experts_per_snapshot(config, num_experts, experts)
            return cls(
                inventory=inventory,
                log=None,
                always=(*inventory.of_kind(UnitKind.DENSE), *inventory.of_kind(UnitKind.HOST)),
                limits=limits,
                spec=_spec(identity, inventory, copies(inventory.units, config.mode, limits.most), limits.most),
                note="",
            )
        period, note = (config.period, "") if config.period else rank.period(facts)
        log = rank.cut(period)
        return cls(
            inventory=log.inventory,
            log=log,
            always=log.always,
            limits=experts_per_snapshot(config, num_experts),
            spec=_exact_spec(identity, log),
            note=note,
        )


@dataclass(frozen=True)
class _Rank:
    """What one rank can say for itself, and what follows from what all have said."""

    config: MoetionConfig
    identity: ArenaIdentity
    inventory: Inventory
    num_experts: int
    bytes_a_step: int

    def facts(self, node: NodeFolder, environment: Mapping[str, str]) -> dict[str, Any]:
        """What this rank affords, as far as it matters for these settings. JSON-able."""
        config = self.config
        facts: dict[str, Any] = {"experts": None}
        chooses = config.mode == "exact" and not config.period
        if config.mode == "popularity" and config.snapshot_bytes and self.num_experts:
            fits = affordable_experts(self.inventory.units, self.num_experts, config.snapshot_bytes)
            facts["experts"] = None if fits == math.inf else fits
        if chooses and config.snapshot_bytes:
            facts["shortest"] = shortest_period(self.cut(MAX_PERIOD), config.snapshot_bytes)
        elif chooses:
            facts["found"] = period_found(node)
            facts["arenas"] = int(environment.get("LOCAL_WORLD_SIZE", "1")) * (1 + config.replicas)
            facts["needs"] = [_exact_spec(self.identity, self.cut(p)).nbytes for p in _PERIODS]
            facts["room"] = _STORE_SHARE * (free_bytes(node.path) + bytes_here(node))
        return facts

    def cut(self, period: int) -> GradientLog:
        """State as it is captured with this period; the host state tells of as many steps as it needs."""
        steps = remembered_steps(period) * self.bytes_a_step
        units = (
            replace(u, reserved_bytes=u.reserved_bytes + steps) if u.kind is UnitKind.HOST else u
            for u in self.inventory.units
        )
        return gradient_log(Inventory(units=tuple(units)), period)

    def period(self, facts: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
        """The period that suits all ranks, and why it is not the usual one."""
        if self.config.snapshot_bytes:
            shortest = max(int(f["shortest"]) for f in facts if "shortest" in f)
            if shortest > MAX_PERIOD:
                log = self.cut(MAX_PERIOD)
                raise ConfigError(
                    f"--moetion-snapshot-bytes {self.config.snapshot_bytes} is too little for mode 'exact' on some "
                    f"rank: here the gradients of an iteration are {log.log_bytes} bytes, and {log.state_bytes} "
                    f"bytes of state must be captured within {MAX_PERIOD} iterations"
                )
            return shortest, ""
        facts = [f for f in facts if "needs" in f]
        found = Counter(f["found"] for f in facts if f["found"])
        if found:  # a run that goes on: its arenas take room already, and are of use with their own period only
            return int(found.most_common(1)[0][0]), ""
        # A small rank's node may have to hold a large rank's replica, so the largest has to fit everywhere.
        needs = [max(sizes) for sizes in zip(*(f["needs"] for f in facts), strict=True)]
        tightest = min(facts, key=lambda f: f["room"] / f["arenas"])
        fits = (p for p, need in zip(_PERIODS, needs, strict=True) if need * tightest["arenas"] <= tightest["room"])
        period = next(fits, MIN_PERIOD)
        if period == DEFAULT_PERIOD:
            return period, ""
        return period, (
            f"the period is {period}, not {DEFAULT_PERIOD}: of the store's free memory on the tightest node "
            f"{tightest['room'] / 2**30:.2f} GiB may be used, and period {DEFAULT_PERIOD} takes "
            f"{needs[0] * tightest['arenas'] / 2**30:.2f} GiB; enlarge shared memory, or choose with --moetion-period"
        )


def _exact_spec(identity: ArenaIdentity, log: GradientLog) -> ArenaSpec:
    return _spec(replace(identity, period=len(log.groups)), log.inventory, exact_copies(log))


def _spec(identity: ArenaIdentity, inventory: Inventory, slots: Mapping[str, int], experts: int = 0) -> ArenaSpec:
    return ArenaSpec.of(replace(identity, layout=inventory.fingerprint), inventory, slots, experts)
