# SPDX-License-Identifier: Apache-2.0
"""What does a checkpoint on disk cost training: written by training, or from memory by processes beside it?

Two ranks (EP 2, two emulated nodes) train the committed model with mode ``full``. One run alternates two kinds of
blocks. In the first, training saves by Megatron's own way: what is lost is the time of that call. In the second, a
checkpoint becomes due as the block begins and training goes on until it is on disk: what is lost is the time by which
these iterations took longer than as many undisturbed ones. Both write the same state to the same disk.

On a machine whose cores training fills, the processes beside it take their CPU seconds from training. On a GPU node
those cores are idle.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MODEL_FLAGS = (
    "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --num-experts 16 --moe-router-topk 1 "
    "--moe-router-pre-softmax --moe-ffn-hidden-size 1024 --expert-model-parallel-size 2 --micro-batch-size 1 "
    "--global-batch-size 4 --lr 1e-4 --bf16 --use-distributed-optimizer --train-iters 100000 --eval-iters 0 --seed 1"
)
CYCLES, QUICK_CYCLES = 8, 2
QUIET_ITERATIONS = 8
INTERVAL = 1_000_000
"""Of the saver, so that only this program says when a checkpoint is due."""


def main() -> int:
    """Start the ranks, read what they measured, report."""
    from benchmarks._common import parser

    options = parser(__doc__ or "")
    options.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    cycles = QUICK_CYCLES if args.quick else CYCLES
    if args.worker is not None:
        return measure(args.worker, cycles)
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        command += ["--worker", str(measured), *(["--quick"] if args.quick else [])]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, cwd=ROOT, env=environment)
        summarise(json.loads(measured.read_text()), args.json)
    return 0


def measure(path: Path, cycles: int) -> int:
    """One rank: rank 0 writes what it measured."""
    from benchmarks._common import start_trainer

    saved = path.parent / "saved"
    place, trainer = start_trainer(f"{MODEL_FLAGS} --save {saved}")

    from megatron_moetion.config import MoetionConfig
    from megatron_moetion.mcore.attach import attach

    store, report = Path("/dev/shm") / f"moetion-save-{os.environ['MASTER_PORT']}", path.parent / "report.jsonl"
    session = attach(
        model=trainer.model,
        optimizer=trainer.optimizer,
        opt_param_scheduler=trainer.scheduler,
        user_state=trainer.state,
        config=MoetionConfig(
            mode="full", run_id="save", store=str(store), ranks_per_node=1, schedule="eager", save=str(saved),
            save_interval=INTERVAL, report=str(report),
        ),
    )  # fmt: skip
    session.start()
    saver = session.session.running.releases

    def step() -> float:
        began = time.perf_counter()
        trainer.train_step()
        session.on_step_end(trainer.progress.iteration)
        return time.perf_counter() - began

    def iterations_until_saved() -> list[float]:
        """All ranks make the checkpoint due at the same iteration; each stops when all have heard of its end."""
        saver._due = trainer.progress.iteration + 1
        seconds = []
        while True:
            seconds.append(step())
            if len(seconds) > 4 and all_done(saver._writing is None):
                return seconds

    blocks = []
    try:
        for cycle in range(cycles + 1):
            quiet = [step() for _ in range(QUIET_ITERATIONS)]
            beside = iterations_until_saved()
            quiet += [step() for _ in range(QUIET_ITERATIONS)]
            began = time.perf_counter()
            trainer.save()
            stood_still = time.perf_counter() - began
            if cycle:  # the first warms caches, and the writers come up in it
                blocks.append({"quiet": quiet, "beside": beside, "stood_still": stood_still})
            for folder in saved.glob("iter_*") if place.rank == 0 else ():
                shutil.rmtree(folder)
        session.close()
        if place.rank == 0:
            events = [json.loads(line) for line in report.read_text().splitlines()]
            path.write_text(json.dumps({"blocks": blocks, "saved": [e for e in events if e["event"] == "saved"][1:]}))
    finally:
        if place.local_rank == 0:
            shutil.rmtree(store, ignore_errors=True)
    return 0


def all_done(here: bool) -> bool:
    """Whether it is so on every rank."""
    import torch

    flag = torch.tensor([int(here)])
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag.item())


def summarise(measured: dict[str, Any], json_path: Path | None) -> None:
    """Seconds that training lost, and their ratio within each cycle."""
    from benchmarks._common import Result, at_most, report

    lost, ratios = [], []
    for block in measured["blocks"]:
        undisturbed = statistics.median(block["quiet"])
        lost.append(sum(block["beside"]) - undisturbed * len(block["beside"]))
        ratios.append(lost[-1] / block["stood_still"])
    quiet = [seconds for block in measured["blocks"] for seconds in block["quiet"]]
    saved = measured["saved"]

    def middle(values: list[float]) -> float:
        return float(statistics.median(values))

    stood_still = middle([block["stood_still"] for block in measured["blocks"]])
    ratio = middle(ratios)
    results = [
        Result(name="iteration without a checkpoint", value=middle(quiet), unit="s"),
        Result(name="bytes written by a rank", value=middle([e["nbytes"] for e in saved]) / 1e6, unit="MB"),
        Result(name="training stands still for its own save", value=stood_still, unit="s"),
        Result(name="training loses to a save beside it", value=middle(lost), unit="s"),
        at_most("lost beside, ratio to standing still", ratio, "x", 0.5),
        Result(name="until the copy was made", value=middle([e["copy_s"] for e in saved]), unit="s"),
        Result(name="until the checkpoint was whole", value=middle([e["seconds"] for e in saved]), unit="s"),
        Result(name="cycles", value=float(len(ratios)), unit=""),
    ]
    report("save_beside", results, json_path, [f"model: {MODEL_FLAGS}"])


if __name__ == "__main__":
    sys.exit(main())
