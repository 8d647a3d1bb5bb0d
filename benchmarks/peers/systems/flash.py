# SPDX-License-Identifier: Apache-2.0
"""DLRover's flash checkpoint to memory: training writes into shared memory, an agent of the host keeps its description.

Run as a program it is such an agent: DLRover's saver as ``dlrover-run`` starts it, without the rest of that launcher.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from benchmarks.peers.jobs import HOSTS, RANKS, RANKS_PER_HOST
from benchmarks.peers.systems import Nothing


def name_host(host: int) -> None:
    """DLRover's sockets are files on a disk that emulated hosts share; they carry this name."""
    os.environ["TORCHELASTIC_RUN_ID"] = f"peers-host{host}"


class Flash(Nothing):
    """``save_checkpoint`` with ``StorageType.MEMORY``; no replica, which is the default."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        host = self.place.rank // RANKS_PER_HOST
        name_host(host)
        os.environ |= {"ROLE_NAME": "dlrover-trainer", "NODE_RANK": str(host), "NODE_NUM": str(HOSTS)}
        os.environ |= {"GROUP_RANK": str(host), "GROUP_WORLD_SIZE": str(HOSTS)}

        from dlrover.trainer.torch.flash_checkpoint.checkpointer import StorageType
        from dlrover.trainer.torch.flash_checkpoint.ddp import DdpCheckpointer

        self._to_memory = StorageType.MEMORY
        self._checkpointer = DdpCheckpointer(
            str(self.shared),
            local_shard_num=RANKS_PER_HOST,
            global_shard_num=RANKS,
            comm_backend="gloo",
        )

    def start(self) -> int | None:
        found = self._checkpointer.load_checkpoint()
        if not found:
            return None
        self.training.load(found["tensors"], found["extra"])
        return int(found["extra"]["iteration"])

    def after_step(self, iteration: int, interval: int) -> None:
        if iteration % interval:
            return
        state = {"tensors": self.training.tensors(), "extra": self.training.extra()}
        self._checkpointer.save_checkpoint(iteration, state, storage_type=self._to_memory)
        self.whole += 1


def main() -> int:
    """Be the agent of a host until somebody ends this process."""
    name_host(int(sys.argv[1]))

    from dlrover.python.elastic_agent.torch.ckpt_saver import AsyncCheckpointSaver

    AsyncCheckpointSaver.start_async_saving_ckpt()
    while True:
        time.sleep(60)


if __name__ == "__main__":
    sys.exit(main())
