# SPDX-License-Identifier: Apache-2.0
"""Sockets between simulated processes: streams of bytes that take virtual time, and links that fail."""

from __future__ import annotations

import errno
import random
import select
import selectors
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_moetion.replicate.channel import Address
from megatron_moetion.replicate.kernel import Socket
from megatron_moetion.sim.schedule import Process, Simulator, Task

ROOM_BYTES = 64 << 10
"""Bytes that a stream takes before its reader has them."""
USER_TIMEOUT_S = 10.0
"""Bytes that do not arrive for so long end the connection, as ``TCP_USER_TIMEOUT`` does."""
_LOCAL_S, _REMOTE_S = 20e-6, 200e-6


@dataclass
class Link:
    """What goes from one node to another, in this direction."""

    is_cut: bool = False
    """Nothing arrives; it does when the link is whole again, unless the connection has ended."""
    times: int = 0
    """How often that has changed."""
    delay_s: float = 0.0
    """On top of the usual."""
    held: list[_Flight] = field(default_factory=list)


@dataclass(eq=False)
class _Flight:
    """Bytes, or the end of a stream, under way."""

    to: SimSocket
    data: bytes
    is_end: bool = False
    is_reset: bool = False


class Network:
    """All links and sockets of a simulated cluster."""

    def __init__(self, simulator: Simulator, seed: int) -> None:
        self.simulator = simulator
        self.seed = seed
        self.links: dict[tuple[int, int], Link] = {}
        self.sockets: dict[int, SimSocket] = {}
        self.listeners: dict[tuple[str, int], SimSocket] = {}
        self.most_bytes = 0
        """The most that was under way on one connection."""
        self._numbers = 0

    def link(self, source: int, target: int) -> Link:
        """From one node to another."""
        return self.links.setdefault((source, target), Link())

    def cut(self, source: int, target: int, *, is_cut: bool) -> None:
        """Cut a link, or make it whole again: what was held then arrives, in order."""
        link = self.link(source, target)
        if link.is_cut == is_cut:
            return
        link.is_cut = is_cut
        link.times += 1
        if is_cut:
            times = link.times
            self.simulator.at(self.simulator.now_s + USER_TIMEOUT_S, lambda: self._time_out(source, target, times))
        held, link.held = link.held, []
        for flight in held:
            flight.to.arrive(flight)

    def _time_out(self, source: int, target: int, times: int) -> None:
        """Nothing has got through since then: connections over this link are over, for both ends."""
        if self.link(source, target).times == times:
            for sock in list(self.sockets.values()):
                sock.lose({source, target})

    def number(self) -> int:
        """A new descriptor."""
        self._numbers += 1
        return self._numbers

    def send(self, source: SimSocket, flight: _Flight) -> None:
        """Have it arrive, after what was sent before it."""
        link = self.link(source.node, flight.to.node)
        usual_s = _LOCAL_S if source.node == flight.to.node else _REMOTE_S
        now_s = self.simulator.now_s
        at_s = now_s + usual_s * source.chance.uniform(1.0, 3.0) + link.delay_s
        source.arrives_s = max(at_s, source.arrives_s)
        self.simulator.at(source.arrives_s, lambda: self._deliver(link, flight))

    def _deliver(self, link: Link, flight: _Flight) -> None:
        if link.is_cut:
            link.held.append(flight)
        else:
            flight.to.arrive(flight)


class SimSocket:
    """``Socket``: one end of a connection, or a listener."""

    def __init__(self, network: Network, node: int, process: Process) -> None:
        self._network = network
        self._simulator = network.simulator
        self.node = node
        self._process = process
        self._number = network.number()
        network.sockets[self._number] = self
        self.chance = random.Random(network.seed * 1_000_003 + self._number)
        self.peer_of: SimSocket | None = None
        self.arrives_s = 0.0
        self._inbox = bytearray()
        self._under_way = 0
        """Bytes sent that the peer's process has not read."""
        self._is_over = False
        """The peer sends no more."""
        self._error: int = 0
        self._is_closed = False
        self._is_shut = False
        self._timeout_s: float | None = None
        self._watching: list[Task] = []
        self.is_listening = False
        self.place: tuple[str, int] = ("", 0)
        self._callers: deque[SimSocket] = deque()
        process.at_death.append(self._die)

    # -- for the network -------------------------------------------------------------------------------

    def arrive(self, flight: _Flight) -> None:
        """Bytes of the peer are here."""
        if self._is_closed:
            if flight.data and self.peer_of is not None:
                self._tell(_Flight(to=self.peer_of, data=b"", is_reset=True))
            return
        if flight.is_reset:
            self._error = errno.ECONNRESET
        self._is_over |= flight.is_end
        self._inbox += flight.data
        self._wake()

    def lose(self, nodes: set[int]) -> None:
        """This end hears nothing of the other any more, where the two are on these nodes."""
        if self.peer_of is not None and {self.node, self.peer_of.node} == nodes:
            self._error = errno.ETIMEDOUT
            self._wake()

    def reset(self) -> None:
        """Somebody in between ends the connection, for both."""
        for end in (self, self.peer_of):
            if end is not None and not end._is_closed:
                end._error = errno.ECONNRESET
                end._wake()

    def is_between(self, nodes: tuple[int, int] | None) -> bool:
        """Whether it is one end of a connection, between these nodes where two are named."""
        if self.peer_of is None or self._is_closed or self.peer_of._process is self._process:
            return False
        return nodes is None or {self.node, self.peer_of.node} == {*nodes}

    def connect(self, peer: SimSocket) -> None:
        """The two are a connection."""
        self.peer_of, peer.peer_of = peer, self

    def queue(self, caller: SimSocket) -> None:
        """Somebody has dialled this listener."""
        self._callers.append(caller)
        self._wake()

    def _wake(self) -> None:
        for task in self._watching:
            self._simulator.wake(task)

    def _die(self) -> None:
        """The process has ended: the kernel closes the socket."""
        self._close()

    def _tell(self, flight: _Flight) -> None:
        self._network.send(self, flight)

    # -- readiness -------------------------------------------------------------------------------------

    @property
    def can_read(self) -> bool:
        """Whether a read would not block."""
        return bool(self._inbox or self._is_over or self._error or self._callers or self._is_shut)

    @property
    def can_write(self) -> bool:
        """Whether a write would not block."""
        return bool(self._error) or self._is_shut or self._under_way < ROOM_BYTES

    def watch(self, task: Task) -> None:
        """Wake this thread when anything changes."""
        self._watching.append(task)

    def unwatch(self, task: Task) -> None:
        """Undo ``watch``."""
        self._watching.remove(task)

    # -- Socket ----------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """See ``Socket``."""
        return -1 if self._is_closed else self._number

    def setblocking(self, flag: bool, /) -> None:
        """See ``Socket``."""
        self._timeout_s = None if flag else 0.0

    def settimeout(self, value: float | None, /) -> None:
        """See ``Socket``."""
        self._timeout_s = value

    def setsockopt(self, level: int, optname: int, value: int, /) -> None:
        """See ``Socket``: nothing that a simulation has."""

    def getsockname(self) -> Any:
        """See ``Socket``."""
        return self.place

    def accept(self) -> tuple[SimSocket, Any]:
        """See ``Socket``."""
        self._wait(lambda: bool(self._callers or self._is_shut), "a caller")
        if self._is_shut or not self._callers:
            raise OSError(errno.EINVAL, "the listener was shut down")
        return self._callers.popleft(), ("", 0)

    def recv(self, bufsize: int, /) -> bytes:
        """See ``Socket``."""
        self._await_bytes()
        found = bytes(self._inbox[:bufsize])
        self._took(len(found))
        return found

    def recvmsg_into(self, buffers: Sequence[memoryview], /) -> tuple[int, Any, int, Any]:
        """See ``Socket``."""
        self._await_bytes()
        done = 0
        for view in buffers:
            part = self._inbox[done : done + len(view)]
            view.cast("B")[: len(part)] = part
            done += len(part)
            if len(part) < len(view):
                break
        self._took(done)
        return done, [], 0, None

    def send(self, data: Any, /) -> int:
        """See ``Socket``."""
        return self.sendmsg([memoryview(data)])

    def sendall(self, data: Any, /) -> None:
        """See ``Socket``."""
        rest = bytes(data)
        while rest:
            self._wait(lambda: self.can_write, "room to send")
            rest = rest[self.sendmsg([memoryview(rest)]) :]

    def sendmsg(self, buffers: Sequence[memoryview], /) -> int:
        """See ``Socket``."""
        self._check()
        if self._error:
            raise OSError(self._error, "the connection is lost")
        if self._is_shut or self.peer_of is None:
            raise BrokenPipeError(errno.EPIPE, "the connection is closed")
        room = ROOM_BYTES - self._under_way
        if room <= 0:
            raise BlockingIOError(errno.EAGAIN, "no room")
        data = b"".join(bytes(view) for view in buffers)[:room]
        self._under_way += len(data)
        self._network.most_bytes = max(self._network.most_bytes, self._under_way)
        self._tell(_Flight(to=self.peer_of, data=data))
        return len(data)

    def shutdown(self, how: int, /) -> None:
        """See ``Socket``."""
        if self._is_closed or self._process.is_dead:
            return
        if self.peer_of is not None and not self._is_shut:
            self._tell(_Flight(to=self.peer_of, data=b"", is_end=True))
        self._is_shut = True
        self._wake()

    def close(self) -> None:
        """See ``Socket``."""
        if not self._process.is_dead:
            self._close()

    def _close(self) -> None:
        if self._is_closed:
            return
        if self.peer_of is not None and not self._is_shut:
            self._tell(_Flight(to=self.peer_of, data=b"", is_end=True))
        self._is_closed = self._is_shut = True
        self._network.sockets.pop(self._number, None)
        if self._network.listeners.get(self.place) is self:
            del self._network.listeners[self.place]
        if self.is_listening:
            for caller in self._callers:
                caller._close()
        self._wake()

    def _took(self, nbytes: int) -> None:
        del self._inbox[:nbytes]
        peer = self.peer_of
        if peer is not None and nbytes:
            peer._under_way -= nbytes
            peer._wake()

    def _await_bytes(self) -> None:
        self._wait(lambda: bool(self._inbox or self._is_over or self._error or self._is_shut), "bytes")
        if not self._inbox and self._error:
            raise OSError(self._error, "the connection is lost")

    def _wait(self, is_ready: Any, what: str) -> None:
        """As the socket's timeout says."""
        self._check()
        until_s = None if self._timeout_s is None else self._simulator.now_s + self._timeout_s
        while not is_ready():
            if until_s is not None and self._simulator.now_s >= until_s:
                if not self._timeout_s:
                    raise BlockingIOError(errno.EAGAIN, f"no {what}")
                raise TimeoutError(f"no {what} in time")
            self._block(what, until_s)
        if self._is_closed:
            raise OSError(errno.EBADF, "the socket is closed")

    def _block(self, what: str, until_s: float | None) -> None:
        me = self._simulator.current
        self._watching.append(me)
        try:
            self._simulator.block(what, until_s)
        finally:
            self._watching.remove(me)

    def _check(self) -> None:
        self._simulator.check()
        if self._is_closed:
            raise OSError(errno.EBADF, "the socket is closed")


class SimSelector(selectors.BaseSelector):
    """``selectors.DefaultSelector`` over simulated sockets; keyed by descriptor."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._keys: dict[int, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """See ``selectors.BaseSelector``."""
        number = fileobj.fileno()
        if number < 0:
            raise ValueError("a closed socket")
        if number in self._keys:
            raise KeyError("it is registered already")
        key = self._keys[number] = selectors.SelectorKey(fileobj, number, events, data)
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """See ``selectors.BaseSelector``."""
        number = next(n for n, key in self._keys.items() if key.fileobj is fileobj)
        return self._keys.pop(number)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """See ``selectors.BaseSelector``."""
        self.unregister(fileobj)
        return self.register(fileobj, events, data)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See ``selectors.BaseSelector``."""
        simulator = self._network.simulator
        simulator.check()
        until_s = None if timeout is None else simulator.now_s + timeout
        while not (found := list(self._ready())):
            if until_s is not None and simulator.now_s >= until_s:
                break
            sockets = [s for n in self._keys if (s := self._network.sockets.get(n)) is not None]
            for sock in sockets:
                sock.watch(simulator.current)
            try:
                simulator.block("a socket", until_s)
            finally:
                for sock in sockets:
                    sock.unwatch(simulator.current)
        return found

    def _ready(self) -> Iterator[tuple[selectors.SelectorKey, int]]:
        for number, key in self._keys.items():
            sock = self._network.sockets.get(number)
            if sock is None:
                continue
            events = (selectors.EVENT_READ if sock.can_read else 0) | (selectors.EVENT_WRITE if sock.can_write else 0)
            if events & key.events:
                yield key, events & key.events

    def close(self) -> None:
        """See ``selectors.BaseSelector``."""
        self._keys.clear()

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        """See ``selectors.BaseSelector``."""
        return next(key for key in self._keys.values() if key.fileobj is fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """See ``selectors.BaseSelector``."""
        return self._keys


class SimKernel:
    """``Kernel`` of one process on one node."""

    def __init__(self, network: Network, node: int, process: Process, seed: int) -> None:
        self._network = network
        self._simulator = network.simulator
        self._node = node
        self._process = process
        self._chance = random.Random(seed)

    def address(self, wanted: str, master: str, *, is_one_host: bool, setting: str) -> Address:
        """See ``Kernel``."""
        return Address(interface="sim0", host=f"node{self._node}")

    def listen(self) -> Socket:
        """See ``Kernel``."""
        self._simulator.check()
        sock = SimSocket(self._network, self._node, self._process)
        sock.is_listening = True
        sock.place = (f"node{self._node}", sock.fileno())
        self._network.listeners[sock.place] = sock
        return sock

    def dial(self, place: tuple[str, int], timeout_s: float) -> Socket:
        """See ``Kernel``."""
        simulator = self._simulator
        simulator.check()
        target = int(place[0].removeprefix("node"))
        until_s = simulator.now_s + timeout_s
        ways = [self._network.link(self._node, target), self._network.link(target, self._node)]
        asked_s = simulator.now_s + sum(link.delay_s for link in ways) + _REMOTE_S
        while simulator.now_s < asked_s or any(link.is_cut for link in ways):
            if simulator.now_s >= until_s:
                raise TimeoutError(f"{place} does not answer")
            simulator.block(f"{place} to answer", min(until_s, max(asked_s, simulator.now_s + 0.01)))
        listener = self._network.listeners.get((place[0], place[1]))
        if listener is None:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens at {place}")
        mine = SimSocket(self._network, self._node, self._process)
        theirs = SimSocket(self._network, target, listener._process)
        mine.connect(theirs)
        listener.queue(theirs)
        mine.settimeout(timeout_s)
        return mine

    def pair(self) -> tuple[Socket, Socket]:
        """See ``Kernel``."""
        one, other = (SimSocket(self._network, self._node, self._process) for _ in range(2))
        one.connect(other)
        return one, other

    def selector(self) -> selectors.BaseSelector:
        """See ``Kernel``."""
        return SimSelector(self._network)

    def wait(self, sock: Socket, event: int, timeout_s: float) -> bool:
        """See ``Kernel``."""
        assert isinstance(sock, SimSocket)
        simulator = self._simulator
        simulator.check()
        until_s = simulator.now_s + timeout_s

        def is_ready() -> bool:
            wants_in, wants_out = event & select.POLLIN, event & select.POLLOUT
            return bool((wants_in and sock.can_read) or (wants_out and sock.can_write) or sock.fileno() < 0)

        while not is_ready():
            if simulator.now_s >= until_s:
                return False
            sock._block("a socket", until_s)
        return True

    def random_bytes(self, nbytes: int) -> bytes:
        """See ``Kernel``."""
        return self._chance.randbytes(nbytes)

    def between(self, low: float, high: float) -> float:
        """See ``Kernel``."""
        return self._chance.uniform(low, high)
