# SPDX-License-Identifier: Apache-2.0
"""All that a user of a GPU machine starts, with two ranks, on GPUs that are stood in for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_check.training import FAULT_AT, ITERATIONS, LAYOUTS, MODEL_FLAGS

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

ROOT = Path(__file__).parents[2]


def test_two_ranks_train_and_come_back(tmp_path: Path) -> None:
    """From ``--device gpu`` on: devices are compared, NCCL is asked for, each rank takes its GPU; one is killed."""
    (layout,) = (layout for layout in LAYOUTS if layout.name == "ep2")
    metrics, events = tmp_path / "metrics.jsonl", tmp_path / "events.jsonl"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node",
        "2", "--max-restarts", "1", str(Path(__file__).with_name("as_on_a_gpu.py")), *MODEL_FLAGS, *layout.flags,
        "--device", "gpu", "--metrics-path", str(metrics), "--moetion", "--moetion-mode", "full",
        "--moetion-ranks-per-node", "1", "--moetion-store", str(tmp_path), "--moetion-run-id", "gpus",
        "--moetion-report", str(events), "--moetion-inject-fault", f"0:1:{FAULT_AT}:mid-pack",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=220)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as on GPU 0") == done.stdout.count("as on GPU 1") == 2
    assert done.stdout.count("> GPU path on ") == 2
    assert "CPU path" not in done.stdout
    iterations = [json.loads(line)["iteration"] for line in metrics.read_text().splitlines()]
    assert max(iterations) == ITERATIONS
    names = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert "recovered" in names
