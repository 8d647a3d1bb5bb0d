# SPDX-License-Identifier: Apache-2.0
"""How long after a fault does training take its first new step, and where does that time go?

Four ranks (PP 2 x EP 2, two emulated nodes) train in mode ``full``. Jobs alternate: in one ``torchrun`` starts all
processes again, in the other warm parents fork the ranks again (``--moetion-warm-restarts``). In each a rank is killed
twice, then two ranks of one node with the memory of that node, then a rank is stopped, which the others find out after
``--moetion-hang-timeout-s``. Seconds run from the signal until the trainer says that the first new iteration is done,
and are split into the phases of ``_restarts.py``.
Losses of all jobs are compared bit for bit.

``lost_machine.py`` has machines that are gone with their parents.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._common import Result, at_most, compile_package, median, parser, report  # noqa: E402
from benchmarks._restarts import ITERATION, PHASES, Log, Restart, losses_in, pids  # noqa: E402

MODEL = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64 --num-experts 8 "
    "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2 --use-distributed-optimizer --bf16 "
    "--micro-batch-size 2 --train-iters 100000 --lr 1e-3 --log-interval 1 --eval-iters 0"
)
CYCLES, QUICK_CYCLES = 6, 1
HANG_S = 4
STEPS_BETWEEN = 6
ARMS = {"torchrun": "", "warm": "--moetion-warm-restarts 8"}
KINDS = ("killed rank", "killed node", "hung rank")


@dataclass(frozen=True)
class Sample:
    """One fault, and seconds of what follows it."""

    arm: str
    kind: str
    phases: Mapping[str, float]
    recovery: Mapping[str, float]
    """Of ``survey`` and ``load``, as rank 0 reports them."""

    @property
    def seconds(self) -> float:
        """Until the first new step is done."""
        return sum(self.phases.values())


class Job:
    """A training under way, with a store of its own."""

    def __init__(self, arm: str, folder: Path, store: Path) -> None:
        self.arm, self.store, self.log = arm, store, Log()
        self.metrics, self.events = folder / "metrics.jsonl", folder / "events.jsonl"
        where = f"--moetion-store {store} --moetion-run-id restart --moetion-ranks-per-node 2"
        flags = f"{MODEL} --metrics-path {self.metrics} --moetion --moetion-mode full {where} {ARMS[arm]}"
        flags += f" --moetion-hang-timeout-s {HANG_S} --moetion-report {self.events}"
        launcher = "-m torch.distributed.run --standalone --nproc-per-node 4 --max-restarts 9"
        self.process = subprocess.Popen(
            [sys.executable, *launcher.split(), str(ROOT / "pretrain_gpt_moe.py"), *flags.split()],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self.log.read, args=(self.process.stdout,), daemon=True).start()

    def cause(self, kind: str, rank: int) -> Sample:
        """Do it, once training has gone on for some steps, and see it through."""
        self._train_on()
        hurt = [2, 3] if kind == "killed node" else [rank]
        pid_of = pids(self.store)
        restart = Restart(self.log, self.store, self.events, hurt)
        for each in hurt:
            os.kill(pid_of[each], signal.SIGSTOP if kind == "hung rank" else signal.SIGKILL)
        if kind == "killed node":
            shutil.rmtree(self.store / "restart" / "node1")
        phases = restart.await_phases(by_torchrun=self.arm == "torchrun")
        return Sample(self.arm, kind, phases, restart.recovered())

    def _train_on(self) -> None:
        moment = time.monotonic()
        for _ in range(STEPS_BETWEEN):
            moment, _ = self.log.await_line(ITERATION, moment)


@contextmanager
def job(arm: str) -> Iterator[Job]:
    memory = Path("/dev/shm")
    store = Path(tempfile.mkdtemp(prefix="moetion-restart-", dir=memory if memory.is_dir() else None))
    with tempfile.TemporaryDirectory() as folder:
        running = Job(arm, Path(folder), store)
        try:
            yield running
        finally:
            os.killpg(running.process.pid, signal.SIGTERM)
            try:
                running.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(running.process.pid, signal.SIGKILL)
            shutil.rmtree(store, ignore_errors=True)


def main() -> int:
    """Alternate the jobs, then report medians and ratios."""
    options = parser(__doc__ or "")
    options.add_argument("--cycles", type=int, default=CYCLES, help="jobs of each kind (%(default)s)")
    args = options.parse_args()
    compile_package()
    samples: list[Sample] = []
    losses: dict[int, set[str]] = defaultdict(set)
    cycles = QUICK_CYCLES if args.quick else args.cycles
    for cycle in range(cycles):
        for arm in ARMS:
            with job(arm) as running:
                for kind, rank in (("killed rank", 3), ("killed rank", 0), ("killed node", 2), ("hung rank", 1)):
                    samples.append(running.cause(kind, rank))
                for iteration, found in losses_in(running.metrics).items():
                    losses[iteration] |= found
            print(f"{cycle + 1} of {cycles}: {arm}", flush=True)
    report("restart", results(samples, losses), args.json)
    return 0


def results(samples: list[Sample], losses: Mapping[int, set[str]]) -> list[Result]:
    """Medians over all faults of a kind."""
    found: list[Result] = []
    medians: dict[tuple[str, str], float] = {}
    for kind in KINDS:
        for arm in ARMS:
            chosen = [s for s in samples if (s.arm, s.kind) == (arm, kind)]
            medians[arm, kind] = median([s.seconds for s in chosen])
            found.append(Result(name=f"{kind}, {arm}: first new step", value=medians[arm, kind], unit="s"))
            found.append(Result(name=f"{kind}, {arm}: worst", value=max(s.seconds for s in chosen), unit="s"))
            found += [
                Result(name=f"{kind}, {arm}: {phase}", value=median([s.phases[phase] for s in chosen]), unit="s")
                for phase in PHASES
            ]
    for arm in ARMS:
        reported = [s.recovery for s in samples if (s.arm, s.kind) == (arm, "killed rank")]
        found += [
            Result(name=f"killed rank, {arm}: recovery: {phase}", value=median([r[phase] for r in reported]), unit="s")
            for phase in reported[0]
        ]
    ratios = {kind: medians["warm", kind] / medians["torchrun", kind] for kind in KINDS}
    found.append(at_most("killed rank, warm / torchrun", ratios["killed rank"], "", 1 / 6))
    found += [Result(name=f"{kind}, warm / torchrun", value=ratios[kind], unit="") for kind in KINDS[1:]]
    differing = sum(len(bits) > 1 for bits in losses.values())
    found.append(at_most(f"iterations of {len(losses)} with losses that differ in any bit", differing, "", 0))
    return found


if __name__ == "__main__":
    sys.exit(main())
