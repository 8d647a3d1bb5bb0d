# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from fabrics import Fabrics, Faults, eventually, loopback_fabrics
from support import together
from torch import distributed as dist

from megatron_moetion.clock import SystemClock
from megatron_moetion.errors import ChannelError, ConfigError
from megatron_moetion.replicate import addresses, sockets
from megatron_moetion.replicate.addresses import Directory, job_store, own_address
from megatron_moetion.replicate.channel import Address, Connection, Mesh
from megatron_moetion.replicate.sockets import SocketMesh
from megatron_moetion.replicate.worker import SystemThreads


class OpenGate:
    """Lets everything through and counts it."""

    def __init__(self) -> None:
        self.admitted: list[int] = []
        self.left_bytes = 0

    def slice_bytes(self) -> int:
        return 1 << 14

    def in_flight_bytes(self) -> int:
        return 1 << 15

    def admit(self, nbytes: int) -> None:
        self.admitted.append(nbytes)

    def left(self, nbytes: int, posted_s: float) -> None:
        assert posted_s <= time.monotonic()
        self.left_bytes += nbytes


def content(seed: int, nbytes: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


def empty(nbytes: int) -> Any:
    return np.zeros(nbytes, dtype=np.uint8)


@pytest.fixture
def pair() -> Iterator[Fabrics]:
    with loopback_fabrics(2, progress_s=0.5) as fabrics:
        yield fabrics


def connected(fabrics: Fabrics, purpose: str = "test") -> tuple[Connection, Connection, Callable[[], None]]:
    """Both ends of a new connection from rank 0 to rank 1, and what lets the handler at rank 1 return."""
    there: list[Connection] = []
    arrived, done = threading.Event(), threading.Event()

    def handle(connection: Connection) -> None:
        there.append(connection)
        arrived.set()
        done.wait(20)

    fabrics[1].mesh.serve(purpose, handle)
    here = fabrics[0].mesh.dial(1, purpose, 5.0)
    assert arrived.wait(5)
    return here, there[0], done.set


# -- a connection --------------------------------------------------------------------------------------------


def test_parts_arrive_in_order_however_they_are_cut(pair: Fabrics) -> None:
    here, there, done = connected(pair)
    assert (here.peer, there.peer) == (1, 0)
    sizes = [0, 1, 7, 70_000, 0, 3_000_000, 5]
    sent = [content(n, size) for n, size in enumerate(sizes)]
    whole = np.concatenate(sent)
    got = [empty(1_000_000), empty(0), empty(whole.nbytes - 1_000_000)]
    together(lambda: here.send(sent), lambda: there.receive(got))
    assert (np.concatenate(got) == whole).all()
    many = [content(n, 3) for n in range(5000)]  # more than the kernel takes in one call
    got = [empty(3) for _ in many]
    together(lambda: there.send(many), lambda: here.receive(got))
    assert all((a == b).all() for a, b in zip(many, got, strict=True))
    done()


def test_both_ends_send_and_receive_at_once(pair: Fabrics) -> None:
    here, there, done = connected(pair)
    mine, theirs = content(1, 5_000_000), content(2, 5_000_000)
    got, got_there = empty(5_000_000), empty(5_000_000)
    together(
        lambda: here.send([mine]),
        lambda: here.receive([got]),
        lambda: there.send([theirs]),
        lambda: there.receive([got_there]),
    )
    assert (got == theirs).all()
    assert (got_there == mine).all()
    done()


def test_a_gate_is_asked_for_every_slice(pair: Fabrics) -> None:
    here, there, done = connected(pair)
    gate = OpenGate()
    sent = [content(1, 10_000), content(2, 100_000)]
    got = empty(110_000)
    together(lambda: here.send(sent, gate=gate), lambda: there.receive([got]))
    assert (got == np.concatenate(sent)).all()
    assert gate.admitted == [1 << 14] * 6 + [110_000 - 6 * (1 << 14)]
    assert gate.left_bytes == 110_000
    done()


def test_little_waits_in_the_kernel_while_the_peer_reads_nothing() -> None:
    """The gate is told that a slice has left only when TCP has taken what was before it."""
    with loopback_fabrics(2, progress_s=0.3) as pair:
        here, _, done = connected(pair)
        gate = OpenGate()
        with pytest.raises(ChannelError, match=r"cannot send to rank\(s\) \[1\]: nothing moved for 0.3 s"):
            here.send([empty(64 << 20)], gate=gate)
        assert 0 < gate.left_bytes < 16 << 20  # the windows of both kernels
        done()


def test_a_receiver_waits_as_long_as_it_says(pair: Fabrics) -> None:
    here, there, done = connected(pair)
    sender = threading.Timer(1.0, lambda: there.send([content(1, 10)]))
    sender.start()
    got = empty(10)
    here.receive([got], timeout_s=10.0)
    assert (got == content(1, 10)).all()
    sender.join()
    there.send([empty(3)])
    with pytest.raises(ChannelError, match=r"cannot receive from rank\(s\) \[1\]: nothing moved for 0.5 s"):
        here.receive([empty(10)])
    with pytest.raises(ChannelError, match="the connection is closed"):
        here.send([empty(1)])
    done()


def test_closing_wakes_whoever_waits_here_and_there(pair: Fabrics) -> None:
    here, there, done = connected(pair)

    def wait(connection: Connection) -> None:
        with pytest.raises(ChannelError):
            connection.receive([empty(1)], timeout_s=60.0)

    closing = threading.Timer(0.1, here.close)
    closing.start()
    together(lambda: wait(here), lambda: wait(there))
    here.close()
    there.close()
    done()


def test_faults_act_on_a_purpose(pair: Fabrics) -> None:
    faults = Faults()
    with loopback_fabrics(2, cuts=faults) as fabrics:
        here, there, done = connected(fabrics)
        faults.flip(1, rank=0, peer=1, purpose="test")
        here.send([np.array([1, 2], dtype=np.uint8)])
        got = empty(2)
        there.receive([got])
        assert got.tolist() == [1, 3]
        faults.reset(1, purpose="test")
        with pytest.raises(ChannelError, match="reset"):
            here.send([empty(1)])
        with pytest.raises(ChannelError):
            there.receive([empty(1)])
        done()


# -- a mesh --------------------------------------------------------------------------------------------------


def test_a_purpose_that_is_served_later_is_reached_then(pair: Fabrics) -> None:
    later = threading.Timer(0.3, lambda: pair[1].mesh.serve("late", lambda c: c.send([content(4, 4)])))
    later.start()
    got = empty(4)
    pair[0].mesh.dial(1, "late", 20.0).receive([got])
    assert (got == content(4, 4)).all()
    later.join()


def test_nobody_serves_this(pair: Fabrics) -> None:
    with pytest.raises(ChannelError, match=r"rank\(s\) \[1\] cannot be reached"):
        pair[0].mesh.dial(1, "nothing", 0.2)


def test_a_rank_that_has_gone_is_not_reached(pair: Fabrics) -> None:
    pair[0].mesh.serve("x", lambda c: None)
    pair[0].abandon()
    with pytest.raises(ChannelError, match=r"rank\(s\) \[0\] cannot be reached"):
        pair[1].mesh.dial(0, "x", 0.2)


def test_a_handler_that_fails_closes_its_connection_and_no_other(
    pair: Fabrics, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(connection: Connection) -> None:
        raise ZeroDivisionError

    pair[1].mesh.serve("broken", fail)
    here, there, done = connected(pair)
    with pytest.raises(ChannelError):
        pair[0].mesh.dial(1, "broken", 5.0).receive([empty(1)])
    assert "serving 'broken' to rank 0" in caplog.text
    together(lambda: here.send([empty(1)]), lambda: there.receive([empty(1)]))
    done()


def mesh_of(rank: int, store: dist.Store, **options: float) -> tuple[SocketMesh, Directory]:
    clock = SystemClock()
    directory = Directory(store, rank, clock)
    mesh = SocketMesh(rank, 2, directory, clock=clock, threads=SystemThreads(), **options)
    directory.join("127.0.0.1", mesh.port, 1, 5.0, token=os.urandom(32))
    return mesh, directory


def hello(token: bytes, challenge: bytes, *, magic: bytes = sockets.MAGIC, source: int = 0, target: int = 1) -> bytes:
    text = struct.pack("<8sII16sB", magic, source, target, bytes(16), 1) + b"x"
    return text + hmac.digest(token, challenge + text, hashlib.sha256)


def challenge_of(caller: socket.socket) -> bytes:
    found = b""
    while len(found) < 16:
        found += caller.recv(16 - len(found))
    return found


@pytest.mark.parametrize(
    "wrong",
    [
        {"magic": b"MOETNET0"},
        {"source": 2},
        {"target": 0},
        {"token": bytes(32)},
        {"challenge": bytes(16)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_a_wrong_hello_is_closed_at_once_and_the_right_one_answered(wrong: dict[str, Any]) -> None:
    store = dist.HashStore()
    first, directory = mesh_of(0, store)
    second, _ = mesh_of(1, store)
    second.serve("x", lambda connection: connection.send([np.array([42], dtype=np.uint8)]))
    try:
        for settings, answers in (({"token": directory.token, **wrong}, False), ({"token": directory.token}, True)):
            with socket.create_connection(("127.0.0.1", second.port), timeout=5) as caller:
                caller.sendall(hello(**{"challenge": challenge_of(caller), **settings}))
                answer = b""
                with suppress(ConnectionResetError):
                    while part := caller.recv(100):
                        answer += part
            assert len(answer) == (33 if answers else 0)
        got = empty(1)
        first.dial(1, "x", 5.0).receive([got])
        assert got.tolist() == [42]
    finally:
        first.close()
        second.close()


def test_a_stranger_that_says_nothing_is_let_go_and_holds_up_nobody() -> None:
    store = dist.HashStore()
    first, _ = mesh_of(0, store)
    second, _ = mesh_of(1, store, hello_s=0.2)
    second.serve("x", lambda connection: connection.receive([empty(1)]))
    with socket.create_connection(("127.0.0.1", second.port), timeout=5) as stranger:
        first.dial(1, "x", 5.0).send([empty(1)])
        challenge_of(stranger)
        assert stranger.recv(1) == b""
    first.close()
    second.close()


def test_somebody_else_at_a_ranks_address_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "_RETRY_S", (20.0, 20.0))  # the stranger answers once
    store = dist.HashStore()
    mesh, _ = mesh_of(0, store)
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        Directory(store, 1, SystemClock()).join("127.0.0.1", stranger.getsockname()[1], 1, 5.0, token=b"")

        def answer() -> None:
            caller, _ = stranger.accept()
            with caller:
                caller.sendall(bytes(16))
                caller.recv(1000)
                caller.sendall(bytes(32))

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ChannelError, match="somebody else answers there"):
            mesh.dial(1, "x", 5.0)
    mesh.close()


def test_all_threads_end_with_their_fabric() -> None:
    before = threading.active_count()
    fabrics = loopback_fabrics(3)
    connected(fabrics)[2]()
    together(*(lambda f=f: f.gather(1) for f in fabrics))
    fabrics[0].abandon()
    fabrics.close()
    eventually(lambda: threading.active_count() == before)


# -- addresses -----------------------------------------------------------------------------------------------


class CountingStore:
    """A store that counts what is asked of it."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.requests = 0

    def __getattr__(self, name: str) -> Any:
        self.requests += 1
        return getattr(self.store, name)


def test_a_rank_asks_the_store_a_handful_of_times_and_twice_for_each_peer() -> None:
    store: Any = CountingStore()
    first = Directory(store, 0, SystemClock())
    first.join("10.0.0.1", 1, 8, 5.0, token=bytes(32))
    assert store.requests == 3
    second = Directory(store, 1, SystemClock())
    job = second.join("10.0.0.2", 2, 99, 5.0, token=b"another")
    assert store.requests == 3 + 4
    assert (job.ranks_per_host, job.token) == (8, first.token)
    for _ in range(3):
        assert second.find(0, 5.0) == ("10.0.0.1", 1)
    assert store.requests == 7 + 2


def test_a_second_fabric_on_the_same_store_finds_its_own_ranks() -> None:
    store = dist.HashStore()
    for port in (1, 2):
        first, second = (Directory(store, rank, SystemClock()) for rank in range(2))
        first.join("a", port, 1, 5.0, token=b"")
        second.join("b", 10 * port, 1, 5.0, token=b"")
        assert first.find(1, 5.0) == ("b", 10 * port)


def test_a_rank_that_never_comes_is_waited_for_in_vain() -> None:
    directory = Directory(dist.HashStore(), 1, SystemClock())
    with pytest.raises(ChannelError, match=r"rank 0 has not said within 0.05 s where it listens"):
        directory.join("a", 1, 1, 0.05, token=b"")


def test_a_store_that_is_lost_is_a_channel_error() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    directory = Directory(client, 0, SystemClock())
    del server
    with pytest.raises(ChannelError, match="the rendezvous store does not answer"):
        directory.find(1, 5.0)


def test_without_a_group_the_launchers_store_is_asked() -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_RESTART_COUNT": "3"}
    job_store(environment).set("key", "value")
    assert server.get("moetion/attempt3/key") == b"value"
    with pytest.raises(ChannelError, match="no rendezvous store"):
        job_store({})


def test_the_address_is_that_of_the_named_interface_or_of_the_route(monkeypatch: pytest.MonkeyPatch) -> None:
    loopback = Address(interface="lo", host="127.0.0.1")
    address = partial(own_address, setting="--moetion-network-interface")
    assert address("nothere0, lo", "", is_one_host=False) == loopback
    assert address("", "", is_one_host=True) == loopback
    found = address("", "127.0.0.1", is_one_host=False).host
    socket.inet_pton(socket.AF_INET6 if ":" in found else socket.AF_INET, found)
    there = {"eth10": ["10.0.0.3"], "eth1": ["10.0.0.2", "fd00::2"], "lo": ["127.0.0.1"]}
    monkeypatch.setattr(addresses, "_interfaces", lambda: there)
    assert address("eth", "", is_one_host=True) == Address(interface="eth1", host="10.0.0.2")
    assert address("ib,eth10,eth1", "", is_one_host=True) == Address(interface="eth10", host="10.0.0.3")
    says = r"--moetion-network-interface is 'ib', and no interface .*; there are eth1 \(10.0.0.2, fd00::2\), eth10"
    with pytest.raises(ConfigError, match=says):
        address("ib", "", is_one_host=True)


MESH: type[Mesh] = SocketMesh
