# SPDX-License-Identifier: Apache-2.0
"""``Channel`` over connections of pairs, each dialled by the lower rank when the two first exchange something."""

from __future__ import annotations

import selectors
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from megatron_moetion.clock import Clock
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Connection, Message
from megatron_moetion.replicate.connection import SocketConnection
from megatron_moetion.replicate.sockets import SocketMesh
from megatron_moetion.replicate.worker import Threads

PURPOSE = "exchange"
_CHUNK_BYTES = 8 << 20


class SocketChannel:
    """See ``Channel``. One thread moves all bytes of an exchange; what is in flight is bounded by the kernel."""

    def __init__(self, mesh: SocketMesh, *, timeout_s: float, clock: Clock, threads: Threads) -> None:
        self._mesh = mesh
        self._timeout_s = timeout_s
        self._clock = clock
        self._arrived = threads.condition()
        self._connections: dict[int, SocketConnection] = {}
        mesh.serve(PURPOSE, self._welcome)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See ``Channel``."""
        peers = sorted({m.peer for m in [*sends, *receives] if m.data.nbytes})
        connections = {peer: self._connection(peer) for peer in peers}
        leaving = [replace(m, data=part) for m in sends if m.data.nbytes for part in connections[m.peer].cut([m.data])]
        out, into = _by_peer(leaving), _by_peer(receives)
        with ExitStack() as stack:
            for connection in connections.values():
                stack.enter_context(connection.in_use("exchange with"))
            try:
                self._move(connections, out, into)
            except OSError as error:
                late = [p for p in peers if out.get(p) or into.get(p)]
                raise ChannelError(f"transfer with rank(s) {late} failed: {error}") from error

    def _move(
        self,
        connections: Mapping[int, SocketConnection],
        out: Mapping[int, deque[memoryview]],
        into: Mapping[int, deque[memoryview]],
    ) -> None:
        with self._mesh.kernel.selector() as selector:
            for peer, connection in connections.items():
                _watch(selector, connection, out.get(peer), into.get(peer))
            while selector.get_map():
                found = selector.select(self._timeout_s)
                if not found:
                    raise TimeoutError(f"nothing moved for {self._timeout_s:g} s")
                for key, events in found:
                    connection, peer = connections[key.data], key.data
                    if events & selectors.EVENT_READ:
                        _advance(into[peer], connection.receive_some([into[peer][0][:_CHUNK_BYTES]]))
                    if events & selectors.EVENT_WRITE:
                        _advance(out[peer], connection.send_some([out[peer][0][:_CHUNK_BYTES]]))
                    _watch(selector, connection, out.get(peer), into.get(peer))

    def close(self) -> None:
        """Let go of every peer."""
        for connection in list(self._connections.values()):
            connection.close()

    def _connection(self, peer: int) -> SocketConnection:
        if self._mesh.rank < peer and peer not in self._connections:
            self._connections[peer] = self._mesh.dial(peer, PURPOSE, self._timeout_s)
        with self._arrived:
            if not self._arrived.wait_for(lambda: peer in self._connections, self._timeout_s):
                raise ChannelError(f"transfer with rank(s) [{peer}] failed: no word for {self._timeout_s:g} s")
            return self._connections[peer]

    def _welcome(self, connection: Connection) -> None:
        """A lower rank has dialled; the connection is the channel's from now on."""
        assert isinstance(connection, SocketConnection)
        with self._arrived:
            self._connections[connection.peer] = connection.handed_over()
            self._arrived.notify_all()


def _watch(
    selector: selectors.BaseSelector,
    connection: SocketConnection,
    out: deque[memoryview] | None,
    into: deque[memoryview] | None,
) -> None:
    """Wait for what this connection still has to do."""
    wanted = (selectors.EVENT_WRITE if out else 0) | (selectors.EVENT_READ if into else 0)
    is_known = connection.fileno() in selector.get_map()
    if wanted and is_known:
        if selector.get_key(connection).events != wanted:
            selector.modify(connection, wanted, connection.peer)
    elif wanted:
        selector.register(connection, wanted, connection.peer)
    elif is_known:
        selector.unregister(connection)


def _by_peer(messages: Sequence[Message]) -> dict[int, deque[memoryview]]:
    found: dict[int, deque[memoryview]] = {}
    for message in messages:
        if message.data.nbytes:
            found.setdefault(message.peer, deque()).append(message.data.data)
    return found


def _advance(views: deque[memoryview], nbytes: int) -> None:
    if nbytes < len(views[0]):
        views[0] = views[0][nbytes:]
    else:
        views.popleft()
