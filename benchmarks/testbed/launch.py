# SPDX-License-Identifier: Apache-2.0
"""``torchrun`` over the hosts of a testbed: one agent per host, one log file per host, a bounded wait."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.testbed.hosts import Testbed, address

MASTER_PORT = 29500
ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
GRACE_S = 5.0
"""How long the other hosts have to end, and to say why, after one has failed."""

POLL_INTERVAL_S = 0.05
TAIL_LINES = 15


class JobFailed(RuntimeError):
    """An agent ended with an error, or the job took too long. The message names hosts and exit codes."""


class Job:
    """One ``torchrun`` job on a testbed. ``folder`` gets ``host<i>.log``; ``extra_args`` go to ``torchrun``."""

    def __init__(
        self,
        testbed: Testbed,
        script_argv: Sequence[str],
        nproc_per_host: int,
        folder: Path,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.testbed = testbed
        self.script_argv = list(script_argv)
        self.nproc_per_host = nproc_per_host
        self.folder = folder
        self.extra_args = list(extra_args)
        self.agents: dict[int, subprocess.Popen[bytes]] = {}

    def log(self, host: int) -> Path:
        """Where the output of this host's agent and ranks goes."""
        return self.folder / f"host{host}.log"

    def start(self) -> None:
        """Start the agents of all hosts, with new logs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for host in range(self.testbed.num_hosts):
            self.log(host).write_bytes(b"")
            self.start_host(host)

    def start_host(self, host: int) -> None:
        """Start one host's agent: at the start, or on a restored host. Adds to the log."""
        argv = agent_argv(host, self.testbed.num_hosts, self.nproc_per_host, self.extra_args)
        self.agents[host] = self.testbed.popen(host, [*argv, *self.script_argv], self.log(host), ENVIRONMENT)

    def wait(self, limit_s: float) -> list[Path]:
        """Wait until all agents have ended well; the logs. A host that is lost and not restored is not waited for.

        ``JobFailed`` if an agent fails or ``limit_s`` passes; what still runs then ends with the testbed.
        """
        deadline = time.monotonic() + limit_s
        while True:
            codes = self._codes()
            failed = [host for host, code in codes.items() if code]
            if failed:
                self._wait_for_rest(min(deadline, time.monotonic() + GRACE_S))
                raise JobFailed(self._story(failed[0], self._codes()))
            if all(code == 0 for code in codes.values()):
                return [self.log(host) for host in self.agents]
            if time.monotonic() > deadline:
                running = [host for host, code in codes.items() if code is None]
                raise JobFailed(
                    f"no end within {limit_s:g} s: still running on host {', '.join(map(str, running))}\n"
                    + "\n".join(self._tail(host) for host in running)
                )
            time.sleep(POLL_INTERVAL_S)

    def _codes(self) -> dict[int, int | None]:
        return {host: agent.poll() for host, agent in self.agents.items() if self.testbed.is_up(host)}

    def _wait_for_rest(self, deadline: float) -> None:
        while time.monotonic() < deadline and None in self._codes().values():
            time.sleep(POLL_INTERVAL_S)

    def _story(self, first: int, codes: dict[int, int | None]) -> str:
        others = [
            f"host {host} " + ("was still running" if code is None else f"ended with exit code {code}")
            for host, code in codes.items()
            if host != first and code != 0
        ]
        heading = f"host {first} ended with exit code {codes[first]}"
        return "\n".join(["; ".join([heading, *others]), self._tail(first)])

    def _tail(self, host: int) -> str:
        return f"last lines of {self.log(host)}:\n{tail(self.log(host).read_text(errors='replace'))}"


def run_torchrun(
    testbed: Testbed,
    script_argv: Sequence[str],
    nproc_per_host: int,
    limit_s: float,
    folder: Path,
    extra_args: Sequence[str] = (),
) -> list[Path]:
    """Run a script under ``torchrun`` on all hosts; the logs, host by host. ``JobFailed`` if it does not end well."""
    job = Job(testbed, script_argv, nproc_per_host, folder, extra_args)
    job.start()
    return job.wait(limit_s)


def agent_argv(host: int, num_hosts: int, nproc_per_host: int, extra_args: Sequence[str]) -> list[str]:
    """The command line of one host's agent, up to the script."""
    place = f"--nnodes {num_hosts} --node-rank {host} --nproc-per-node {nproc_per_host}"
    master = f"--master-addr {address(0)} --master-port {MASTER_PORT}"
    return [sys.executable, "-m", "torch.distributed.run", *place.split(), *master.split(), *extra_args]


def tail(text: str, lines: int = TAIL_LINES) -> str:
    """The last lines of a log, indented."""
    return "\n".join(f"  {line}" for line in text.splitlines()[-lines:]) or "  (it is empty)"
