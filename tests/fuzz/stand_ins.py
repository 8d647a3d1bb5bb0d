# SPDX-License-Identifier: Apache-2.0
"""What stands in for memory, nodes, sockets, threads and time while one input is read: all of it in this thread."""

from __future__ import annotations

import selectors
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import ChannelError, StoreError, understood
from megatron_moetion.replicate.channel import Connection, Gate, Message
from megatron_moetion.replicate.connection import NO_CUTS, SocketConnection
from megatron_moetion.store.arena import Arena, first_bytes
from megatron_moetion.store.manifest import Page
from megatron_moetion.store.spec import ArenaSpec

SPARE_BYTES = 1 << 18
"""Of the node, for arenas that a peer asks for."""


def segments(data: bytes) -> list[bytes]:
    """An input for what reads several messages: each behind its length, uint32."""
    found = []
    while len(data) >= 4:
        (size,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + size])
        data = data[4 + size :]
    return found


def joined(parts: Sequence[bytes]) -> bytes:
    """Inverse of ``segments``."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


class Image:
    """``Memory`` of the bytes of an arena."""

    has_file = True

    def __init__(self, data: bytes | Bytes, name: str) -> None:
        self.name = name
        self.array = np.array(np.frombuffer(data, dtype=np.uint8))

    @property
    def population(self) -> Any:
        raise AssertionError("nobody asks")

    def make_file_again(self) -> None:
        raise AssertionError("nobody deletes it")

    def remove(self) -> None: ...

    def close(self) -> None: ...


def new_arena(spec: ArenaSpec, page: Page, name: str) -> Arena:
    """A new arena in an ``Image``."""
    memory = Image(bytes(spec.nbytes), name)
    for start, data in first_bytes(spec, page):
        memory.array[start : start + len(data)] = np.frombuffer(data, dtype=np.uint8)
    return Arena(memory)


class Shelf:
    """As much of a ``NodeFolder`` as whoever opens and makes arenas asks for."""

    def __init__(self, images: dict[str, bytes] | None = None) -> None:
        self._images = images or {}

    def describe(self, name: str) -> str:
        return f"/store/{name}"

    def open_arena(self, name: str) -> Arena:
        return Arena(Image(self._images[name], name))

    def create_arena(self, name: str, spec: ArenaSpec, page: Page) -> Arena:
        if spec.nbytes > SPARE_BYTES:
            raise StoreError("too large")
        return new_arena(spec, page, name)

    def spare_bytes(self) -> int:
        return SPARE_BYTES

    @contextmanager
    def deciding(self, wait_s: float) -> Iterator[None]:
        yield


class Said:
    """``Connection`` to a peer that says this and no more."""

    def __init__(self, data: bytes, rank: int = 0, peer: int = 1) -> None:
        self.rank, self.peer = rank, peer
        self._data = memoryview(data)

    def send(self, parts: Sequence[Bytes], *, gate: Gate | None = None) -> None: ...

    def receive(self, parts: Sequence[Bytes], timeout_s: float | None = None) -> None:
        for part in parts:
            if part.nbytes > len(self._data):
                raise ChannelError("the peer has closed the connection")
            part[:] = np.frombuffer(self._data[: part.nbytes], dtype=np.uint8)
            self._data = self._data[part.nbytes :]

    def close(self) -> None: ...

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """As a ``Channel``."""
        for message in receives:
            self.receive([message.data])


class Served:
    """``Mesh`` that keeps the handlers it is given."""

    def __init__(self, rank: int = 0, world_size: int = 2) -> None:
        self.rank, self.world_size = rank, world_size
        self.handlers: dict[str, Callable[[Connection], None]] = {}

    def dial(self, peer: int, purpose: str, timeout_s: float) -> Connection:
        raise ChannelError("nobody is there")

    def serve(self, purpose: str, handler: Callable[[Connection], None]) -> None:
        self.handlers[purpose] = handler


class Ticks:
    """``Clock`` that moves on with each look at it."""

    def __init__(self, step_s: float = 0.001) -> None:
        self._now_s, self._step_s = 0.0, step_s

    def monotonic(self) -> float:
        self._now_s += self._step_s
        return self._now_s

    def unix_ns(self) -> int:
        return int(self.monotonic() * 1e9)

    def sleep(self, seconds: float) -> None:
        self._now_s += max(seconds, 0.0)


class Thread:
    is_current = True

    def is_alive(self) -> bool:
        return False

    def join(self, timeout: float | None = None) -> None: ...


class Event:
    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True

    def clear(self) -> None:
        self._is_set = False

    def wait(self, timeout: float | None = None) -> bool:
        self._is_set = True  # whoever waits here waits for nothing
        return True


class Threads:
    """Calls are begun when somebody waits, one after the other."""

    def __init__(self) -> None:
        self._calls: list[Callable[[], None]] = []

    def start(self, call: Callable[[], None], name: str) -> Thread:
        self._calls.append(call)
        return Thread()

    def run(self) -> None:
        while self._calls:
            self._calls.pop(0)()

    def event(self) -> Event:
        return Event()

    def lock(self) -> threading.RLock:
        return threading.RLock()

    def condition(self) -> threading.Condition:
        threads = self

        class Waited(threading.Condition):
            def wait_for(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
                threads.run()
                return predicate()

            def wait(self, timeout: float | None = None) -> bool:
                return False

        return Waited()


class Sock:
    """``Socket`` of a peer that says this, in pieces of any size, and then nothing more, or hangs up."""

    def __init__(self, data: bytes, *, hangs_up: bool) -> None:
        self._data, self._hangs_up = data, hangs_up
        self.is_open = True

    @property
    def is_ready(self) -> bool:
        return bool(self._data) or self._hangs_up

    def recv(self, bufsize: int) -> bytes:
        found, self._data = self._data[:bufsize], self._data[bufsize:]
        if not found and not self._hangs_up:
            raise BlockingIOError
        return found

    def send(self, data: Any) -> int:
        return len(data)

    def sendall(self, data: Any) -> None: ...

    def fileno(self) -> int:
        return 3 if self.is_open else -1

    def close(self) -> None:
        self.is_open = False

    def setblocking(self, flag: bool) -> None: ...

    def settimeout(self, value: float | None) -> None: ...

    def setsockopt(self, level: int, optname: int, value: int) -> None: ...

    def shutdown(self, how: int) -> None: ...


class Selector:
    """One socket that is registered with data is ready while it has something; then ``at_rest`` is called."""

    def __init__(self, at_rest: Callable[[], None]) -> None:
        self._keys: dict[int, selectors.SelectorKey] = {}
        self._at_rest = at_rest
        self._rests = 0

    def register(self, fileobj: Any, events: int, data: Any = None) -> None:
        self._keys[id(fileobj)] = selectors.SelectorKey(fileobj, 3, events, data)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> None:
        self.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> None:
        del self._keys[id(fileobj)]

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._keys[id(fileobj)]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = [key for key in self._keys.values() if key.data is not None and key.fileobj.is_ready]
        if not ready:
            self._rests += 1
            if self._rests > 5:
                self._at_rest()
        return [(key, selectors.EVENT_READ) for key in ready]

    def close(self) -> None: ...


class Kernel:
    """``Kernel`` whose sockets are ``Sock``; ``callers`` are accepted one after the other."""

    def __init__(self, callers: Sequence[Sock] = (), answers: Sequence[Sock] = ()) -> None:
        self._callers, self._answers = list(callers), list(answers)
        self.at_rest: Callable[[], None] = lambda: None

    def listen(self) -> Any:
        return self

    def getsockname(self) -> tuple[str, int]:
        return ("", 1)

    def accept(self) -> tuple[Sock, None]:
        if not self._callers:
            raise OSError("nobody calls")
        return self._callers.pop(0), None

    def close(self) -> None: ...

    def shutdown(self, how: int) -> None: ...

    def dial(self, place: tuple[str, int], timeout_s: float) -> Sock:
        if not self._answers:
            raise OSError("nobody answers")
        return self._answers.pop(0)

    def pair(self) -> tuple[Sock, Sock]:
        return Sock(b"", hangs_up=False), Sock(b"", hangs_up=False)

    def selector(self) -> Selector:
        return Selector(lambda: self.at_rest())

    def random_bytes(self, nbytes: int) -> bytes:
        return bytes(range(nbytes))

    def between(self, low: float, high: float) -> float:
        return low


class ControlMesh(Served):
    """``SocketMesh`` as the control plane uses it: one peer, which is called or calls."""

    def __init__(self, rank: int, world_size: int, threads: Threads, sock: Sock) -> None:
        super().__init__(rank, world_size)
        self.kernel = Kernel()
        self._threads, self._sock = threads, sock

    def start(self, call: Callable[[], None], name: str) -> bool:
        call()
        return True

    def dial(self, peer: int, purpose: str, timeout_s: float) -> SocketConnection:
        if not self._sock.is_open:
            raise ChannelError("nobody is there any more")
        return self.connection(peer)

    def connection(self, peer: int) -> SocketConnection:
        return SocketConnection(
            self._sock, self.rank, peer, "control", clock=Ticks(), kernel=self.kernel, progress_s=1.0,
            unsent_bytes=1 << 16, cuts=NO_CUTS,
        )  # fmt: skip


class Book:
    """``dist.Store`` that has the same under every name."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def get(self, key: str) -> bytes:
        return self._data

    def set(self, key: str, value: str) -> None: ...

    def check(self, keys: Sequence[str]) -> bool:
        return True

    def add(self, key: str, amount: int) -> int:
        return amount


class Heard:
    """``Fabric`` of two ranks, of which the other one has said this."""

    rank, world_size = 0, 2

    def __init__(self, document: Any) -> None:
        self._document = document

    def reduce(self, document: Any, combine: Callable[[Any, Any], Any]) -> Any:
        with understood("a document"):  # as ``SocketFabric`` does
            return combine(document, self._document)
