# SPDX-License-Identifier: Apache-2.0
"""Registers a rank's arena with its device in the background: that takes seconds for each 10 GiB."""

from __future__ import annotations

from concurrent.futures import Future

from megatron_moetion.arrays import Bytes
from megatron_moetion.clock import Clock
from megatron_moetion.replicate.worker import Threads, Worker
from megatron_moetion.snapshot.packer import Packer


class Pinning:
    """Has ``packer`` adopt an arena in a thread of its own. Nothing else may use the packer until ``finish``."""

    def __init__(self, packer: Packer, threads: Threads, clock: Clock) -> None:
        self._packer = packer
        self._threads = threads
        self._clock = clock
        self._memory: Bytes | None = None
        """What is being adopted; referred to, so that it stays mapped meanwhile."""
        self._worker: Worker | None = None
        self._adopted: Future[None] | None = None
        self.seconds = 0.0
        """What the last adoption took."""

    def begin(self, memory: Bytes) -> None:
        """Start to adopt an arena, unless that was begun."""
        if self._is_for(memory):
            return
        self.drop()
        self._memory = memory
        self._worker = self._threads.worker("moetion-pin")
        self._adopted = self._worker.submit(self._adopt, memory)

    def finish(self, memory: Bytes) -> None:
        """Return when this arena is adopted. Errors as ``Packer.adopt``."""
        self.begin(memory)
        assert self._adopted is not None
        try:
            self._adopted.result()
        finally:
            self._end()

    def drop(self) -> None:
        """Undo what was begun: after that the packer refers to no arena."""
        if self._worker is not None:
            self._end()
            self._packer.close()

    def abandon(self) -> None:
        """Wait for nothing, in a process that is about to end."""
        if self._worker is not None:
            self._worker.abandon()

    def _adopt(self, memory: Bytes) -> None:
        began = self._clock.monotonic()
        self._packer.adopt(memory)
        self.seconds = self._clock.monotonic() - began

    def _is_for(self, memory: Bytes) -> bool:
        return self._memory is not None and self._memory.ctypes.data == memory.ctypes.data

    def _end(self) -> None:
        """The thread ends, with what it does."""
        assert self._worker is not None
        self._worker.close()
        self._worker, self._adopted, self._memory = None, None, None
