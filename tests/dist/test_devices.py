# SPDX-License-Identifier: Apache-2.0
"""Two machines of which one computes on a GPU, which is stood in for, and the other on the CPU: refused at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32 --micro-batch-size 1 --train-iters 1 "
    "--lr 1e-3 --mock-data --eval-iters 0"
)
MACHINE = """
import os, sys
from types import SimpleNamespace
from megatron_moetion.pretrain import launch

if os.environ["RANK"] == "1":
    import torch
    launch.visible_gpus = lambda environ: 1
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_name = lambda index: "a GPU"
    torch.cuda.get_device_properties = lambda index: SimpleNamespace(uuid="GPU-1")
    torch.cuda.set_device = lambda index: None
launch.main(sys.argv[1:])
"""


def test_a_gpu_here_and_a_cpu_there_is_refused_before_they_wait_for_each_other() -> None:
    """No launcher: rank 0 has the store. Each machine says it, for each has an operator who looks at its log."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
        "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MACHINE, *FLAGS.split()],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], said
    host = socket.gethostname()
    for rank, (_, errors) in enumerate(said):
        start = f"error: rank {rank} on {host}: some ranks would train on GPUs and some on the CPU. "
        assert f"{start}GPU: rank 1 on {host}. CPU: rank 0 on {host}." in errors
