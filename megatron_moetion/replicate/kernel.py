# SPDX-License-Identifier: Apache-2.0
"""What the machine's kernel does for the network: an argument, so that a simulation can do it in its place."""

from __future__ import annotations

import contextlib
import os
import random
import select
import selectors
import socket
from collections.abc import Sequence
from typing import Any, Protocol

from megatron_moetion.replicate.addresses import own_address
from megatron_moetion.replicate.channel import Address

_BACKLOG = 1024
_CHANCE = random.SystemRandom()
"""Training's own generators are part of its state: nothing may be drawn from them here."""


class Socket(Protocol):
    """A stream socket, as far as it is used. Methods are those of ``socket.socket`` and raise its errors."""

    def fileno(self) -> int:
        """See ``socket.socket``."""
        ...

    def setblocking(self, flag: bool, /) -> None:
        """See ``socket.socket``."""
        ...

    def settimeout(self, value: float | None, /) -> None:
        """See ``socket.socket``."""
        ...

    def setsockopt(self, level: int, optname: int, value: int, /) -> None:
        """See ``socket.socket``."""
        ...

    def getsockname(self) -> Any:
        """See ``socket.socket``."""
        ...

    def accept(self) -> tuple[Socket, Any]:
        """See ``socket.socket``."""
        ...

    def recv(self, bufsize: int, /) -> bytes:
        """See ``socket.socket``."""
        ...

    def recvmsg_into(self, buffers: Sequence[memoryview], /) -> tuple[int, Any, int, Any]:
        """See ``socket.socket``."""
        ...

    def send(self, data: Any, /) -> int:
        """See ``socket.socket``."""
        ...

    def sendall(self, data: Any, /) -> None:
        """See ``socket.socket``."""
        ...

    def sendmsg(self, buffers: Sequence[memoryview], /) -> int:
        """See ``socket.socket``."""
        ...

    def shutdown(self, how: int, /) -> None:
        """See ``socket.socket``."""
        ...

    def close(self) -> None:
        """See ``socket.socket``."""
        ...


class Kernel(Protocol):
    """Sockets, waits for them, and random bytes. May be used from any thread."""

    def address(self, wanted: str, master: str, *, is_one_host: bool, setting: str) -> Address:
        """See ``own_address``."""
        ...

    def listen(self) -> Socket:
        """On a free port of all interfaces, which ``getsockname`` has second."""
        ...

    def dial(self, place: tuple[str, int], timeout_s: float) -> Socket:
        """A connection to host and port, whose calls wait as long too. ``OSError`` where there is none in time."""
        ...

    def pair(self) -> tuple[Socket, Socket]:
        """Two sockets of this process that are connected to each other."""
        ...

    def selector(self) -> selectors.BaseSelector:
        """A new one, with nothing registered."""
        ...

    def wait(self, sock: Socket, event: int, timeout_s: float) -> bool:
        """Return once one of these events of ``select.poll`` has come, or after the timeout; whether it has."""
        ...

    def random_bytes(self, nbytes: int) -> bytes:
        """Bytes that nobody can guess."""
        ...

    def between(self, low: float, high: float) -> float:
        """A number by chance."""
        ...


class SystemKernel:
    """The machine's own."""

    def address(self, wanted: str, master: str, *, is_one_host: bool, setting: str) -> Address:
        """See ``Kernel``."""
        return own_address(wanted, master, is_one_host=is_one_host, setting=setting)

    def listen(self) -> Socket:
        """See ``Kernel``."""
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):
                return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
        return socket.create_server(("", 0), backlog=_BACKLOG)

    def dial(self, place: tuple[str, int], timeout_s: float) -> Socket:
        """See ``Kernel``."""
        return socket.create_connection(place, timeout=timeout_s)

    def pair(self) -> tuple[Socket, Socket]:
        """See ``Kernel``."""
        return socket.socketpair()

    def selector(self) -> selectors.BaseSelector:
        """See ``Kernel``."""
        return selectors.DefaultSelector()

    def wait(self, sock: Socket, event: int, timeout_s: float) -> bool:
        """See ``Kernel``."""
        poll = select.poll()
        poll.register(sock, event)
        return bool(poll.poll(timeout_s * 1000))

    def random_bytes(self, nbytes: int) -> bytes:
        """See ``Kernel``."""
        return os.urandom(nbytes)

    def between(self, low: float, high: float) -> float:
        """See ``Kernel``."""
        return _CHANCE.uniform(low, high)


SYSTEM_KERNEL = SystemKernel()
