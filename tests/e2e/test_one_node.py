# SPDX-License-Identifier: Apache-2.0
"""``torchrun`` on one machine with ``--moetion`` and nothing else, as README.md has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
MODEL = (
    "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --seq-length 16 --num-experts 4 --moe-ffn-hidden-size 16 "
    "--expert-model-parallel-size 2 --micro-batch-size 1 --train-iters 14 --lr 1e-3 --mock-data --eval-iters 0 "
    "--log-interval 1 --use-distributed-optimizer --distributed-timeout-minutes 2"
)


@pytest.fixture
def store() -> Iterator[Path]:
    folder = Path("/dev/shm") / f"moetion-one-node-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_the_flag_alone_survives_a_killed_process_and_leaves_nothing_behind(store: Path) -> None:
    launcher = "-W ignore -m torch.distributed.run --nproc-per-node 2 --max-restarts 10 --standalone"
    flags = f"{MODEL} --moetion --moetion-inject-fault 0:1:10:mid-pack --moetion-store {store}"
    done = subprocess.run(
        [sys.executable, *launcher.split(), str(ROOT / "pretrain_gpt_moe.py"), *flags.split()],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout
    assert "1 node(s), 0 replica(s)" in done.stdout
    assert "this run has one node: snapshots survive killed processes, and nothing survives" in done.stdout
    assert "recovered, epoch 1" in done.stdout
    assert "torchrun has made up the run id" in done.stdout
    assert list(store.iterdir()) == []
    stages = ("> connecting 2 ", "> 2 rank(s) are connected", "> data: ", "parameters on rank 0", "> training from ")
    again = done.stdout[done.stdout.index("recovered, epoch 1") :]
    before = done.stdout[: -len(again)]
    found = [before.rindex(stage) for stage in stages[:-1]] + [len(before) + again.index(stages[-1])]
    assert found == sorted(found), "each stage of a start is said as it ends"
