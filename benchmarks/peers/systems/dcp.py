# SPDX-License-Identifier: Apache-2.0
"""``torch.distributed.checkpoint.async_save``, to a disk that all hosts see."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.peers.systems.on_disk import OnDisk


class Thread(OnDisk):
    """A thread writes. Staging memory is kept from save to save, and a group of its own carries the coordination."""

    kind = AsyncCheckpointerType.THREAD
    done = ".metadata"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        shared = self.kind == AsyncCheckpointerType.PROCESS
        self._stager = DefaultStager(StagingOptions(False, shared, False, False))  # the rest needs CUDA
        self._group = torch.distributed.new_group(backend="gloo")
        self._saving: Future[Any] | None = None

    def start(self) -> int | None:
        newest = self.newest()
        if newest is None:
            return None
        state = self.state()
        tensors = {name: torch.empty_like(value) for name, value in state.items() if isinstance(value, torch.Tensor)}
        wanted = state | tensors
        dcp.load(wanted, checkpoint_id=self.folder(newest))
        prefix = f"rank{self.place.rank}."
        found = {name.removeprefix(prefix): value for name, value in wanted.items()}
        self.training.load(found, found["extra"])
        return newest

    def after_step(self, iteration: int, interval: int) -> None:
        if iteration % interval:
            return
        self._finish()
        self._saving = dcp.async_save(
            self.state(),
            checkpoint_id=self.folder(iteration),
            process_group=self._group if self.kind == AsyncCheckpointerType.THREAD else None,
            async_checkpointer_type=self.kind,
            async_stager=self._stager,
        )

    def _finish(self) -> None:
        """One save at a time: wait for the last one."""
        if self._saving is not None:
            self._saving.result()
            self._saving = None
            self.whole += 1
            self.remove_old()

    def drain(self) -> int:
        self._finish()
        return self.whole

    def close(self) -> None:
        self._stager.close()


class Process(Thread):
    """A process writes."""

    kind = AsyncCheckpointerType.PROCESS
