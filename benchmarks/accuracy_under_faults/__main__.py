# SPDX-License-Identifier: Apache-2.0
"""Does training end as well with faults as without, when snapshots hold only some experts?

MoE-GPTs are trained on Python's standard library with faults, from the same initialisation and data as a run without
any: see ``study.py`` for models, arms and the margin. Each run's result is a file in the results folder; runs that
have one are not done again, so the study can be stopped at any time and goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.accuracy_under_faults.study import Model

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

FOLDER = ROOT / "benchmarks" / "results" / "accuracy_under_faults"
QUICK_ITERATIONS = 100
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
    options.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker is not None:
        return work(args)
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

    name, seed = args.worker
    iterations = QUICK_ITERATIONS if args.quick else TRAIN_ITERATIONS
    worker.main(MODELS[name], int(seed), args.folder, args.arms, iterations)
    return 0


def launch(args: argparse.Namespace, todo: Sequence[tuple[Model, int]]) -> None:
    """One process a model and seed, ``args.workers`` at once; the first that fails ends all."""
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
            while len(running) >= args.workers:
                _end(running.pop(0))
        while running:
            _end(running.pop(0))
    finally:
        for process in running:
            process.terminate()
            process.wait()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
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
