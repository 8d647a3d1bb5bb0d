# SPDX-License-Identifier: Apache-2.0
"""Mode ``full``: every snapshot holds all state, and a recovery is bitwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_moetion.modes.mode import Remark, Site, SnapshotMode, Staged, Vote
from megatron_moetion.recover.plan import choose_same_iteration
from megatron_moetion.replicate.agreement import Agreed
from megatron_moetion.replicate.pipeline import Skip
from megatron_moetion.schedule.scheduler import Carried
from megatron_moetion.schedule.sizes import Sizes
from megatron_moetion.select.budget import full_copies
from megatron_moetion.snapshot.capture import Contents
from megatron_moetion.store.retention import Newest, Retention, Settled
from megatron_moetion.store.spec import ArenaSpec
from megatron_moetion.units import UnitKind


class FullBlueprint:
    """All units in every snapshot; the windows may make snapshots rarer."""

    def facts(self, site: Site) -> dict[str, Any]:
        """Nothing has to be settled."""
        return {}

    def build(self, site: Site, facts: Sequence[Mapping[str, Any]]) -> FullMode:
        """See ``Blueprint``."""
        return FullMode(site)


class FullMode(SnapshotMode):
    """See the module."""

    name = "full"
    choose = staticmethod(choose_same_iteration)

    def __init__(self, site: Site) -> None:
        self.inventory = site.inventory
        copies = full_copies(self.inventory.units)
        self.spec = ArenaSpec.of(replace(site.identity, layout=self.inventory.fingerprint), self.inventory, copies)
        frozen = self.inventory.of_kind(UnitKind.FROZEN)
        self._units = tuple(u for u in range(len(self.inventory.units)) if u not in frozen)
        self._nbytes = sum(self.inventory.units[u].nbytes for u in self._units)
        self._sizes = Sizes(0, 0)
        self._interval = site.config.interval

    def retention(self, spec: ArenaSpec) -> Retention:
        """The newest whole capture of each unit, and all later ones."""
        return Newest()

    def settle(self, agreed: Agreed) -> Settled:
        """See ``SnapshotMode``; the size of snapshots moves to the one that all ranks afford."""
        self._sizes.agree(agreed.votes)
        return super().settle(agreed)

    def vote(self, carried: Carried) -> Vote:
        """See ``SnapshotMode``. Snapshots cannot be smaller, only rarer."""
        mask, smaller = self._sizes.vote(carried.nbytes, lambda _: self._nbytes)
        text = f"snapshots are made to fit ({smaller} here): {carried.why}"
        return Vote(mask=mask, remark=Remark(kind="budget", text=text) if smaller is not None else None)

    def contents(self, iteration: int) -> tuple[Contents | Skip, Remark | None]:
        """All units that ever change."""
        if self._sizes.skips(iteration // self._interval):
            return Skip(reason="budget"), None
        return Contents(units=self._units), None

    def baseline(self, iteration: int, staged: Staged) -> Contents:
        """All units."""
        return Contents(units=tuple(range(len(self.inventory.units))))
