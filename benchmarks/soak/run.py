# SPDX-License-Identifier: Apache-2.0
"""One run of a trainer under two agents: it is watched, faults are brought about, and agents that end begin again."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.soak.hosts import DAMAGED_SHARE, LOST_SHARE, Hosts, ports_of
from benchmarks.soak.judge import NOT_MET, OPEN, Outcome, Start, outcome_of
from benchmarks.soak.story import HANG_TIMEOUT_S, Fault, causes_restart
from benchmarks.soak.trainers import HASH_EVERY, HOSTS, RANKS_PER_HOST, Lines, Step, Trainer, read_steps

ROOT = Path(__file__).resolve().parents[2]
PORT = 29400
POLL_S = 0.02
STUCK_S = 300.0
"""Without a step, a start or a fault: the run is stuck."""
MISSED_AFTER = 4
"""Iterations after its own at which a fault inside a rank has not come and will not."""
ORPHANS_S = 0.5
"""How long ranks outlive their agent, until what started it ends them."""
FLIPPED_BITS = 64
_SAID = re.compile(r"rank (\d+) iteration (-?\d+): injected (\w+) at ([\w-]+), pid (\d+), ([\d.]+)")


class Stuck(RuntimeError):
    """A run that does not go on by itself. The message has the last lines of the logs."""


class Run:
    """One training to its end. ``faults`` happen on the way; without ``mode`` there are no checkpoints in memory.

    ``folder`` gets losses, events and a log for each host; it must be new.
    """

    def __init__(
        self, hosts: Hosts, trainer: Trainer, mode: str, iterations: int, faults: Sequence[Fault], folder: Path
    ) -> None:
        self.steps: list[Step] = []
        self.starts: list[Start] = []
        self.hashes: list[tuple[int, str]] = []
        self.events: list[dict[str, Any]] = []
        self.outcomes: dict[int, Outcome] = {}
        self.ended = False
        """Whether it has come to its end."""
        self.launches = 0
        self.again: list[str] = []
        """Faults inside a rank that came once more, because the next attempt was faster than this process."""
        self._hosts = hosts
        self._trainer = trainer
        self._mode = mode
        self._iterations = iterations
        self._faults = list(faults)
        self._folder = folder
        self._happened_s: dict[int, float] = {}
        self._over_s: dict[int, float] = {}
        self._later: list[tuple[float, Callable[[], None]]] = []
        """What ends faults, and when."""
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self._pids: dict[int, int] = {}
        """Processes of the ranks, as of the newest start."""
        self._chance = Random(len(faults))
        folder.mkdir(parents=True)
        self._losses, self._armed = folder / "losses.jsonl", folder / "armed.json"
        self._new_losses, self._new_events = Lines(self._losses), Lines(folder / "events.jsonl")
        self._new_said = [Lines(self._log(host)) for host in range(HOSTS)]
        self._moved_s = time.monotonic()

    # -- the run ---------------------------------------------------------------------------------------

    def train(self, until_s: float = math.inf) -> None:
        """To its end, or until then (seconds of the monotonic clock). Raises ``Stuck``."""
        for host in range(HOSTS):  # of an earlier run
            shutil.rmtree(self._hosts.memory(host), ignore_errors=True)
        try:
            self._launch()
            while not (ended := self._is_done()) and time.monotonic() < until_s:
                time.sleep(POLL_S)
                self._look()
                self._begin_due()
                self._end_due()
                self._settle()
                self._supervise()
                if time.monotonic() - self._moved_s > STUCK_S:
                    raise Stuck(f"nothing has moved for {STUCK_S:.0f} s\n{self.tail()}")
        finally:
            for _, end in self._later:
                with suppress(OSError, RuntimeError, subprocess.SubprocessError):
                    end()
            for host in range(HOSTS):
                self._hosts.end_processes(host)
            for agent in self._agents.values():
                agent.wait()
        self.ended = ended
        self._look()
        self._settle()
        for fault in self._faults:
            happened = fault.number in self._happened_s
            self.outcomes.setdefault(fault.number, self._without(fault, OPEN if happened else NOT_MET))

    def tail(self, lines: int = 60) -> str:
        """The last lines of all logs."""
        found = []
        for host in range(HOSTS):
            log = self._log(host)
            text = log.read_text(errors="replace") if log.exists() else ""
            found += [f"host {host}:", *text.splitlines()[-lines:]]
        return "\n".join(found)

    def _is_done(self) -> bool:
        codes = [agent.poll() for agent in self._agents.values()]
        return codes[0] == 0 and None not in codes

    # -- agents ----------------------------------------------------------------------------------------

    def _launch(self) -> None:
        """All agents, for a rendezvous of their own."""
        self.launches += 1
        self._arm()
        for host in range(HOSTS):
            self._start_agent(host)

    def _start_agent(self, host: int) -> None:
        where = self._hosts.address(0)
        place = {
            "nodes": HOSTS, "ranks": RANKS_PER_HOST, "job": f"soak{self.launches}", "endpoint": f"{where}:{PORT}",
            "hosts-it": int(host == 0), "address": self._hosts.address(host), "warm": self._trainer.warm,
            "armed": self._armed if self._mode else "",
        }  # fmt: skip
        flags = f"{self._trainer.program} {self._trainer.flags} --train-iters {self._iterations}"
        if self._mode:
            flags += (
                f" --moetion --moetion-mode {self._mode} --moetion-run-id soak --moetion-store "
                f"{self._hosts.store(host)} --moetion-report {self._folder / 'events.jsonl'} --moetion-timeout-s 30 "
                f"--moetion-state-hash-interval {HASH_EVERY} --moetion-hang-timeout-s {HANG_TIMEOUT_S}"
            )
        argv = [sys.executable, "-m", "benchmarks.soak.agent", *(f"--{k}={v}" for k, v in place.items()), "--"]
        environment = {
            "GLOO_SOCKET_IFNAME": self._hosts.interface, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
            "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/dist'}", "PYTHONWARNINGS": "ignore",
            # What scripts/slurm sets, and why, is there.
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "MOETION_RENDEZVOUS": f"{where}:{PORT}",
        }  # fmt: skip
        self._agents[host] = self._hosts.popen(
            host, [*argv, *flags.format(losses=self._losses).split()], self._log(host), environment
        )

    def _supervise(self) -> None:
        """An agent that has ended begins again; where it hosted the rendezvous, all do."""
        codes = {host: agent.poll() for host, agent in self._agents.items()}
        if codes[0] not in (None, 0):
            for host in range(HOSTS):
                self._hosts.end_processes(host)
                self._agents[host].wait()
            self._launch()
            return
        for host, code in codes.items():
            if code not in (None, 0) and codes[0] is None:
                self._hosts.end_processes(host)
                self._start_agent(host)

    # -- what is seen ----------------------------------------------------------------------------------

    def _look(self) -> None:
        """Take in what was written since the last look."""
        steps = read_steps(self._trainer, self._new_losses.new())
        events = [json.loads(line) for line in self._new_events.new()]
        self.steps += steps
        self.events += events
        for event in events:
            if event["event"] in ("recovered", "began"):
                self.starts.append(Start(time_s=event["time"], iteration=event["iteration"]))
                for host in range(HOSTS):
                    self._pids |= self._noted_pids(host)
            if event["event"] == "state_hash" and event["rank"] == 0:
                self.hashes.append((event["iteration"], event["hash"]))
        said = [found for lines in self._new_said for line in lines.new() if (found := _SAID.search(line))]
        for found in said:
            self._take(found)
        if steps or events or said:
            self._moved_s = time.monotonic()

    def _take(self, found: re.Match[str]) -> None:
        """A rank has said that a fault happens now."""
        hit = [f for f in self._faults if self._may_be(f, found)]
        fresh = [f for f in hit if f.number not in self._happened_s]
        if not fresh:
            if not any(len(f.ranks) > 1 for f in hit):
                self.again.append(f"{found[1]}:{found[2]}:{found[4]}:{found[3]}")
            return
        fault = fresh[0]
        self._happened_s[fault.number] = float(found[6])
        self.outcomes.pop(fault.number, None)  # it was taken as missed, by a rank that still has it
        self._arm()
        if fault.kind == "SIGSTOP_SIGCONT":
            pid = int(found[5])
            self._end_later(fault, lambda: os.kill(pid, signal.SIGCONT))
        else:
            self._over_s[fault.number] = float(found[6])

    @staticmethod
    def _may_be(fault: Fault, found: re.Match[str]) -> bool:
        """Whether the line is of this fault: it strikes at its iteration, or at the next that reaches its point."""
        is_there = int(found[1]) in fault.ranks and found[4] == fault.point and found[3] == fault.inside
        return is_there and (fault.in_recovery or int(found[2]) >= fault.iteration)

    def _arm(self) -> None:
        """Write down what ranks that start from now on do to themselves."""
        armed: list[str] = []
        for before, fault in zip([None, *self._faults], self._faults, strict=False):
            if fault.number in self._happened_s or fault.number in self.outcomes:
                continue
            caused = before is not None and before.number in self._happened_s
            if not fault.in_recovery or caused:
                armed += fault.coordinates
        scratch = self._armed.with_suffix(".new")
        scratch.write_text(json.dumps(armed))
        scratch.replace(self._armed)

    # -- faults ----------------------------------------------------------------------------------------

    def _begin_due(self) -> None:
        """Bring about what comes from outside, in order and one at a time."""
        if not self.steps:
            return
        reached = self.steps[-1].iteration
        for fault in self._faults:
            if fault.number in self.outcomes:
                continue
            if fault.number in self._happened_s:
                if fault.number in self._over_s or fault.inside:
                    continue
                return  # still under way
            if fault.inside:
                continue
            if reached >= fault.iteration and self._is_training():
                self._happened_s[fault.number] = time.time()
                self._arm()
                self._bring_about(fault)
            return

    def _is_training(self) -> bool:
        """Whether the newest start has led to a step."""
        return not self.starts or self.steps[-1].time_s > self.starts[-1].time_s

    def _bring_about(self, fault: Fault) -> None:
        host, hosts = fault.host, self._hosts
        kind, _, with_kill = fault.kind.partition("+")
        pids = {rank: pid for rank, pid in self._pids.items() if rank // RANKS_PER_HOST == host}
        if kind == "STORE_FULL":
            hosts.fill(host)
            self._end_later(fault, lambda: (hosts.memory(host).parent / "filled").unlink(missing_ok=True))
        elif kind == "STORE_DELETED":
            shutil.rmtree(hosts.memory(host), ignore_errors=True)
        elif kind == "BIT_FLIP":
            flip(sorted(hosts.memory(host).glob("*/*/*.arena")), FLIPPED_BITS, self._chance)
        elif kind == "NODE_MEMORY_LOST":
            for pid in pids.values():
                kill(pid)
            shutil.rmtree(hosts.memory(host), ignore_errors=True)
        elif kind == "AGENT_SIGKILL":
            self._agents[host].kill()
            time.sleep(ORPHANS_S)
        elif kind in ("HOST_LOST", "POWER_CUT"):
            hosts.lose(host, silent=kind == "POWER_CUT")
            hosts.restore(host)
        elif kind in ("LINK_DOWN", "LINK_DOWN_LONG"):
            hosts.cut(host, off=True)
            self._end_later(fault, lambda: hosts.cut(host, off=False))
        elif kind == "LINK_SLOW":
            hosts.slow(on=True)
            self._end_later(fault, lambda: hosts.slow(on=False))
        elif kind == "LINK_LOSS":
            hosts.damage(host, lost=LOST_SHARE, damaged=0)
            self._end_later(fault, lambda: hosts.damage(host, lost=0, damaged=0))
        elif kind == "LINK_DAMAGE":
            hosts.damage(host, lost=0, damaged=DAMAGED_SHARE, ports=ports_of(list(self._pids.values())))
            self._end_later(fault, lambda: hosts.damage(host, lost=0, damaged=0))
        else:
            raise ValueError(f"no such fault: {fault.kind}")
        if with_kill:
            kill(pids[fault.ranks[0]])
        if not fault.seconds:
            self._over_s[fault.number] = time.time()

    def _noted_pids(self, host: int) -> dict[int, int]:
        """Processes of a host's ranks, as these have noted them."""
        found = {}
        for path in self._hosts.memory(host).glob("*/*/rank*.pid"):
            with suppress(FileNotFoundError):
                found[int(path.name[4:9])] = int(json.loads(path.read_text())["pid"])
        return found

    def _end_later(self, fault: Fault, end: Callable[[], None]) -> None:
        def over() -> None:
            with suppress(ProcessLookupError):
                end()
            self._over_s[fault.number] = time.time()

        self._later.append((time.monotonic() + fault.seconds, over))

    def _end_due(self) -> None:
        now = time.monotonic()
        due = [entry for entry in self._later if entry[0] <= now]
        self._later = [entry for entry in self._later if entry[0] > now]
        for _, end in due:
            end()

    def _settle(self) -> None:
        """Note what has become of faults."""
        for fault in self._faults:
            number = fault.number
            if number in self.outcomes:
                continue
            if number in self._happened_s:
                at_s, fatal = self._happened_s[number], [f.number for f in self._faults if causes_restart(f.kind)]
                next_s = min((s for n, s in self._happened_s.items() if n in fatal and s > at_s), default=math.inf)
                became = outcome_of(fault, at_s, self._over_s.get(number), self.steps, self.starts, next_s)
                if became is not None:
                    self.outcomes[number] = became
            elif fault.inside and self._is_missed(fault):
                self.outcomes[number] = self._without(fault, NOT_MET)
                self._arm()

    def _is_missed(self, fault: Fault) -> bool:
        """Whether training has gone past it."""
        if fault.in_recovery:
            return self._faults[fault.number - 1].number in self.outcomes
        since = self.starts[-1].time_s if self.starts else 0.0
        return any(s.time_s > since and s.iteration >= fault.iteration + MISSED_AFTER for s in self.steps[-1:])

    def _without(self, fault: Fault, outcome: str) -> Outcome:
        """Of a fault that nothing came of."""
        return Outcome(
            number=fault.number,
            kind=fault.kind,
            iteration=self.steps[-1].iteration if self.steps else 0,
            ranks=fault.ranks,
            point=fault.point,
            outcome=outcome,
        )

    def _log(self, host: int) -> Path:
        return self._folder / f"host{host}.log"


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def flip(files: Sequence[Path], bits: int, chance: Random) -> None:
    """Flip so many bits, anywhere in these files."""
    for _ in range(bits if files else 0):
        with chance.choice(files).open("r+b") as file:
            at = chance.randrange(os.fstat(file.fileno()).st_size)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))


def reference(hosts: Hosts, trainer: Trainer, mode: str, iterations: int, folder: Path) -> Mapping[str, Any]:
    """Losses and, with a mode, state hashes of the run without faults, kept in ``folder`` once it is done."""
    kept = folder / "reference.json"
    if not kept.exists():
        shutil.rmtree(folder / "run", ignore_errors=True)  # of a soak that was stopped
        run = Run(hosts, trainer, mode, iterations, (), folder / "run")
        run.train()
        kept.write_text(json.dumps({"losses": {s.iteration: s.loss for s in run.steps}, "hashes": dict(run.hashes)}))
    found = json.loads(kept.read_text())
    return {name: {int(i): value for i, value in values.items()} for name, values in found.items()}
