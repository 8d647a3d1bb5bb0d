# SPDX-License-Identifier: Apache-2.0
"""The default fabric: TCP between the pairs of ranks that need each other, and trees for all that concerns many."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

from torch import distributed as dist

from megatron_moetion.clock import Clock
from megatron_moetion.config import flag_of
from megatron_moetion.errors import ChannelError, understood
from megatron_moetion.replicate.addresses import Directory
from megatron_moetion.replicate.channel import Address, Channel, Combine, Connection, Mesh, Message
from megatron_moetion.replicate.connection import NO_CUTS, PROGRESS_S, UNSENT_BYTES, Cuts
from megatron_moetion.replicate.control import HEARTBEAT_S, Control
from megatron_moetion.replicate.exchange import SocketChannel
from megatron_moetion.replicate.kernel import SYSTEM_KERNEL, Kernel
from megatron_moetion.replicate.reducer import TreeReducer
from megatron_moetion.replicate.sockets import SocketMesh
from megatron_moetion.replicate.tree import ARITY
from megatron_moetion.replicate.worker import Threads

TOKEN_BYTES = 32
"""Of what keeps jobs apart that share a network."""
_COLLECTIVES_KEPT = 4
"""Collective calls without a result that are remembered: a rank that timed out in more than these gives them up."""


class SocketFabric:
    """``Fabric`` over TCP. Made by ``connect``. A job of one rank has no sockets."""

    @classmethod
    def connect(
        cls,
        *,
        store: dist.Store,
        rank: int,
        world_size: int,
        ranks_per_host: int,
        timeout_s: float,
        in_flight_bytes: int,
        clock: Clock,
        threads: Threads,
        interface: str = "",
        interface_setting: str = flag_of("moetion_network_interface"),
        master: str = "",
        kernel: Kernel = SYSTEM_KERNEL,
        cuts: Cuts = NO_CUTS,
        heartbeat_s: float = HEARTBEAT_S,
        arity: int = ARITY,
        progress_s: float = PROGRESS_S,
    ) -> SocketFabric:
        """Listen, and join the ranks of this store: all of them call this equally often. Waits for rank 0 only.

        ``ranks_per_host`` is rank 0's to say. ``interface`` says which network interface's address the others get, and
        ``interface_setting`` where it was set: see ``own_address``. Without one the route to ``master``, the host of
        the rendezvous, decides. ``in_flight_bytes``: at most so much waits in the kernel to be taken by TCP.
        ``ChannelError`` where rank 0 or the store does not answer within ``timeout_s``; ``ConfigError`` where there is
        no such interface.
        """
        if world_size == 1:
            control = Control(None, rank, ranks_per_host=1, clock=clock, threads=threads)
            return cls(rank, 1, AloneMesh(), AloneChannel(), control, timeout_s, (), Address(interface="", host=""))
        is_one_host = world_size <= ranks_per_host
        address = kernel.address(interface, master, is_one_host=is_one_host, setting=interface_setting)
        directory = Directory(store, rank, clock)
        mesh = SocketMesh(
            rank,
            world_size,
            directory,
            clock=clock,
            threads=threads,
            kernel=kernel,
            progress_s=min(timeout_s, progress_s),
            unsent_bytes=min(UNSENT_BYTES, in_flight_bytes),
            cuts=cuts,
        )
        try:
            token = kernel.random_bytes(TOKEN_BYTES)
            job = directory.join(address.host, mesh.port, ranks_per_host, timeout_s, token=token)
            control = Control(
                mesh,
                rank,
                ranks_per_host=job.ranks_per_host,
                clock=clock,
                threads=threads,
                heartbeat_s=heartbeat_s,
                arity=arity,
                cuts=cuts,
            )
        except BaseException:
            mesh.close()
            raise
        channel = SocketChannel(mesh, timeout_s=timeout_s, clock=clock, threads=threads)
        return cls(rank, world_size, mesh, channel, control, timeout_s, (channel.close, mesh.close), address)

    def __init__(
        self,
        rank: int,
        world_size: int,
        mesh: Mesh,
        channel: Channel,
        control: Control,
        timeout_s: float,
        closing: Sequence[Callable[[], None]],
        address: Address,
    ) -> None:
        """``closing`` lets go of what lies below, in this order; nothing of it waits for others."""
        self.rank = rank
        self.world_size = world_size
        self.mesh = mesh
        self.channel = channel
        self.address = address
        self._control = control
        self._timeout_s = timeout_s
        self._closing = closing
        self._calls = 0
        self._merges: dict[int, Callable[[Sequence[bytes]], bytes]] = {}
        self._tree = control.join("collective", range(world_size), self._merge, kept=_COLLECTIVES_KEPT, is_watched=True)

    def gather(self, document: Any) -> list[Any]:
        """See ``Fabric``."""
        found = self._collective(b"g", document, b",".join)
        with understood("documents of all ranks"):
            return list(json.loads(b"[" + found + b"]"))

    def reduce(self, document: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """See ``Fabric``."""

        def merge(bodies: Sequence[bytes]) -> bytes:
            with understood("a document to combine"):
                return json.dumps(reduce(combine, (json.loads(body) for body in bodies))).encode()

        found = self._collective(b"r", document, merge)
        with understood("a document of all ranks"):
            return json.loads(found)

    def reducer(self, name: str, members: Sequence[int], combine: Combine) -> TreeReducer:
        """See ``Fabric``."""
        return TreeReducer(self._control, name, members, combine)

    def silent(self) -> Mapping[int, float]:
        """See ``Fabric``."""
        return self._control.silent()

    def abandon(self) -> None:
        """See ``Fabric``."""
        self._control.abandon()
        for close in self._closing:
            close()

    def close(self) -> None:
        """See ``Fabric``. What was said leaves first, within a bounded time."""
        self._control.close()
        for close in self._closing:
            close()

    def _collective(self, kind: bytes, document: Any, merge: Callable[[Sequence[bytes]], bytes]) -> bytes:
        """One round of the tree of all ranks. The n-th call of each rank belongs together, also after one that failed.

        One byte ``kind`` goes before each body: ranks that call different things at once are out of step.
        """
        number = self._calls
        self._calls += 1

        def merge_same(payloads: Sequence[bytes]) -> bytes:
            if len(kinds := {p[:1] for p in payloads}) > 1:
                raise ChannelError(f"ranks make different collective calls at once: {sorted(kinds)}")
            return kind + merge([p[1:] for p in payloads])

        self._merges = {n: m for n, m in self._merges.items() if n > number - 2 * _COLLECTIVES_KEPT}
        self._merges[number] = merge_same
        self._tree.contribute(number, kind + json.dumps(document).encode())
        self._tree.wait(number, self._timeout_s)
        found = dict(self._tree.results()).get(number)
        if self._tree.failure is not None:
            raise self._tree.failure
        if found is None:
            raise ChannelError(f"a rank was lost while ranks compared notes: {self._culprits(number)}")
        if found[:1] != kind:
            raise ChannelError("ranks make different collective calls at once")
        return found[1:]

    def _culprits(self, number: int) -> str:
        """Why a collective call has no result."""
        if silent := self._control.silent():
            return f"rank(s) {sorted(silent)} have been silent for up to {max(silent.values()):.0f} s"
        missing = self._tree.missing(number)
        if not missing:
            return "other ranks have given it up"
        return f"no word from rank(s) {missing}, or those that speak through them, within {self._timeout_s:g} s"

    def _merge(self, number: int, payloads: Sequence[bytes]) -> bytes:
        return self._merges[number](payloads)


class AloneMesh:
    """``Mesh`` of a job of one rank."""

    rank = 0
    world_size = 1

    def dial(self, peer: int, purpose: str, timeout_s: float) -> Connection:
        """See ``Mesh``: there is nobody."""
        raise ChannelError(f"there is no rank {peer}")

    def serve(self, purpose: str, handler: Callable[[Connection], None]) -> None:
        """See ``Mesh``: nobody will come."""


class AloneChannel:
    """``Channel`` of a job of one rank."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See ``Channel``."""
        if sends or receives:
            raise ChannelError("there are no other ranks")
