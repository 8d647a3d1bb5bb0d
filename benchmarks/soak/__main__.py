# SPDX-License-Identifier: Apache-2.0
"""Real faults against real training: does every run end as the one without faults, bit for bit?

Four ranks (PP 2 x EP 2) on two hosts, under torch's elastic agents, train a small GPT with experts. Faults come from a
seed: processes are killed, stopped, aborted and raise at named points of an iteration or of a recovery; memory of a
host is filled, deleted, lost or gets flipped bits; hosts and agents are lost; links are cut, slow, lose or damage
packets. Every execution of every iteration must have the loss of the run without checkpoints, and every hashed state
the hash of the run without faults. A run's record is a file in the results folder; runs that have one are not done
again, so that a soak can be stopped at any time and goes on where it was.

Where hosts cannot be emulated (benchmarks/testbed), agents share this machine and links are left alone.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path

from benchmarks._common import hardware, parser, report, versions
from benchmarks.soak import tables
from benchmarks.soak.hosts import Hosts, hosts
from benchmarks.soak.judge import NOT_MET, OPEN, OVERTAKEN, RECOVERED, SURVIVED, differences, gaps, wrong_hashes
from benchmarks.soak.run import Run, Stuck, reference
from benchmarks.soak.story import DECK, Fault, story
from benchmarks.soak.trainers import TRAINERS, Trainer

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "benchmarks" / "results" / "soak"
MODES = {"full": "full", "exact": "exact --moetion-period 3"}
ITERATIONS = 240
OUTCOMES = (RECOVERED, SURVIVED, OVERTAKEN, NOT_MET, OPEN)
QUICK_ITERATIONS = 36
QUICK_DECK = ("LINK_DOWN", "STORE_FULL", "STORE_DELETED", "BIT_FLIP+SIGKILL", "SEGFAULT", "SIGSTOP_SIGCONT")


def main() -> int:
    """Do the runs that have no record yet, then report on all."""
    options = parser(__doc__ or "")
    options.add_argument("--trainers", nargs="+", choices=TRAINERS, default=["bundled"])
    options.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options.add_argument("--seeds", type=int, nargs=2, default=(0, 8), metavar=("FIRST", "END"))
    options.add_argument("--iterations", type=int, default=ITERATIONS, help=f"of a run; default {ITERATIONS}")
    options.add_argument(
        "--hours", type=float, default=24.0, help="then the run under way is cut short; it is done again the next time"
    )
    options.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help="where records are kept")
    options.add_argument("--logs", type=Path, metavar="DIR", help="keep what runs wrote; default: of stuck ones only")
    options.add_argument("--report-only", action="store_true", help="run nothing; report on the records that are there")
    options.add_argument("--plot", type=Path, metavar="PATH", help="draw seconds to recover by kind of fault")
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if args.quick:
            args.folder, args.iterations, args.seeds = Path(scratch) / "records", QUICK_ITERATIONS, (3, 4)
            args.modes = args.modes[:1]
        if not args.report_only:
            soak(args, args.logs or Path(scratch))
        records = tables.read(args.folder)
    print(tables.table(records))
    if args.plot is not None:
        tables.draw(records, args.plot)
    report("soak", tables.figures(records), args.json)
    return int(any(record["wrong"] or record["stuck"] for record in records))


def soak(args: argparse.Namespace, logs: Path) -> None:
    """All runs that are asked for and have no record: seed after seed, each in all modes."""
    args.folder.mkdir(parents=True, exist_ok=True)
    until_s = time.monotonic() + 3600 * args.hours
    with hosts(Path("/dev/shm") / f"soak-{logs.name}") as machines:
        if machines.why:
            print(f"left out: {', '.join(sorted(machines.left_out))}: {machines.why}", flush=True)
        for seed, name, mode in product(range(*args.seeds), args.trainers, args.modes):
            record = args.folder / f"{name}-{mode}-{seed}.json"
            if record.exists() and not json.loads(record.read_text())["cut_short"]:
                continue
            if time.monotonic() > until_s:
                return
            faults = story(seed, args.iterations, machines.left_out, QUICK_DECK if args.quick else DECK)
            found = one_run(machines, TRAINERS[name], mode, args.iterations, faults, logs / record.stem, until_s)
            about = {"trainer": name, "mode": mode, "seed": seed, "iterations": args.iterations}
            record.write_text(json.dumps(about | found, indent=1) + "\n")
            print(f"{record.stem}: {summary(found)}", flush=True)


def one_run(
    machines: Hosts,
    trainer: Trainer,
    mode: str,
    iterations: int,
    faults: list[Fault],
    folder: Path,
    until_s: float = math.inf,
) -> dict[str, object]:
    """Train with faults and compare; the record of it."""
    kept = folder.with_name(f"reference-{trainer.field}-{iterations}")
    plain = reference(machines, trainer, "", iterations, kept)
    hashed = reference(machines, trainer, MODES[mode], iterations, kept.with_name(f"{kept.name}-{mode}"))
    shutil.rmtree(folder, ignore_errors=True)
    began_s, stuck = time.time(), None
    run = Run(machines, trainer, MODES[mode], iterations, faults, folder)
    try:
        run.train(until_s)
    except Stuck as error:
        stuck = str(error)
    reached = max((step.iteration for step in run.steps), default=0)
    wrong = [
        *differences(run.steps, plain["losses"], iterations if run.ended else reached),
        *([] if hashed["losses"] == plain["losses"] else ["the run without faults, with checkpoints, differs"]),
        *wrong_hashes(run.hashes, hashed["hashes"]),
        *gaps(run.steps, run.starts),
    ]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
        "left_out": sorted(machines.left_out),
        "ended": run.ended,
        "cut_short": not run.ended and stuck is None,
        "stuck": stuck,
        "seconds": round(time.time() - began_s, 1),
        "steps": len(run.steps),
        "hashes": len(run.hashes),
        "starts": len(run.starts),
        "launches": run.launches,
        "repeated": run.again,
        "wrong": wrong,
        "faults": [rounded(asdict(run.outcomes[fault.number])) for fault in faults if fault.number in run.outcomes],
    }


def rounded(outcome: dict[str, object]) -> dict[str, object]:
    """Milliseconds are enough."""
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in outcome.items()}


def commit() -> str:
    """Of this tree; with a ``+`` where it has changes."""
    found = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def summary(found: dict[str, object]) -> str:
    """One line of a run."""
    faults = found["faults"]
    assert isinstance(faults, list)
    counts = {outcome: sum(f["outcome"] == outcome for f in faults) for outcome in OUTCOMES}
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    end = "STUCK" if found["stuck"] else "ended" if found["ended"] else "cut short"
    return f"{told}; {end} after {found['seconds']} s, {found['steps']} steps; differences: {found['wrong'] or 'none'}"


if __name__ == "__main__":
    sys.exit(main())
