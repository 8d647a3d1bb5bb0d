# SPDX-License-Identifier: Apache-2.0
"""Where ranks listen, as the job's rendezvous store tells."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
from torch import distributed as dist

from megatron_moetion.clock import Clock
from megatron_moetion.errors import ChannelError, ConfigError, understood
from megatron_moetion.replicate.channel import Address

_PREFIX = "moetion/net"
_LOOPBACK = "127.0.0.1"
_STORE_TIMEOUT = timedelta(seconds=20)
_PAUSE_S = (0.01, 1.0)
"""First and longest pause between two looks for a key that is not there yet."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the lowest rank tells the others."""

    token: bytes
    ranks_per_host: int


class Directory:
    """This rank's view of the store: a handful of requests at start, and one or two for each peer that it needs.

    Nothing waits inside the store, which training uses too: a key that is not there is looked for again, in growing
    intervals. Every rank of a job makes equally many of these on one store.
    """

    def __init__(self, store: dist.Store, rank: int, clock: Clock) -> None:
        self._store = store
        self._rank = rank
        self._clock = clock
        self._places: dict[int, tuple[str, int]] = {}
        with _errors():
            self._prefix = f"{_PREFIX}/{store.add(f'{_PREFIX}/times/{rank}', 1)}"
        self.token = b""

    def join(self, host: str, port: int, ranks_per_host: int, timeout_s: float, *, token: bytes) -> Job:
        """Say where this rank listens; learn of the job. ``ChannelError`` after the timeout.

        Rank 0 decides: ``token`` is random bytes, of which those of rank 0 become the job's.
        """
        with _errors():
            self._store.set(f"{self._prefix}/at/{self._rank}", json.dumps([host, port]))
            if self._rank == 0:
                job = json.dumps([token.hex(), ranks_per_host])
                self._store.set(f"{self._prefix}/job", job)
            else:
                job = self._get("job", "rank 0", timeout_s)
        with understood("the token of the job and the ranks of a host"):
            told, ranks_per_host = json.loads(job)
            found = Job(token=bytes.fromhex(told), ranks_per_host=int(ranks_per_host))
            if found.ranks_per_host < 1:
                raise ValueError(job)
        self.token = found.token
        return found

    def find(self, peer: int, timeout_s: float) -> tuple[str, int]:
        """Host and port of a rank. ``ChannelError`` where it has not said so in time."""
        if peer not in self._places:
            with _errors():
                said = self._get(f"at/{peer}", f"rank {peer}", timeout_s)
            with understood("where it listens"):
                host, port = json.loads(said)
                self._places[peer] = (str(host), int(port))
        return self._places[peer]

    def _get(self, key: str, who: str, timeout_s: float) -> str:
        deadline_s = self._clock.monotonic() + timeout_s
        pause_s, longest_s = _PAUSE_S
        name = f"{self._prefix}/{key}"
        while not self._store.check([name]):
            if self._clock.monotonic() >= deadline_s:
                raise ChannelError(f"{who} has not said within {timeout_s:g} s where it listens")
            self._clock.sleep(pause_s)
            pause_s = min(longest_s, pause_s * 2)
        return str(self._store.get(name).decode(errors="replace"))


def job_store(environment: Mapping[str, str]) -> dist.Store:
    """The rendezvous store of this attempt: torch's own, else the one that the launcher names.

    ``ChannelError`` where there is none.
    """
    group = dist.group.WORLD
    store = group.get_group_store() if group is not None else None
    if store is not None:
        return store
    attempt = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
        found = dist.TCPStore(host, port, is_master=False, timeout=_STORE_TIMEOUT, wait_for_workers=False)
    except (KeyError, ValueError, RuntimeError) as error:  # torch raises nothing narrower where nobody listens
        raise ChannelError(f"no rendezvous store at MASTER_ADDR and MASTER_PORT: {error}") from error
    return dist.PrefixStore(f"moetion/attempt{attempt}", found)


def own_address(wanted: str, master: str, *, is_one_host: bool, setting: str) -> Address:
    """The address at which other ranks reach this one.

    That of the interface which is ``wanted``: names or beginnings of names, comma separated, of which the first that is
    found counts. Without one the loopback, where all ranks run on one host; else the local end of the route to
    ``master``, the host of the rendezvous, or what the name of this host stands for. ``ConfigError``, which names
    ``setting``, where no such interface is up and has an address.
    """
    here = _interfaces()
    if wanted:
        for name in filter(None, (part.strip() for part in wanted.split(","))):
            for interface in sorted(here, key=lambda each: (each != name, each)):
                if interface.startswith(name):
                    return Address(interface=interface, host=here[interface][0])
        there = ", ".join(f"{name} ({', '.join(addresses)})" for name, addresses in sorted(here.items()))
        raise ConfigError(
            f"{setting} is {wanted!r}, and no interface of {socket.gethostname()} that is up and has an address is "
            f"called so; there are {there}"
        )
    host = _LOOPBACK
    if not is_one_host:
        host = next((a for a in _candidates(master) if not a.startswith("127.") and a != "::1"), _LOOPBACK)
    interface = next((name for name, addresses in here.items() if host in addresses), "")
    return Address(interface=interface, host=host)


def _interfaces() -> dict[str, list[str]]:
    """Addresses of each interface that is up and has any, IPv4 first; none that hold on one link only."""
    stats = psutil.net_if_stats()
    found = {
        name: [
            str(address.address)
            for family in (socket.AF_INET, socket.AF_INET6)
            for address in addresses
            if address.family == family and not str(address.address).startswith("fe80:")
        ]
        for name, addresses in psutil.net_if_addrs().items()
        if name in stats and stats[name].isup
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def _candidates(master: str) -> Iterator[str]:
    for name in (master, socket.gethostname()):
        try:
            found = socket.getaddrinfo(name, 1, type=socket.SOCK_DGRAM) if name else []
        except OSError:
            continue
        for family, kind, protocol, _, address in found:
            with socket.socket(family, kind, protocol) as probe:
                try:
                    probe.connect(address)  # sends nothing
                except OSError:
                    continue
                yield str(probe.getsockname()[0])


class _errors:
    """Turns a failure of the store into a ``ChannelError``."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, ChannelError):
            raise ChannelError(f"the rendezvous store does not answer: {error}") from error
