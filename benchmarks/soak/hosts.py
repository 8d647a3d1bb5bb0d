# SPDX-License-Identifier: Apache-2.0
"""The hosts of a soak: those of the testbed, or folders of this machine where it cannot be set up."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import psutil

from benchmarks.soak.story import HURTS_PACKETS, NEEDS_TESTBED
from benchmarks.soak.trainers import HOSTS
from benchmarks.testbed import Testbed, damage, why_unavailable
from benchmarks.testbed.hosts import address

SMALL_SHM = "192m"
"""Of a host's memory, so that it can be filled."""
SLOW_MBIT = 4.0
LOST_SHARE = 0.03
DAMAGED_SHARE = 0.3


NO_NETWORK = "without network namespaces a story has no faults of links and no full memory"


class Hosts(Protocol):
    """Machines, each with an agent, ranks and memory of its own."""

    interface: str
    left_out: Collection[str]
    """Kinds of faults that cannot be done here."""
    why: str
    """Why not, with the remedy."""

    def address(self, host: int) -> str: ...
    def store(self, host: int) -> str:
        """``--moetion-store`` of its ranks."""

    def memory(self, host: int) -> Path:
        """The same, as this process finds it."""

    def popen(
        self, host: int, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]: ...
    def end_processes(self, host: int) -> None: ...
    def lose(self, host: int, *, silent: bool) -> None:
        """Processes and memory are gone."""

    def restore(self, host: int) -> None: ...
    def cut(self, host: int, *, off: bool) -> None: ...
    def slow(self, *, on: bool) -> None: ...
    def damage(self, host: int, *, lost: float, damaged: float, ports: Sequence[int] = ()) -> None: ...
    def fill(self, host: int) -> None: ...


class Emulated:
    """Hosts of the testbed, each with a network and memory of its own."""

    interface = "eth0"

    def __init__(self, testbed: Testbed) -> None:
        self._testbed = testbed
        self.why = damage.why_unavailable()
        self.left_out: Collection[str] = HURTS_PACKETS if self.why else ()
        for host in range(HOSTS):
            self._shrink(host)

    def address(self, host: int) -> str:
        return address(host)

    def store(self, host: int) -> str:
        return "/dev/shm/soak"

    def memory(self, host: int) -> Path:
        return self._testbed.memory(host) / "soak"

    def popen(
        self, host: int, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        return self._testbed.popen(host, argv, log, env)

    def end_processes(self, host: int) -> None:
        for pid in self._testbed.processes(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def lose(self, host: int, *, silent: bool) -> None:
        self._testbed.lose(host, silent=silent)

    def restore(self, host: int) -> None:
        self._testbed.restore(host)
        self._shrink(host)

    def cut(self, host: int, *, off: bool) -> None:
        self._testbed.set_link(host, up=not off)

    def slow(self, *, on: bool) -> None:
        self._testbed.set_rate(SLOW_MBIT if on else None)

    def damage(self, host: int, *, lost: float, damaged: float, ports: Sequence[int] = ()) -> None:
        self._testbed.set_damage(host, lost_share=lost, damaged_share=damaged, ports=ports)

    def fill(self, host: int) -> None:
        fill(self._testbed.memory(host) / "filled")

    def _shrink(self, host: int) -> None:
        remount = ["mount", "-o", f"remount,size={SMALL_SHM}", "/dev/shm"]
        subprocess.run(self._testbed.command(host, remount), check=True, capture_output=True, timeout=30)


class Folders:
    """All on the loopback of this machine; a host is an agent with a store of its own."""

    interface = "lo"
    left_out: Collection[str] = NEEDS_TESTBED

    def __init__(self, folder: Path, why: str) -> None:
        self._folder = folder
        self._agents: dict[int, subprocess.Popen[bytes]] = {}
        self.why = why

    def address(self, host: int) -> str:
        return "127.0.0.1"

    def store(self, host: int) -> str:
        return str(self.memory(host))

    def memory(self, host: int) -> Path:
        return self._folder / f"host{host}"

    def popen(
        self, host: int, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        with log.open("ab") as out:
            self._agents[host] = subprocess.Popen(
                list(argv), stdout=out, stderr=out, env={**os.environ, **(env or {})}, start_new_session=True
            )
        return self._agents[host]

    def end_processes(self, host: int) -> None:
        """A session is what survives the death of an agent, whose children get other parents."""
        agent = self._agents.get(host)
        if agent is not None:
            for process in psutil.process_iter():
                with suppress(ProcessLookupError, psutil.NoSuchProcess):
                    if os.getsid(process.pid) == agent.pid:
                        process.kill()

    def lose(self, host: int, *, silent: bool) -> None:
        self.end_processes(host)
        shutil.rmtree(self.memory(host), ignore_errors=True)

    def restore(self, host: int) -> None:
        """There is nothing to make."""

    def cut(self, host: int, *, off: bool) -> None:
        raise NotImplementedError(NO_NETWORK)

    def slow(self, *, on: bool) -> None:
        raise NotImplementedError(NO_NETWORK)

    def damage(self, host: int, *, lost: float, damaged: float, ports: Sequence[int] = ()) -> None:
        raise NotImplementedError(NO_NETWORK)

    def fill(self, host: int) -> None:
        raise NotImplementedError(NO_NETWORK)


@contextmanager
def hosts(scratch: Path) -> Iterator[Hosts]:
    """The best that this machine offers. ``scratch``: a folder in memory, for where the testbed cannot be set up."""
    missing = why_unavailable()
    if not missing:
        with Testbed(HOSTS) as testbed:
            yield Emulated(testbed)
        return
    folders = Folders(scratch, missing)
    try:
        yield folders
    finally:
        for host in range(HOSTS):
            folders.lose(host, silent=False)
        shutil.rmtree(scratch, ignore_errors=True)


def fill(path: Path) -> None:
    """Take all the room that is left, a page at last."""
    with path.open("wb") as file:
        size = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
        while size >= 4096:
            try:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
            except OSError:
                size //= 2
            else:
                size = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize


def ports_of(pids: Sequence[int]) -> list[int]:
    """TCP ports on which these processes listen on all interfaces, which is what connections of snapshots do."""
    found = set()
    for pid in pids:
        inodes = set()
        descriptors = Path(f"/proc/{pid}/fd")
        if not descriptors.is_dir():  # it has ended
            continue
        for entry in descriptors.iterdir():
            with suppress(OSError):
                inodes.add(os.readlink(entry).removeprefix("socket:[").removesuffix("]"))
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                where, port = fields[1].split(":")
                if fields[3] == "0A" and int(where, 16) == 0 and fields[9] in inodes:
                    found.add(int(port, 16))
    return sorted(found)
