# SPDX-License-Identifier: Apache-2.0
"""One of two pipeline stages, of which each lets the other wait. Both print what they recorded of a call that sends.

The second stage asks for its first input late; the first stage sends the second input late.
"""

from __future__ import annotations

import json
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import torch
from torch import distributed as dist

from megatron_moetion.mcore import cpu_device

cpu_device.install()

# isort: split
from megatron_moetion.clock import SystemClock
from megatron_moetion.mcore.traffic import TimedCommunicator
from megatron_moetion.schedule.recorder import HostStopwatch, Recorder

SHAPE = (64, 1, 256)


def main(rank: int, rendezvous: str, batched: bool, late_s: float) -> None:
    dist.init_process_group("gloo", f"file://{rendezvous}", timedelta(seconds=60), world_size=2, rank=rank)
    config = SimpleNamespace(
        pipeline_dtype=torch.float32, variable_seq_lengths=False, mtp_standalone=False, use_ring_exchange_p2p=False,
        batch_p2p_comm=batched, batch_p2p_sync=False, timers=None, virtual_pipeline_model_parallel_size=None,
    )  # fmt: skip
    clock = SystemClock()
    recorder = Recorder(HostStopwatch(clock), clock)
    stage = TimedCommunicator(dist.group.WORLD, config, on_device=False)
    stage.watch(recorder, crosses=True)
    tensor = torch.full(SHAPE, float(rank))
    dist.barrier()
    if rank == 0:
        assert stage.send_forward_recv_backward(tensor, SHAPE, is_last_stage=False).eq(1).all()
        time.sleep(late_s)
        stage.send_forward(2 + tensor, is_last_stage=False)
    else:
        time.sleep(late_s)
        assert stage.recv_forward(SHAPE, is_first_stage=False).eq(0).all()
        assert stage.send_backward_recv_forward(tensor, SHAPE, is_first_stage=False).eq(2).all()
    timeline = recorder.cut(1)
    assert timeline is not None
    span = next(s for s in timeline.spans if s.sent_bytes)
    print(json.dumps({"lane": span.lane.value, "begin": span.begin_s, "accepted": span.accepted_s, "end": span.end_s}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], batched=sys.argv[3] == "batched", late_s=float(sys.argv[4]))
