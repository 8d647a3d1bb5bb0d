# SPDX-License-Identifier: Apache-2.0
"""Ranks on the hosts of a testbed, started without a launcher: who is killed, and when, is the driver's."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.testbed import Testbed
from benchmarks.testbed.hosts import address
from benchmarks.testbed.launch import tail

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOSTS, RANKS_PER_HOST = 2, 2
RANKS = HOSTS * RANKS_PER_HOST
FIRST_PORT = 29600
GRACE_S = 30.0
"""From SIGTERM to SIGKILL, for ranks that outlive another one: what torchrun gives them."""
POLL_S, END_POLL_S = 0.2, 0.01
MEMORY = Path("/dev/shm/peers")


class JobStuck(RuntimeError):
    """Ranks did not come to what was awaited."""


@dataclass
class Job:
    """Attempts of one training; ``folder`` has events and logs, and the disk that all hosts see."""

    testbed: Testbed
    python: Path
    system: str
    layout: str
    folder: Path
    agent: str = ""
    """Module of ``systems/``, see ``catalogue.Peer``."""
    attempt: int = 0
    ranks: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    agents: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def shared(self) -> Path:
        return self.folder / "shared"

    @property
    def events_folder(self) -> Path:
        return self.folder / f"attempt{self.attempt}"

    def start(self, work: str, *options: str) -> None:
        """Start all ranks: the next attempt."""
        self.attempt += 1
        shutil.rmtree(self.events_folder, ignore_errors=True)
        self.events_folder.mkdir(parents=True)
        self.shared.mkdir(exist_ok=True)
        for host in range(HOSTS) if self.agent else ():
            if host not in self.agents or self.agents[host].poll() is not None:
                argv = [str(self.python), str(HERE / "systems" / f"{self.agent}.py"), str(host)]
                log = self.folder / f"agent{host}.log"
                self.agents[host] = self.testbed.popen(host, argv, log, {"PYTHONPATH": str(ROOT)})
        for rank in range(RANKS):
            host, local = divmod(rank, RANKS_PER_HOST)
            argv = [
                *(str(self.python), "-u", str(HERE / "worker.py"), work, "--system", self.system),
                *("--layout", self.layout, "--events", str(self.events_folder), "--memory", str(MEMORY)),
                *("--shared", str(self.shared), *options),
            ]
            place = {
                "RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": RANKS_PER_HOST,
                "MASTER_ADDR": address(0), "MASTER_PORT": FIRST_PORT + self.attempt, "PYTHONPATH": ROOT,
                "GLOO_SOCKET_IFNAME": "eth0", "TP_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": 1,
                "TORCHELASTIC_RUN_ID": "peers", "TORCHELASTIC_RESTART_COUNT": self.attempt - 1,
            }  # fmt: skip
            environment = {name: str(value) for name, value in place.items()}
            self.ranks[rank] = self.testbed.popen(host, argv, self.log(rank), environment)

    def log(self, rank: int) -> Path:
        return self.events_folder / f"rank{rank}.log"

    def events(self, rank: int) -> list[dict[str, Any]]:
        """What the rank has said so far in this attempt."""
        try:
            lines = (self.events_folder / f"rank{rank}.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def await_all(self, seen: Callable[[dict[str, Any]], bool], limit_s: float) -> None:
        """Until every rank has said this. ``JobStuck`` if one ends before, or after the limit."""
        deadline = time.monotonic() + limit_s
        waiting = set(range(RANKS))
        while True:
            ended = {rank for rank in waiting if self.ranks[rank].poll() is not None}
            waiting = {rank for rank in waiting if not any(map(seen, self.events(rank)))}
            if not waiting:
                return
            if ended & waiting:
                time.sleep(1.0)  # what the others have to say
                raise JobStuck(f"rank {min(ended & waiting)} ended: {self.last_words(min(ended & waiting))}")
            if time.monotonic() > deadline:
                raise JobStuck(f"nothing of rank {min(waiting)} in {limit_s:g} s: {self.last_words(min(waiting))}")
            time.sleep(POLL_S)

    def last_words(self, rank: int) -> str:
        return tail(self.log(rank).read_text(errors="replace"), 6).strip()

    def kill(self, rank: int) -> None:
        """SIGKILL to this rank."""
        os.kill(self._pid(rank), signal.SIGKILL)

    def end_survivors(self, ranks: Sequence[int] = range(RANKS)) -> None:
        """As a launcher does it: SIGTERM, some time, SIGKILL, and nothing of the ranks is left. Agents stay."""
        alive = [rank for rank in ranks if self.ranks[rank].poll() is None]
        for rank in alive:
            with suppress(ProcessLookupError):
                os.kill(self._pid(rank), signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while time.monotonic() < deadline and any(self.ranks[rank].poll() is None for rank in alive):
            time.sleep(END_POLL_S)
        agents = {agent.pid for agent in self.agents.values() if agent.poll() is None}
        self._end(agents | {child.pid for pid in agents for child in psutil.Process(pid).children(recursive=True)})

    def end(self) -> None:
        """SIGKILL to whatever of the job still runs."""
        self._end(set())

    def _end(self, spared: Container[int]) -> None:
        for host in range(HOSTS):
            if self.testbed.is_up(host):
                for pid in self.testbed.processes(host):
                    if pid not in spared:
                        with suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
        for rank in self.ranks.values():
            rank.wait(30)

    def _pid(self, rank: int) -> int:
        found = [event["pid"] for event in self.events(rank) if event["event"] == "up"]
        return int(found[-1]) if found else self.ranks[rank].pid
