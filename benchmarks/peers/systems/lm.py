# SPDX-License-Identifier: Apache-2.0
"""lm-resiliency: GEMINI's in-memory checkpoints with one peer, by ``save_tensors``, its cheapest call."""

from __future__ import annotations

from typing import Any

from lm_resiliency.checkpointing.config import InMemoryCkptConfig
from lm_resiliency.checkpointing.manager import InMemoryCheckpointManager, RecoveryMode

from benchmarks.peers.jobs import RANKS_PER_HOST
from benchmarks.peers.systems import Nothing


class Gemini(Nothing):
    """Copies live in the memory of the processes; those that end in an orderly way write their own and their peer's.

    A rank reads only its own folder when it starts. Survivors therefore write to a disk that all hosts see: there the
    replica of a lost rank is found by the one that takes its place, without a manager that moves files between hosts.
    """

    verify = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config = InMemoryCkptConfig(
            interval=1,  # the driver says when
            replication_jump=RANKS_PER_HOST,
            disk_flush_interval=0,
            disk_folder=str(self.shared),
            run_id="peers",
            verify_integrity=self.verify,
            pin_memory=False,  # needs CUDA
        )
        self._manager = InMemoryCheckpointManager(config)

    def start(self) -> int | None:
        found = self._manager.load_tensors(RecoveryMode.LATEST_GEMINI)
        if found is None:
            return None
        tensors, iteration, extra = found
        names = list(self.training.tensors())
        assert extra is not None
        self.training.load(dict(zip(names, tensors, strict=True)), extra)
        return iteration

    def after_step(self, iteration: int, interval: int) -> None:
        if iteration % interval:
            return
        self._manager.save_tensors(list(self.training.tensors().values()), iteration, extra=self.training.extra())

    def drain(self) -> int:
        if self._manager._save_count > self.whole:
            self._manager.finalize_replication()
            self.whole = self._manager._save_count
        return self.whole

    def close(self) -> None:
        self._manager.close()


class GeminiVerified(Gemini):
    """With ``verify_integrity``, which is off by default."""

    verify = True
