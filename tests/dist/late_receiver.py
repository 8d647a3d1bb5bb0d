# SPDX-License-Identifier: Apache-2.0
"""One of two pipeline stages. The second asks for its input late; the first prints what it recorded."""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import distributed as dist

from megatron_moetion.mcore import cpu_device

cpu_device.install()

# isort: split
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import p2p_communication

from megatron_moetion.mcore.traffic import TimedCommunicator, TrafficHooks
from megatron_moetion.schedule.recorder import HostClock, Recorder

SHAPE = (64, 1, 256)


def main(rank: int, rendezvous: str, batched: bool, late_s: float) -> None:
    dist.init_process_group("gloo", f"file://{rendezvous}", timedelta(seconds=60), world_size=2, rank=rank)
    config = SimpleNamespace(
        pipeline_dtype=torch.float32, variable_seq_lengths=False, mtp_standalone=False, use_ring_exchange_p2p=False,
        batch_p2p_comm=batched, batch_p2p_sync=False, timers=None, virtual_pipeline_model_parallel_size=None,
    )  # fmt: skip
    recorder = Recorder(HostClock())
    chunk = SimpleNamespace(config=config, modules=list, bucket_groups=[], expert_parallel_bucket_groups=[])
    posting = p2p_communication._batched_p2p_ops, p2p_communication._p2p_ops
    hooks = TrafficHooks([cast(DistributedDataParallel, chunk)], recorder, crosses=lambda ranks: True)
    stage = TimedCommunicator(dist.group.WORLD, config, recorder, True, hooks.requests)
    tensor = torch.full(SHAPE, float(rank))
    got: Any = None
    dist.barrier()
    if rank == 0:
        got = stage.send_forward_recv_backward(tensor, SHAPE, is_last_stage=False)
    else:
        time.sleep(late_s)
        assert stage.recv_forward(SHAPE, is_first_stage=False).eq(0).all()
        time.sleep(late_s)
        stage.send_backward(tensor, is_first_stage=False)
    hooks.close()
    assert posting == (p2p_communication._batched_p2p_ops, p2p_communication._p2p_ops)
    timeline = recorder.cut(1)
    assert timeline is not None
    if rank == 0:
        assert got.eq(1).all()
        (span,) = timeline.spans
        print(json.dumps({"lane": span.lane.value, "begin": span.begin_s, "taken": span.taken_s, "end": span.end_s}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], batched=sys.argv[3] == "batched", late_s=float(sys.argv[4]))
