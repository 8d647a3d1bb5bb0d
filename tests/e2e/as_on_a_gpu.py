# SPDX-License-Identifier: Apache-2.0
"""The entry point on a machine whose GPUs are stood in for: torch's "cuda" is the CPU, and NCCL is gloo."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import distributed as dist

from megatron_moetion.mcore import cpu_device

cpu_device.install()
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: int(os.environ["LOCAL_WORLD_SIZE"])
torch.cuda.get_device_name = lambda index: "a GPU"
torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid=f"GPU-{index}")
chosen: list[int] = []
torch.cuda.set_device = chosen.append
connect = dist.init_process_group


def init_process_group(backend: str, *, device_id: torch.device, **settings: Any) -> None:
    index = int(os.environ["LOCAL_RANK"])
    assert (backend, device_id, chosen) == ("nccl", torch.device("cuda", index), [index])
    connect("gloo", **settings)
    print(f"as on GPU {index}", flush=True)


dist.init_process_group = init_process_group

from megatron_moetion.pretrain.launch import main  # noqa: E402

main(sys.argv[1:])
