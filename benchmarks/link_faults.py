# SPDX-License-Identifier: Apache-2.0
"""What does a fault of one link or one process cost, and how soon after it is the job protected again?

Four ranks on a node each: processes of the toy trainer of ``tests/dist``, in which everything of this project is real
(session, arenas, sockets) and a step is a little arithmetic and a collective of all ranks. Where the testbed's emulated
hosts can be made, each rank is on one of its own, with its own network and memory; else all are on the loopback, and a
link that goes down is left out. Two ranks lie in the middle of what a fault does: the one that is hit and, since it
holds another's replicas and has its own held, its neighbours.

Faults: connections of replication that are lost, once, ten times, or one message in a hundred; replication that is cut
off at one rank, shorter and longer than ``--moetion-holder-patience``; a host's link that goes down, training's own
traffic included; a process that is stopped (SIGSTOP) and goes on. Counted are iterations: how many in a row T stood
still, and how many were trained from the fault's end until T was a new one. T in steady state moves with every
iteration. Nobody restarts anything: a rank that ends is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks._common import Result, at_most, parser, report
from benchmarks.testbed import Testbed, why_unavailable

ROOT = Path(__file__).resolve().parent.parent
RANKS = 4
VICTIM = 2
STEP_S = 0.1
"""An iteration takes about so long."""
BEFORE, AFTER = 20, 60
"""Iterations before the fault, and after it."""
ADVANCE_MAX = 12
"""Iterations from a fault's end until T is a new one. A link that was away tries again every 5 s at the latest."""
TRY_AGAIN_S = 5.0 + 5.0
"""Longest pause between two attempts, and what one may take."""
LIMIT_S = 300.0
MODES = ("full", "popularity", "exact")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of rank ``VICTIM``. ``kind``: ``toy`` (the trainer does it), ``stop`` or ``link``."""

    name: str
    kind: str = "toy"
    seconds: float = 0.0
    toy: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def iterations(self) -> int:
        """That it may take, at most."""
        return round(self.seconds / STEP_S)

    @property
    def ends_at(self) -> int | None:
        """The iteration at which the trainer ends it; None: it is ended from outside, or is no state."""
        return self.toy.get("cut_off_until")


def cut_off(seconds: float) -> Fault:
    """Replication of one rank is cut off for so long."""
    until = BEFORE + round(seconds / STEP_S)
    return Fault(
        name=f"replication cut off for {seconds:g} s",
        seconds=seconds,
        toy={"cut_off_from": BEFORE, "cut_off_until": until},
    )


def stopped(seconds: float) -> Fault:
    """One process stands still for so long, and with it training."""
    return Fault(name=f"process stopped for {seconds:g} s", kind="stop", seconds=seconds)


def link_down(seconds: float) -> Fault:
    """A host's link is down for so long, and with it training."""
    return Fault(name=f"link down for {seconds:g} s", kind="link", seconds=seconds)


RESETS = [Fault(name=f"{n} connection(s) lost", toy={"resets": (BEFORE,) * n}) for n in (1, 10)]
LOSSY = Fault(name="1% of messages lost", toy={"lost_share": 0.01}, seconds=20)
FAULTS = (
    *RESETS, LOSSY, cut_off(2), cut_off(30), link_down(10), link_down(30), stopped(5), stopped(30), stopped(90),
)  # fmt: skip
QUICK_FAULTS = (RESETS[1], cut_off(2), link_down(3), stopped(3))


def main() -> int:
    """Run each fault in each mode and report."""
    options = parser(__doc__ or "")
    options.add_argument("--modes", nargs="+", choices=MODES, help="default: all; with --quick 'full'")
    options.add_argument("--worker", type=int, metavar="RANK", help=argparse.SUPPRESS)
    options.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.worker is not None:
        return work(args.worker, args.folder)
    missing = why_unavailable()
    notes = [f"all ranks on the loopback, no link goes down: {missing}"] if missing else []
    results: list[Result] = []
    for mode in args.modes or (MODES[:1] if args.quick else MODES):
        for fault in QUICK_FAULTS if args.quick else FAULTS:
            if missing and fault.kind == "link":
                continue
            print(f"{mode}, {fault.name} ...", flush=True)
            results += measure(mode, fault, on_testbed=not missing)
    report("link_faults", results, args.json, notes)
    return 0


def measure(mode: str, fault: Fault, *, on_testbed: bool) -> list[Result]:
    """Run one job with one fault; its figures."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as hosts:
        folder = Path(scratch)
        testbed = hosts.enter_context(Testbed(RANKS)) if on_testbed else None
        iterations = BEFORE + fault.iterations + AFTER
        (folder / "toy.json").write_text(json.dumps(toy_of(mode, fault, iterations)))
        try:
            with running(folder, mode, testbed) as ranks:
                ended_s = disturb(fault, folder, ranks, testbed)
                codes = [rank.wait(LIMIT_S + iterations) for rank in ranks]
        finally:
            if testbed is None:
                shutil.rmtree(store_of(folder), ignore_errors=True)
        if any(codes):
            logs = "\n".join(p.read_text()[-2000:] for p in sorted(folder.glob("*.log")))
            raise RuntimeError(f"{mode}, {fault.name}: ranks ended with {codes}\n{logs}")
        return figures(mode, fault, saved_in(folder), ended_s)


def toy_of(mode: str, fault: Fault, iterations: int) -> dict[str, Any]:
    """The toy trainer's settings."""
    return {
        "world_size": RANKS,
        "iterations": iterations,
        "exact": mode == "exact",
        "step_s": STEP_S,
        "odd_ranks": (VICTIM,),
        "collective_s": 600,
        **fault.toy,
    }


@contextmanager
def running(folder: Path, mode: str, testbed: Testbed | None) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of all ranks; none is left at the end."""
    ranks = []
    try:
        for rank in range(RANKS):
            argv = [sys.executable, __file__, "--worker", str(rank), "--folder", str(folder), "--modes", mode]
            environment = {
                "GLOO_SOCKET_IFNAME": "lo" if testbed is None else "eth0",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in ("", "tests/dist", "tests/unit")),
            }
            log = folder / f"rank{rank}.log"
            if testbed is not None:
                ranks.append(testbed.popen(rank, argv, log, environment))
                continue
            with log.open("ab") as out:
                ranks.append(subprocess.Popen(argv, stdout=out, stderr=out, env=os.environ | environment))
        yield ranks
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()


def work(rank: int, folder: Path) -> int:
    """One rank, in a process of its own."""
    from toy_trainer import Toy, main

    (folder / f"rank{rank}.pid").write_text(str(os.getpid()))
    mode = sys.argv[sys.argv.index("--modes") + 1]
    settings = {
        "store": str(store_of(folder) / str(rank)),
        "run_id": "faults",
        "ranks_per_node": 1,
        "pack_threads": 1,
        "chunk_bytes": 4096,
        "mode": mode,
        **({"period": 4} if mode == "exact" else {}),
    }
    environment = {
        **os.environ,
        "RANK": str(rank),
        "ATTEMPT": "0",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    toy = Toy.from_json(json.loads((folder / "toy.json").read_text()))
    return int(main(folder, settings, toy, environment))


def store_of(folder: Path) -> Path:
    """Where the arenas of this job are: in memory."""
    return Path("/dev/shm") / f"moetion-link-faults-{folder.name}"


def disturb(fault: Fault, folder: Path, ranks: Sequence[subprocess.Popen[bytes]], testbed: Testbed | None) -> float:
    """Bring a fault about that comes from outside; when it ended (Unix time), 0 for the others."""
    if fault.kind == "toy":
        return 0.0
    until = time.monotonic() + LIMIT_S
    while len(saved_in(folder)) < BEFORE:
        if time.monotonic() > until or any(rank.poll() is not None for rank in ranks):
            raise RuntimeError(f"ranks did not come to iteration {BEFORE}")
        time.sleep(0.05)
    begin, end = switches(fault, int((folder / f"rank{VICTIM}.pid").read_text()), testbed)
    begin()
    try:
        time.sleep(fault.seconds)
    finally:
        end()
    return time.time()


def switches(fault: Fault, pid: int, testbed: Testbed | None) -> tuple[Callable[[], None], Callable[[], None]]:
    """What begins a fault, and what ends it."""
    if fault.kind == "stop":
        return lambda: os.kill(pid, signal.SIGSTOP), lambda: os.kill(pid, signal.SIGCONT)
    assert testbed is not None
    return lambda: testbed.set_link(VICTIM, up=False), lambda: testbed.set_link(VICTIM, up=True)


def saved_in(folder: Path) -> list[dict[str, Any]]:
    """Of rank 0's iterations: number, what was stable, and when."""
    path = folder / "rank00000.0.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [note for note in found if note["event"] == "saved"]


def figures(mode: str, fault: Fault, saved: Sequence[Mapping[str, Any]], ended_s: float) -> list[Result]:
    """How long T stood still, and how soon it moved again."""
    name = f"{mode}, {fault.name}"
    still = longest_pause([note["stable"] for note in saved])
    results = [Result(name=f"{name}: T stood still", value=still, unit="iterations")]
    if ended_s or fault.ends_at is not None:
        is_over = [n["time"] >= ended_s if ended_s else n["iteration"] >= (fault.ends_at or 0) for n in saved]
        found = until_new([note["stable"] for note in saved], is_over.index(True))
        # A rank tries again in seconds, however short iterations are.
        allowed = ADVANCE_MAX + round(TRY_AGAIN_S / STEP_S)
        results.append(at_most(f"{name}: from its end until T was new", found, "iterations", allowed))
    lag = saved[-1]["iteration"] - saved[-1]["stable"]
    results.append(at_most(f"{name}: T behind at the end", lag, "iterations", ADVANCE_MAX))
    results.append(at_most(f"{name}: restarts", 0, "", 0))
    return results


def longest_pause(stables: Sequence[int]) -> int:
    """Most iterations in a row in which T did not move."""
    longest = still = 0
    for before, after in pairwise(stables):
        still = 0 if after > before else still + 1
        longest = max(longest, still)
    return longest


def until_new(stables: Sequence[int], first: int) -> int:
    """Iterations from number ``first`` of the list on until T is another than before it."""
    before = stables[max(0, first - 1)]
    return next((k for k, stable in enumerate(stables[first:]) if stable > before), len(stables) - first)


if __name__ == "__main__":
    sys.exit(main())
