# SPDX-License-Identifier: Apache-2.0
"""The same faults as real ones: a process is killed with SIGKILL, torchrun starts it again, and it recovers.

Its training losses have to be those of the study's in-process faults, bit for bit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.accuracy_under_faults.study import FIXED_FAULTS, MODELS, SEEDS, TRAIN_ITERATIONS

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 900


def confirm(name: str, folder: Path) -> int:
    """Run one model's ``default`` arm with real kills; 0 if nothing differs."""
    seed = SEEDS[0]
    expected = json.loads((folder / f"{name}-{seed}-default.json").read_text())
    faults = ",".join(f"{attempt}:0:{at + 1}:before-select" for attempt, at in enumerate(FIXED_FAULTS))
    with tempfile.TemporaryDirectory() as scratch:
        metrics = Path(scratch) / "metrics.jsonl"
        store = Path("/dev/shm") / f"moetion-confirm-{os.getpid()}"
        flags = f"{MODELS[name].flags} --seed {seed} --moetion --moetion-mode popularity --moetion-replicas 0 "
        flags += (
            f"--moetion-run-id run --moetion-store {store} --moetion-inject-fault {faults} --metrics-path {metrics}"
        )
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
        command += ["--max-restarts", str(len(FIXED_FAULTS)), str(ROOT / "pretrain_gpt_moe.py"), *flags.split()]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        try:
            subprocess.run(command, env=environment, check=True, timeout=LIMIT_S)
        finally:
            shutil.rmtree(store, ignore_errors=True)
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = {m["iteration"]: m["loss_hex"] for m in lines if "loss_hex" in m}  # what was done again counts
    wanted = {i: float(loss).hex() for i, loss in enumerate(expected["training_losses"], start=1)}
    different = [i for i in wanted if found.get(i) != wanted[i]]
    attempts = 1 + max(m["attempt"] for m in lines)
    print(
        f"{name}, seed {seed}: {attempts - 1} processes killed; {len(different)} of {TRAIN_ITERATIONS} training losses "
        f"differ from those with in-process faults"
    )
    return 1 if different else 0
