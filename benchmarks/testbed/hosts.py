# SPDX-License-Identifier: Apache-2.0
"""Emulated hosts: one network namespace and one private ``/dev/shm`` each, joined by a bridge.

What a host has of its own: its network (``lo``, and ``eth0`` with address ``10.77.0.<1 + host>``), its ``/dev/shm``,
its name (``host0``, ...; all names resolve). What hosts share: processors, the disk, process ids.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from benchmarks.testbed import damage, namespaces
from benchmarks.testbed.interrupts import Interrupts
from benchmarks.testbed.namespaces import COMMAND_LIMIT_S, TestbedUnavailable, call

MAX_HOSTS = 64
MTU = "9000"
"""Jumbo frames, as in clusters; small ones would spend the processors that train on packets."""

# The file of names is bound before it is unlinked: it stays, and the new /dev/shm is empty.
_BOOT = """set -e
mount -t tmpfs -o mode=1777 shm /dev/shm
printf '%s\\n' "$2" > /dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
rm /dev/shm/hosts
echo "$1" > /proc/sys/kernel/hostname
echo up
exec sleep infinity
"""


def address(host: int) -> str:
    """IPv4 address of a host's ``eth0``."""
    return f"10.77.0.{1 + host}"


def hosts_file(num_hosts: int) -> str:
    """The ``/etc/hosts`` of every host."""
    lines = ["127.0.0.1 localhost", "::1 localhost"]
    return "\n".join(lines + [f"{address(host)} host{host}" for host in range(num_hosts)])


def rate_options(rate_mbit: float) -> list[str]:
    """The token bucket of one end of a link, in the words of ``tc``."""
    return f"tbf rate {round(rate_mbit * 1e6)}bit burst 256kb latency 20ms".split()


class Testbed:
    """Hosts that exist inside the ``with``. They are removed when it is left in any way, SIGTERM and Ctrl-C included.

    ``rate_mbit`` is the rate of each host's link in Mbit/s, in each direction; None does not limit it. A process holds
    one testbed at a time. What a process leaves that is killed with SIGKILL, the next testbed on this machine removes.
    """

    __test__ = False  # not a test, whatever pytest thinks of the name

    def __init__(self, num_hosts: int = 2, rate_mbit: float | None = None) -> None:
        if not 1 <= num_hosts <= MAX_HOSTS:
            raise ValueError(f"num_hosts is {num_hosts}; it must be from 1 to {MAX_HOSTS}")
        _check_rate(rate_mbit)
        self.num_hosts = num_hosts
        self.rate_mbit = rate_mbit
        self._holders: dict[int, subprocess.Popen[str]] = {}
        self._interrupts = Interrupts()
        self._owner = ""

    def __enter__(self) -> Testbed:
        reason = namespaces.why_unavailable()
        if reason:
            raise TestbedUnavailable(reason)
        self._owner = namespaces.owner_name(os.getpid()) or ""
        if namespaces.existing(self._owner):
            raise RuntimeError("this process already holds a testbed: leave that one first")
        namespaces.remove_leftovers()
        self._interrupts = Interrupts()
        self._interrupts.install()
        try:
            call("ip", "netns", "add", self._switch)
            call("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
            call("ip", "-n", self._switch, "link", "set", "br0", "addrgenmode", "none", "up")
            for host in range(self.num_hosts):
                self.restore(host)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def is_up(self, host: int) -> bool:
        """Whether the host is there: not lost, or lost and restored."""
        if not 0 <= host < self.num_hosts:
            raise ValueError(f"host {host} of a testbed with hosts 0 to {self.num_hosts - 1}")
        return host in self._holders

    def set_rate(self, rate_mbit: float | None) -> None:
        """Change the rate of all links, in Mbit/s, while things run. None does not limit them."""
        _check_rate(rate_mbit)
        before, self.rate_mbit = self.rate_mbit, rate_mbit
        for host in self._holders:
            self._limit(host, limited_before=before is not None)

    def link_bytes(self, host: int) -> tuple[int, int]:
        """Bytes that went over the host's link since it came up, headers included: (sent, received)."""
        self._demand_up(host)
        link = json.loads(call("ip", "-n", self._name(host), "-s", "-j", "link", "show", "dev", "eth0"))[0]
        return link["stats64"]["tx"]["bytes"], link["stats64"]["rx"]["bytes"]

    def command(self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None) -> list[str]:
        """The command line that runs ``argv`` on a host, in this folder; ``env`` adds to the environment."""
        self._demand_up(host)
        settings = [f"{name}={value}" for name, value in (env or {}).items()]
        enter = ["nsenter", "--target", str(self._holders[host].pid), "--net", "--mount", "--uts"]
        return [*enter, "--", "env", f"--chdir={os.getcwd()}", *settings, *argv]

    def popen(
        self, host: int, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start ``argv`` on a host; what it writes is added to ``log``. It ends with the testbed at the latest."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.command(host, argv, env),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the owner
            )

    def lose(self, host: int, *, silent: bool = True) -> None:
        """The host dies: its processes, its memory and its link are gone.

        Silent is a power cut: the link goes first, and peers hear nothing more. Otherwise the processes are killed, and
        the kernel closes their connections and refuses new ones until the host is restored.
        """
        self._demand_up(host)
        if silent:
            call("ip", "-n", self._switch, "link", "set", f"p{host}", "down")
        namespaces.end_processes(self._name(host))
        self._holders.pop(host).wait(COMMAND_LIMIT_S)
        if silent:
            self._unplug(host)

    def set_link(self, host: int, *, up: bool) -> None:
        """Cut the host's link, or mend it; its processes and its memory stay."""
        self._demand_up(host)
        call("ip", "-n", self._switch, "link", "set", f"p{host}", "up" if up else "down")

    def set_damage(
        self, host: int, *, lost_share: float = 0.0, damaged_share: float = 0.0, ports: Sequence[int] = ()
    ) -> None:
        """Hurt packets that reach the host from now on, see ``damage.rules``; without shares they are whole again.

        Ask ``damage.why_unavailable`` first.
        """
        self._demand_up(host)
        nft = ["ip", "netns", "exec", self._name(host), "nft"]
        call(*nft, f"add table netdev {damage.TABLE}; delete table netdev {damage.TABLE}")
        if lost_share or damaged_share:
            call(*nft, damage.rules(lost_share, damaged_share, ports))

    def memory(self, host: int) -> Path:
        """The host's ``/dev/shm``, as this process finds it."""
        self._demand_up(host)
        return Path(f"/proc/{self._holders[host].pid}/root/dev/shm")

    def processes(self, host: int) -> list[int]:
        """Ids of what runs on the host."""
        self._demand_up(host)
        found = map(int, call("ip", "netns", "pids", self._name(host)).split())
        return [pid for pid in found if pid != self._holders[host].pid]

    def restore(self, host: int) -> None:
        """An empty machine takes the place, name and addresses of a lost one."""
        if self.is_up(host):
            raise ValueError(f"host {host} is up; only a lost host can be restored")
        name, port, mac = self._name(host), f"p{host}", f"02:4d:4f:45:00:{host:02x}"
        if name in namespaces.existing(self._owner):
            self._unplug(host)
        call("ip", "netns", "add", name)
        call("ip", "-n", name, "link", "set", "lo", "up")
        pair = ["type", "veth", "peer", "name", "eth0", "mtu", MTU, "address", mac, "netns", name]
        call("ip", "-n", self._switch, "link", "add", port, "mtu", MTU, *pair)
        call("ip", "-n", self._switch, "link", "set", port, "master", "br0", "addrgenmode", "none", "up")
        call("ip", "-n", name, "address", "add", f"{address(host)}/24", "dev", "eth0")
        # IPv4 only: an IPv6 address of the link would be unusable for the first second.
        call("ip", "-n", name, "link", "set", "eth0", "addrgenmode", "none", "up")
        self._holders[host] = self._boot(host)
        self._limit(host, limited_before=False)

    def _boot(self, host: int) -> subprocess.Popen[str]:
        """The process that keeps the host's memory while nothing else runs there."""
        enter = ["ip", "netns", "exec", self._name(host), "unshare", "--mount", "--uts", "--propagation", "private"]
        holder = subprocess.Popen(
            [*enter, "sh", "-c", _BOOT, "boot", f"host{host}", hosts_file(self.num_hosts)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        assert holder.stdout is not None
        with holder.stdout as output:
            ready, _, _ = select.select([output], [], [], COMMAND_LIMIT_S)
            said = output.readline().strip() if ready else f"nothing within {COMMAND_LIMIT_S:g} s"
        if said != "up":
            holder.kill()
            holder.wait()
            raise RuntimeError(f"host {host} did not come up; it said: {said}")
        return holder

    def _unplug(self, host: int) -> None:
        call("ip", "-n", self._switch, "link", "del", f"p{host}")
        namespaces.remove(self._name(host))

    def _limit(self, host: int, limited_before: bool) -> None:
        for name, device in ((self._name(host), "eth0"), (self._switch, f"p{host}")):
            if self.rate_mbit is not None:
                call("tc", "-n", name, "qdisc", "replace", "dev", device, "root", *rate_options(self.rate_mbit))
            elif limited_before:
                call("tc", "-n", name, "qdisc", "del", "dev", device, "root")

    def _close(self) -> None:
        problems = []
        with self._interrupts.close():
            for name in namespaces.existing(self._owner):
                try:
                    namespaces.remove(name)
                except RuntimeError as error:
                    problems.append(str(error))
            while self._holders:
                self._holders.popitem()[1].wait(COMMAND_LIMIT_S)
        if problems:
            raise RuntimeError("the testbed is not all removed: " + "; ".join(problems))

    @property
    def _switch(self) -> str:
        return f"{self._owner}sw"

    def _name(self, host: int) -> str:
        return f"{self._owner}h{host}"

    def _demand_up(self, host: int) -> None:
        if not self.is_up(host):
            raise RuntimeError(f"host {host} is not up: enter the testbed, or restore() a host that was lost")


def _check_rate(rate_mbit: float | None) -> None:
    if rate_mbit is not None and not 0.1 <= rate_mbit <= 1e6:
        raise ValueError(f"rate_mbit is {rate_mbit}; it must be from 0.1 to 1e6, or None for no limit")
