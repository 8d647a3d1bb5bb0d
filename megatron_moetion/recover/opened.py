# SPDX-License-Identifier: Apache-2.0
"""Arenas that a rank opens while it starts: each is mapped once, from the survey on."""

from __future__ import annotations

from collections.abc import Callable

from megatron_moetion.store.arena import Arena
from megatron_moetion.store.node import NodeFolder


class Opened:
    """Arenas of this rank's node that are open, by name. ``on_open`` is called with each that is opened."""

    def __init__(self, node: NodeFolder, on_open: Callable[[Arena], None]) -> None:
        self.node = node
        self._on_open = on_open
        self._arenas: dict[str, Arena] = {}

    def open(self, name: str) -> Arena:
        """The arena of this name, which stays open until ``take`` or ``close``. Raises as ``NodeFolder.open_arena``."""
        if name not in self._arenas:
            self._arenas[name] = self.node.open_arena(name)
            self._on_open(self._arenas[name])
        return self._arenas[name]

    def take(self, name: str) -> Arena:
        """The arena of this name; whoever takes it closes it. Raises as ``NodeFolder.open_arena``."""
        self.open(name)
        return self._arenas.pop(name)

    def close(self, name: str) -> None:
        """Let go of an arena, if it is open."""
        if name in self._arenas:
            self._arenas.pop(name).close()

    def close_all(self) -> None:
        """Let go of all that was not taken."""
        for name in list(self._arenas):
            self.close(name)
