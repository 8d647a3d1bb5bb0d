# SPDX-License-Identifier: Apache-2.0
"""Does training end as well with faults as without, when snapshots hold only some experts?

MoE-GPTs are trained on Python's standard library with faults, from the same initialisation and data as a run without
any: see ``study.py`` for models, arms and the margin. Each run's result is a file in the results folder; runs that
have one are not done again, so the study can be stopped at any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.accuracy_under_faults.study import Model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "benchmarks" / "results" / "accuracy_under_faults"
QUICK_ITERATIONS = 100
SELECTION_ITERATIONS = 150
POLL_S = 0.5
QUICK_ARMS = ("fault-free", "default", "full")


def main() -> int:
    """Run what is missing, then report on what there is."""
    from benchmarks._common import parser
    from benchmarks.accuracy_under_faults.study import jobs

    options = parser(__doc__ or "")
    options.add_argument("--models", nargs="+", default=[], metavar="NAME", help="only these, e.g. E64 E8")
    options.add_argument("--arms", nargs="+", default=[], metavar="NAME", help="only these")
    options.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help="where results are kept")
    options.add_argument("--workers", type=int, default=2, help="runs at once, one core each")
    options.add_argument("--report-only", action="store_true", help="run nothing; report on the results that are there")
    options.add_argument("--plot", type=Path, metavar="PATH", help="draw the differences")
    options.add_argument(
        "--sigkill", metavar="NAME", help="confirm one model's default arm with real processes, killed and restarted"
    )
    options.add_argument("--selection", action="store_true", help="what each policy loses, on the loads of short runs")
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker is not None:
        return work(args)
    if args.selection:
        return select(args)
    if args.sigkill is not None:
        from benchmarks.accuracy_under_faults.confirm import confirm

        return confirm(args.sigkill, args.folder)
    if args.quick:
        with tempfile.TemporaryDirectory() as scratch:
            args.folder, args.arms = Path(scratch), list(QUICK_ARMS)
            launch(args, jobs(["E8"])[:1])
            return tell(args)
    args.folder.mkdir(parents=True, exist_ok=True)
    if not args.report_only:
        launch(args, jobs(args.models))
    return tell(args)


def work(args: argparse.Namespace) -> int:
    """The arms of one model and seed."""
    from megatron_moetion.mcore import cpu_device

    cpu_device.install()

    from benchmarks.accuracy_under_faults import worker
    from benchmarks.accuracy_under_faults.study import MODELS, TRAIN_ITERATIONS

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the arena is removed
    name, seed = args.worker
    iterations = QUICK_ITERATIONS if args.quick else TRAIN_ITERATIONS
    worker.main(MODELS[name], int(seed), args.folder, args.arms, iterations)
    return 0


def select(args: argparse.Namespace) -> int:
    """A table of what policies lose, on the loads of a short run of each model."""
    from megatron_moetion.mcore import cpu_device

    cpu_device.install()

    from benchmarks.accuracy_under_faults import selection, worker
    from benchmarks.accuracy_under_faults.study import MODELS, SEEDS

    names = args.models or ["E64"]
    rows = ["| model | K a layer, cap | unsaved-tokens | popularity-ema | sequential | sequential / ours | bound |"]
    rows.append("| --- | --- | --- | --- | --- | --- | --- |")
    worker.start(MODELS[names[0]], SEEDS[0])
    for name in names:
        model = MODELS[name]
        loads = worker.loads_of(model, SELECTION_ITERATIONS)
        sizes = [(k, 2 * model.experts // k) for k in sorted({max(1, model.experts // 32), max(1, model.experts // 8)})]
        rows += selection.table(name, loads, model.capacity_factor, sizes)
    print("\n".join(rows))
    return 0


def launch(args: argparse.Namespace, todo: Sequence[tuple[Model, int]]) -> None:
    """One process a model and seed, ``args.workers`` at once; the first that fails ends all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs end too
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running: list[subprocess.Popen[bytes]] = []
    try:
        for number, (model, seed) in enumerate(todo, start=1):
            print(f"job {number} of {len(todo)}: {model.name}, seed {seed}", flush=True)
            command = [sys.executable, str(Path(__file__).parent), "--folder", str(args.folder)]
            command += ["--worker", model.name, str(seed)]
            command += ["--arms", *args.arms] if args.arms else []
            command += ["--quick"] if args.quick else []
            running.append(subprocess.Popen(command, env=environment))
            _wait(running, args.workers - 1)
        _wait(running, 0)
    finally:
        for process in running:
            process.terminate()
            process.wait()


def _wait(running: list[subprocess.Popen[bytes]], most: int) -> None:
    """Until at most so many are left; they end in any order."""
    while len(running) > most:
        time.sleep(POLL_S)
        for process in [p for p in running if p.poll() is not None]:
            running.remove(process)
            if process.returncode:
                raise SystemExit(
                    f"a run failed with exit code {process.returncode}; what is done is kept, start again to go on"
                )


def tell(args: argparse.Namespace) -> int:
    """Table, JSON and plot of all results there are."""
    from benchmarks._common import report
    from benchmarks.accuracy_under_faults.tables import draw, figures, read, table

    runs = read(args.folder)
    if not runs:
        print("no results yet", file=sys.stderr)
        return 1
    print(table(runs))
    report("accuracy_under_faults", figures(runs), args.json)
    if args.plot is not None:
        draw(runs, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
