# SPDX-License-Identifier: Apache-2.0
"""The arenas that a rank writes while it trains, and what its own one releases."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from megatron_moetion.store.arena import Arena
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.retention import Retention, Settled


class OpenArenas:
    """One rank's arena, and those that it keeps for other ranks. May be used from any thread.

    ``held``: arenas by owner. ``retention``: what this rank's own arena must keep; the others mirror their owners'.
    """

    def __init__(self, *, own: Arena, held: Mapping[int, Arena], retention: Retention) -> None:
        self.own = own
        self._retention = retention
        self._held = dict(held)
        self._lock = threading.Lock()

    @property
    def held(self) -> Mapping[int, Arena]:
        """By owner: the arenas that this rank keeps for others at this moment."""
        with self._lock:
            return dict(self._held)

    def all(self) -> list[Arena]:
        """Own first."""
        return [self.own, *self.held.values()]

    def add(self, arena: Arena) -> None:
        """From now on this rank keeps this arena for its owner."""
        with self._lock:
            self._held[arena.spec.identity.owner] = arena

    def take_out(self, owner: int) -> Arena | None:
        """The arena of ``owner``, which is the caller's from now on; None where there is none."""
        with self._lock:
            return self._held.pop(owner, None)

    def release(self, settled: Settled) -> None:
        """Drop the captures of this rank that recovery no longer needs, and write the stable iteration down."""

        def change(page: Page) -> dict[str, Any]:
            return {"records": self._retention.keep(page.records, settled), "stable": settled.stable}

        self.own.edit(change)

    def close(self) -> None:
        """Close all files; they stay."""
        for arena in self.all():
            arena.close()
