# SPDX-License-Identifier: Apache-2.0
"""The arenas that a rank writes while it trains, and what they release."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.retention import Retention, Settled


@dataclass(frozen=True, kw_only=True, eq=False)
class OpenArenas:
    """One rank's arena, and those of the ranks that it is a buddy of."""

    own: Arena
    held: Mapping[int, Arena]
    """By owner: those that this rank is a buddy of."""
    retentions: Mapping[int, Retention]
    """By owner: what that owner's arenas must keep."""

    def all(self) -> list[Arena]:
        """Own first."""
        return [self.own, *self.held.values()]

    def release(self, settled: Settled) -> None:
        """Drop the captures that recovery no longer needs, and write the stable iteration down."""
        for arena in self.all():
            retention = self.retentions[arena.spec.identity.owner]

            def change(page: Page, retention: Retention = retention) -> dict[str, Any]:
                return {"records": retention.keep(page.records, settled), "stable": settled.stable}

            arena.edit(change)

    def close(self) -> None:
        """Close all files; they stay."""
        for arena in self.all():
            arena.close()
