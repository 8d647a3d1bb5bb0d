# SPDX-License-Identifier: Apache-2.0
"""torch_checkpointing: copies staged in shared memory, which a process of each rank writes to a disk."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

from torch_checkpointing import CheckpointManager
from torch_checkpointing.checkpoint_process import CheckpointProcessConfig
from torch_checkpointing.config import AsyncCheckpointSaverConfig
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

from benchmarks.peers.systems.on_disk import OnDisk

START_LIMIT_S = 300
"""Of its process; 30 s, the default, is little where four of them start on two cores."""


class Manager(OnDisk):
    """Staging overlaps with training; its lock keeps the optimizer from changing what is being copied."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        patient = CheckpointProcessConfig(subprocess_init_timeout_secs=START_LIMIT_S)
        config = CheckpointManager.Config(
            save=AsyncCheckpointSaverConfig(process_config=patient),
            storage_config=LocalFileSystemStorageConfig(use_direct_io=False),  # its default fails here
        )
        self._manager = CheckpointManager(config)
        self._saving: Future[Any] | None = None
        self._waited_s = 0.0
        self._locks: list[Any] = []
        for inner in self.training._inner():
            inner.register_step_pre_hook(lambda *_: self._lock())
            inner.register_step_post_hook(lambda *_: self._unlock())

    def start(self) -> int | None:
        newest = self.newest()
        if newest is None:
            return None
        found = self._manager.load(str(self.folder(newest)), into=self._payload())
        self.training.load(found["tensors"], found["extra"])
        return newest

    def after_step(self, iteration: int, interval: int) -> None:
        if iteration % interval:
            return
        self._finish()
        self._saving = self._manager.save(str(self.folder(iteration)), self._payload())

    def waited_s(self) -> float:
        return self._waited_s

    def drain(self) -> int:
        self._finish()
        return self.whole

    def close(self) -> None:
        self._manager.close()

    def _payload(self) -> dict[str, Any]:
        return {"tensors": self.training.tensors(), "extra": self.training.extra()}

    def _finish(self) -> None:
        if self._saving is not None:
            self._saving.result()
            self._saving = None
            self.whole += 1
            self.remove_old()

    def _lock(self) -> None:
        began = time.monotonic()
        lock = self._manager.lock()
        lock.__enter__()
        self._waited_s += time.monotonic() - began
        self._locks.append(lock)

    def _unlock(self) -> None:
        self._locks.pop().__exit__(None, None, None)
