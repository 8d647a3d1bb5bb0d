# SPDX-License-Identifier: Apache-2.0
"""How much slower is training with a snapshot every iteration?

Four ranks (PP 2 x EP 2, two emulated nodes) train the committed model below; blocks of iterations without
snapshots, with mode ``popularity`` and with mode ``full`` alternate within one run, in an order that changes
from cycle to cycle. The first iteration of each block is left out: it still carries the last snapshot of the
block before, and none of its own. A cycle gives one ratio per mode (median iteration of its block over median
iteration of the block without snapshots); reported are the median ratio over all cycles and its 95% interval.

On a machine whose cores training already fills, every CPU second of copying and sending is paid for by
training; the CPU seconds that snapshots add are therefore reported beside the ratios. On a GPU node those cores
are idle.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RANKS = 4
WORLD = f"--nproc-per-node {RANKS}".split()
MODEL_FLAGS = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 1024 --num-attention-heads 4 --seq-length 128 "
    "--max-position-embeddings 128 --num-experts 16 --moe-router-topk 1 --moe-router-pre-softmax "
    "--moe-ffn-hidden-size 1024 "
    "--moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --pipeline-model-parallel-size 2 "
    "--expert-model-parallel-size 2 --micro-batch-size 1 --global-batch-size 4 --lr 1e-4 --bf16 "
    "--use-distributed-optimizer --train-iters 100000 --eval-iters 0 --seed 1"
)
STALENESS_CAP = 16
ARMS = ("off", "popularity", "full")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How long a run is."""

    cycles: int
    block_iterations: int
    """Counted iterations a block; one more is run and left out."""


FULL_SIZE = Size(cycles=16, block_iterations=6)
QUICK_SIZE = Size(cycles=4, block_iterations=3)


def main() -> int:
    """Start the ranks, read what they measured, report."""
    from benchmarks._common import parser

    options = parser(__doc__ or "")
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    size = QUICK_SIZE if args.quick else FULL_SIZE
    if args.worker is not None:
        return measure(args.worker, size)
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *WORLD, __file__]
        command += ["--worker", str(measured), *(["--quick"] if args.quick else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        summarise(json.loads(measured.read_text()), size, args.json)
    return 0


def measure(path: Path, size: Size) -> int:
    """One rank: train block after block; rank 0 writes what all measured."""
    from benchmarks._common import start_trainer

    place, trainer = start_trainer(MODEL_FLAGS)

    from torch import distributed as dist

    from megatron_moetion.config import MoetionConfig
    from megatron_moetion.mcore.attach import attach

    store = Path("/dev/shm") / f"moetion-overhead-{os.environ['MASTER_PORT']}"
    sessions: dict[str, Any] = {}
    for mode in ARMS[1:]:
        sessions[mode] = attach(
            model=trainer.model,
            optimizer=trainer.optimizer,
            opt_param_scheduler=trainer.scheduler,
            user_state=trainer.progress,
            config=MoetionConfig(
                mode=mode,
                run_id=f"overhead-{mode}",
                store=str(store),
                ranks_per_node=2,
                staleness_cap=STALENESS_CAP,
                lost_token_budget=0.0,  # K is what is measured
            ),
        )
        sessions[mode].start()
    blocks: list[dict[str, Any]] = []
    order = random.Random(0)
    try:
        for cycle in range(size.cycles + 1):
            for arm in order.sample(ARMS, len(ARMS)):
                block = run_block(trainer, sessions.get(arm), size.block_iterations)
                if cycle:  # the first cycle warms caches and allocators
                    blocks.append({"cycle": cycle, "arm": arm, **block})
            if place.rank == 0:
                print(f"cycle {cycle} of {size.cycles}", flush=True)
        facts = {mode: session.scalars() for mode, session in sessions.items()}
        state = sessions["full"].scalars()["moetion/snapshot-bytes"]
        gathered: list[Any] = [None] * place.world_size
        dist.all_gather_object(gathered, {"blocks": blocks, "facts": facts, "state_bytes": state})
        if place.rank == 0:
            path.write_text(json.dumps(gathered))
        for session in sessions.values():
            session.close()
    finally:
        dist.barrier()
        if place.local_rank == 0:
            shutil.rmtree(store, ignore_errors=True)
    return 0


def run_block(trainer: Any, session: Any, iterations: int) -> dict[str, Any]:
    """Seconds of each counted iteration, and this process's CPU seconds an iteration."""
    seconds = []
    cpu = 0.0
    for number in range(iterations + 1):
        if number == 1:
            cpu = time.process_time()
        started = time.perf_counter()
        trainer.train_step()
        if session is not None:
            session.on_step_end(trainer.progress.iteration)
        if number:
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "cpu_seconds": (time.process_time() - cpu) / iterations}


def summarise(ranks: list[dict[str, Any]], size: Size, json_path: Path | None) -> None:
    """Ratios with their intervals, CPU seconds and bytes."""
    from benchmarks._common import Result, median_interval, report

    times = {(b["cycle"], b["arm"]): statistics.median(b["seconds"]) for b in ranks[0]["blocks"]}
    cycles = sorted({cycle for cycle, _ in times})
    baseline = statistics.median(times[c, "off"] for c in cycles)
    state = sum(r["state_bytes"] for r in ranks) / len(ranks)
    results = [
        Result(name="iteration without snapshots", value=baseline, unit="s"),
        Result(name="state per rank", value=state / 1e6, unit="MB"),
        Result(
            name="state per rank and second of iteration",
            value=state / 1e6 / baseline,
            unit="MB/s",
            target=">= 100",
            met=state / 1e6 / baseline >= 100,
        ),
        Result(name="alternating blocks", value=float(len(times)), unit="", target=">= 30", met=len(times) >= 30),
    ]
    for mode in ARMS[1:]:
        ratios = np.array([times[c, mode] / times[c, "off"] for c in cycles])
        low, high = median_interval(ratios)
        slower = f"{mode}: iteration time, ratio to none"
        results.append(Result(name=slower, value=float(np.median(ratios)), unit="x"))
        results.append(Result(name=f"{slower}, lower end of 95%", value=low, unit="x"))
        target = 1.03 if mode == "popularity" else None
        results.append(
            Result(
                name=f"{slower}, upper end of 95%",
                value=high,
                unit="x",
                target=f"<= {target}" if target else None,
                met=high <= target if target else None,
            )
        )
        added = cpu_seconds(ranks, mode) - cpu_seconds(ranks, "off")
        snapshot = sum(r["facts"][mode]["moetion/snapshot-bytes"] for r in ranks)
        dropped = sum(r["facts"][mode]["moetion/snapshots-dropped"] for r in ranks)
        results += [
            Result(name=f"{mode}: CPU seconds added, all ranks", value=added, unit="s/iteration"),
            Result(name=f"{mode}: bytes captured, all ranks", value=snapshot / 1e6, unit="MB/iteration"),
            Result(name=f"{mode}: snapshots dropped", value=dropped, unit=""),
        ]
    report("overhead", results, json_path, [f"model: {MODEL_FLAGS}", f"blocks of {size.block_iterations} iterations"])


def cpu_seconds(ranks: list[dict[str, Any]], arm: str) -> float:
    """CPU seconds an iteration in one arm, summed over ranks, all threads."""
    return sum(statistics.median(b["cpu_seconds"] for b in r["blocks"] if b["arm"] == arm) for r in ranks)


if __name__ == "__main__":
    sys.exit(main())
