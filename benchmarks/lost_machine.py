# SPDX-License-Identifier: Apache-2.0
"""How long after the loss of a machine does training take its first new step, with a spare and with a warm standby?

Four ranks (PP 2 x EP 2) on two machines, emulated by a torchrun agent and a store each, train in mode ``full``. Then
the second agent, its ranks and its store are gone at once. In one job an agent of a spare is started at that very
moment, as if somebody had known; in the other a standby has imported everything (``MOETION_STANDBY``). Jobs alternate.
Seconds run from the first signal until the first new iteration is done. torchrun's agents miss a heartbeat after six
seconds in place of fifteen. Losses of all jobs are compared bit for bit.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks._common import Result, at_most, compile_package, median, parser, report  # noqa: E402
from benchmarks._restarts import ITERATION, Log, Restart, losses_in  # noqa: E402
from benchmarks.restart import MODEL, STEPS_BETWEEN  # noqa: E402

CYCLES, QUICK_CYCLES = 2, 1
ARMS = {"spare": 0, "standby": 8}
WAITS = {"spare": {}, "standby": {"answer": " takes the place of "}}
"""What is waited for before new processes begin, and the line that ends it."""


class Job:
    """A training under way on two machines."""

    def __init__(self, arm: str, folder: Path, memory: Path) -> None:
        self.arm, self.memory, self.log = arm, memory, Log()
        self.metrics, self.events = folder / "metrics.jsonl", folder / "events.jsonl"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        self._note = folder / "note"
        self.processes = [self.agent(0), self.agent(1)]
        if ARMS[arm]:
            self.processes.append(self._start(2, [], {"MOETION_STANDBY": str(self._note)}))

    def agent(self, machine: int) -> subprocess.Popen[str]:
        address = f"127.0.0.{machine + 1}"  # the first in order has rank 0 and the store, which must not be lost
        rendezvous = f"--rdzv-backend=c10d --rdzv-id=restart --rdzv-endpoint={self._endpoint} --local-addr {address}"
        beats = f"--rdzv-conf is_host={int(machine == 0)},keep_alive_interval=2"
        launcher = f"-m torch.distributed.run --nnodes=2 --nproc-per-node=2 --max-restarts=9 {rendezvous} {beats}"
        return self._start(machine, launcher.split(), {})

    def lose(self) -> dict[str, float]:
        """The second machine, and see it through: seconds of each phase, in order."""
        self._train_on(0.0)
        if ARMS[self.arm]:
            self.log.await_line("stands by for a lost machine", 0.0)
            time.sleep(1)
            self._train_on(time.monotonic())
        lost = psutil.Process(self.processes[1].pid)
        going = [lost, *lost.children(recursive=True)]
        restart = Restart(self.log, self.memory, self.events, hurt=(2, 3))
        for process in going:
            process.kill()
        shutil.rmtree(self.memory / "1")
        if not ARMS[self.arm]:
            self.processes.append(self.agent(2))
        phases = restart.await_phases(by_torchrun=not ARMS[self.arm], waits=WAITS[self.arm])
        self._train_on(time.monotonic())
        return phases

    def _train_on(self, moment: float) -> None:
        for _ in range(STEPS_BETWEEN):
            moment, _ = self.log.await_line(ITERATION, moment)

    def _start(self, machine: int, launcher: list[str], more: Mapping[str, str]) -> subprocess.Popen[str]:
        flags = f"{MODEL} --metrics-path {self.metrics} --moetion --moetion-mode full --moetion-run-id restart "
        flags += f"--moetion-store {self.memory / str(machine)} --moetion-warm-restarts {ARMS[self.arm]} "
        flags += f"--moetion-report {self.events}"
        ours = {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "GLOO_SOCKET_IFNAME": "lo",
            "MOETION_RENDEZVOUS": self._endpoint, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, *launcher, str(ROOT / "pretrain_gpt_moe.py"), *flags.split()],
            env=os.environ | ours | more,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self.log.read, args=(process.stdout,), daemon=True).start()
        return process

    def end(self) -> None:
        alive = [psutil.Process(p.pid) for p in self.processes if p.poll() is None]
        for process in [*alive, *(child for p in alive for child in p.children(recursive=True))]:
            process.kill()
        for ended in self.processes:
            ended.wait()


@contextmanager
def job(arm: str) -> Iterator[Job]:
    shm = Path("/dev/shm")
    memory = Path(tempfile.mkdtemp(prefix="moetion-machines-", dir=shm if shm.is_dir() else None))
    with tempfile.TemporaryDirectory() as folder:
        running = Job(arm, Path(folder), memory)
        try:
            yield running
        finally:
            running.end()
            shutil.rmtree(memory, ignore_errors=True)


def main() -> int:
    """Alternate the jobs, then report medians and the ratio."""
    args = parser(__doc__ or "").parse_args()
    compile_package()
    samples: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    losses: dict[int, set[str]] = defaultdict(set)
    cycles = QUICK_CYCLES if args.quick else CYCLES
    for cycle in range(cycles):
        for arm in ARMS:
            with job(arm) as running:
                samples[arm].append(running.lose())
                for iteration, found in losses_in(running.metrics).items():
                    losses[iteration] |= found
            print(f"{cycle + 1} of {cycles}: {arm}, {sum(samples[arm][-1].values()):.1f} s", flush=True)
            print(*(line for _, line in running.log.lines if "recovered, epoch" in line), flush=True)
    report("lost_machine", results(samples, losses), args.json)
    return 0


def results(samples: Mapping[str, list[dict[str, float]]], losses: Mapping[int, set[str]]) -> list[Result]:
    """Medians over all jobs."""
    found: list[Result] = []
    medians = {arm: median([sum(phases.values()) for phases in samples[arm]]) for arm in ARMS}
    for arm in ARMS:
        found.append(Result(name=f"{arm}: first new step", value=medians[arm], unit="s"))
        found.append(Result(name=f"{arm}: worst", value=max(sum(p.values()) for p in samples[arm]), unit="s"))
        found += [
            Result(name=f"{arm}: {phase}", value=median([phases[phase] for phases in samples[arm]]), unit="s")
            for phase in samples[arm][0]
        ]
    found.append(at_most("standby / spare", medians["standby"] / medians["spare"], "", 1 / 3))
    differing = sum(len(bits) > 1 for bits in losses.values())
    found.append(at_most(f"iterations of {len(losses)} with losses that differ in any bit", differing, "", 0))
    return found


if __name__ == "__main__":
    sys.exit(main())
