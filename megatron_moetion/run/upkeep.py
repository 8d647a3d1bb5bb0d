# SPDX-License-Identifier: Apache-2.0
"""Makes files of a store again that were deleted while training runs."""

from __future__ import annotations

from megatron_moetion.errors import DeviceFault, StoreError
from megatron_moetion.observe.journal import Journal
from megatron_moetion.replicate.pipeline import Pipeline
from megatron_moetion.snapshot.packer import Packer
from megatron_moetion.store.arena import Arena
from megatron_moetion.store.lock import NodeLock
from megatron_moetion.store.node import NodeFolder, write_pid
from megatron_moetion.store.open import OpenArenas

TRY_AGAIN = 16
"""Snapshots until a store that could not be made again is tried once more."""


class Upkeep:
    """Watches one rank's files. The memory of a deleted file is still mapped; a restart would not find it."""

    def __init__(
        self,
        *,
        node: NodeFolder,
        lock: NodeLock,
        arenas: OpenArenas,
        packer: Packer,
        pipeline: Pipeline,
        journal: Journal,
        rank: int,
        attempt: int,
    ) -> None:
        self._node = node
        self._lock = lock
        self._arenas = arenas
        self._packer = packer
        self._pipeline = pipeline
        self._journal = journal
        self._rank = rank
        self._attempt = attempt
        self._tried_in = 0
        self._times = 0
        """How often files were found deleted: trouble that comes back is reported again."""

    def check(self, iteration: int) -> None:
        """Once a snapshot, when the last one is packed. A failure is logged, and tried again later."""
        found = self._gone()
        gone = [a for a in self._gone() if a in found] if found else []  # one given up meanwhile is no longer held
        if not gone and self._lock.has_file:
            return
        if self._tried_in:
            self._tried_in -= 1
            return
        what = f"{len(gone)} of this rank's {len(self._arenas.all())} arenas" if gone else "the lock"
        self._times += 1
        said = f"{what} in {self._node.path} were deleted while training runs"
        self._pipeline.drain()  # bounded; then this rank's own threads do not use the arenas
        with self._pipeline.quiet() as is_quiet:
            if is_quiet:
                self._make_again(iteration, said)
            else:
                self._tried_in = TRY_AGAIN
                self._report(
                    "made-again", iteration, f"{said}; they are in use, and it is tried again later to make them"
                )

    def _make_again(self, iteration: int, said: str) -> None:
        """No thread uses the arenas. One that its owner has taken elsewhere meanwhile is no longer among them."""
        gone = self._gone()
        self._packer.close()
        try:
            self._node.make_again(self._lock)
            write_pid(self._node, self._rank, self._attempt)
            for arena in gone:
                arena.make_file_again()
        except (StoreError, OSError) as error:
            self._tried_in = TRY_AGAIN
            self._report(
                "lost",
                iteration,
                f"{said} and cannot be made again: {error}. A restart finds nothing in this node's memory",
            )
        else:
            self._report("made-again", iteration, f"{said}; they were made again, and protect as before")
        try:
            self._packer.adopt(self._arenas.own.memory)
        except DeviceFault as error:
            self._report("unpinned", iteration, f"the arena was made again and could not be pinned: {error}")

    def _gone(self) -> list[Arena]:
        return [a for a in self._arenas.all() if not a.has_file]

    def _report(self, kind: str, iteration: int, text: str) -> None:
        self._journal.warn_once(f"store-{kind}-{self._times}", iteration, text)
