# SPDX-License-Identifier: Apache-2.0
"""nvidia-resiliency-ext: local checkpoints in memory, replicated within cliques of two hosts."""

from __future__ import annotations

from typing import Any

import torch
from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue
from nvidia_resiliency_ext.checkpointing.local.basic_state_dict import (
    BasicTensorAwareStateDict,
    dict_list_map_inplace,
)
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

from benchmarks.peers.jobs import HOSTS, RANKS_PER_HOST
from benchmarks.peers.systems import Nothing


class HostTensors(BasicTensorAwareStateDict):
    """Of a machine without a GPU: theirs refuses tensors that are not on one, and copies by moving them off it."""

    def __init__(self, state_dict: dict[str, Any]) -> None:
        self.state_dict = state_dict
        self._is_hollow = False

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        dict_list_map_inplace(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, self.state_dict)


class Local(Nothing):
    """Asynchronous: a forked process writes, as with Megatron-LM's ``--async-save``."""

    is_async = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        strategy = CliqueReplicationStrategy.from_replication_params(RANKS_PER_HOST, HOSTS)
        self._manager = LocalCheckpointManager(str(self.memory), repl_strategy=strategy)
        self._queue = AsyncCallsQueue(persistent=False)

    def start(self) -> int | None:
        newest = self._manager.find_latest()
        if newest < 0:
            return None
        found, _ = self._manager.load()
        state = found.state_dict
        self.training.load(state["tensors"], state["extra"])
        return int(newest)

    def after_step(self, iteration: int, interval: int) -> None:
        self._queue.maybe_finalize_async_calls(blocking=not iteration % interval)
        if iteration % interval:
            return
        state = {"tensors": self.training.tensors(), "extra": self.training.extra()}
        request = self._manager.save(HostTensors(state), iteration, is_async=self.is_async)
        if request is not None:
            self._queue.schedule_async_request(request)
        self.whole += 1

    def drain(self) -> int:
        self._queue.maybe_finalize_async_calls(blocking=True)
        return self.whole

    def close(self) -> None:
        torch.distributed.barrier()
        self._queue.close()


class LocalSync(Local):
    """Training waits for everything."""

    is_async = False
