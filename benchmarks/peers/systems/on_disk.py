# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a folder that all hosts see, one folder an iteration: what these systems share here."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.systems import Nothing

KEPT = 2


class OnDisk(Nothing):
    """Keeps the newest checkpoints that are whole; rank 0 removes older ones."""

    done = ""
    """A file that a folder has once the checkpoint in it is whole."""

    def newest(self) -> int | None:
        """The same on all ranks."""
        found: list[int | None] = [max(self._whole(), default=None)]
        torch.distributed.broadcast_object_list(found, src=0)
        return found[0]

    def folder(self, iteration: int) -> Path:
        return self.shared / f"iteration-{iteration}"

    def remove_old(self) -> None:
        """All but the newest ones that are whole."""
        if self.place.rank == 0:
            for iteration in sorted(self._whole())[:-KEPT]:
                shutil.rmtree(self.folder(iteration), ignore_errors=True)

    def _whole(self) -> list[int]:
        folders = [path for path in self.shared.glob("iteration-*") if (path / self.done).exists()]
        return [int(path.name.split("-")[1]) for path in folders]

    def state(self) -> dict[str, Any]:
        """Of this rank, under names that no other rank has."""
        rank = self.place.rank
        named: dict[str, Any] = {f"rank{rank}.{name}": value for name, value in self.training.tensors().items()}
        return named | {f"rank{rank}.extra": self.training.extra()}
