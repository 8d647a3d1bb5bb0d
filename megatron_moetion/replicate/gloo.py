# SPDX-License-Identifier: Apache-2.0
"""The default channel: gloo, which every build of torch has."""

from __future__ import annotations

import ctypes
import json
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
from torch import distributed as dist

from megatron_moetion.arrays import Bytes
from megatron_moetion.clock import Clock
from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Channel, Gate, Message
from megatron_moetion.replicate.worker import Threads

_NO_AGREEMENT = "ranks could not agree"


class GlooFabric:
    """``Fabric`` on three gloo groups of its own: control, data, and the ranks that share experts.

    Made by ``connect``. After a ``ChannelError`` of a collective every
    later one raises it again at once: this rank is out of step with the others, and must not meet them in a wrong call.
    """

    @classmethod
    def connect(cls, *, timeout_s: int, in_flight_bytes: int, gate: Gate, clock: Clock, threads: Threads) -> GlooFabric:
        """Make groups of all ranks. Collective. ``gate`` holds back what the channel sends."""
        timeout = timedelta(seconds=timeout_s)
        control = dist.new_group(backend="gloo", timeout=timeout)
        data = dist.new_group(backend="gloo", timeout=timeout)
        assert control is not None, "this rank is in a group of all ranks"
        assert data is not None, "this rank is in a group of all ranks"
        return cls(control, data, timeout, GlooChannel(data, in_flight_bytes, gate, clock, threads))

    def __init__(
        self, control: dist.ProcessGroup, data: dist.ProcessGroup, timeout: timedelta, channel: GlooChannel
    ) -> None:
        self._timeout = timeout
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._control = control
        self._moving = channel
        self.channel: Channel = channel
        self._groups = [control, data]
        self._experts: dist.ProcessGroup | None = None
        self._failed = ""
        self._mask: _Reduction | None = None
        self._sum: _Reduction | None = None

    def join_experts(self, peers: Sequence[int]) -> None:
        """Name the ranks that hold shards of the same experts as this one, itself included. Collective, once.

        Every rank of such a set must name the same set.
        """
        for members in sorted({tuple(p) for p in self.gather(sorted(peers))}):
            if len(members) > 1:
                group = dist.new_group(list(members), backend="gloo", timeout=self._timeout)
                if self.rank in members:
                    self._experts = group
                    self._groups.append(group)

    def gather(self, document: Any) -> list[Any]:
        """See ``Fabric.gather``: lengths first, then the padded documents."""
        body = json.dumps(document).encode()
        with self._collective("a rank was lost while ranks compared notes"):
            lengths = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.world_size)]
            dist.all_gather(lengths, torch.tensor([len(body)], device="cpu"), group=self._control)
            longest = int(max(lengths).item())
            mine = torch.zeros(longest, dtype=torch.uint8, device="cpu")
            mine[: len(body)] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
            parts = [torch.empty(longest, dtype=torch.uint8, device="cpu") for _ in range(self.world_size)]
            dist.all_gather(parts, mine, group=self._control)
        return [json.loads(p.numpy()[: int(n.item())].tobytes()) for p, n in zip(parts, lengths, strict=True)]

    def start_agreement(self, *masks: int) -> None:
        """See ``Fabric.start_agreement``."""
        with self._collective(_NO_AGREEMENT):
            self._mask = _Reduction(masks, dist.ReduceOp.BAND, self._control)

    def finish_agreement(self) -> tuple[int, ...] | None:
        """See ``Fabric.finish_agreement``."""
        done, self._mask = self._mask, None
        with self._collective(_NO_AGREEMENT):
            return tuple(done.wait()) if done is not None else None

    def start_sum(self, counts: Sequence[int]) -> None:
        """See ``Fabric.start_sum``."""
        with self._collective(_NO_AGREEMENT):
            self._sum = _Reduction(counts, dist.ReduceOp.SUM, self._experts)

    def finish_sum(self) -> list[int] | None:
        """See ``Fabric.finish_sum``."""
        done, self._sum = self._sum, None
        with self._collective(_NO_AGREEMENT):
            return done.wait() if done is not None else None

    @contextmanager
    def _collective(self, what: str) -> Iterator[None]:
        """Turn the failure of a collective into a ``ChannelError``, now and ever after."""
        if self._failed:
            raise ChannelError(self._failed)
        try:
            yield
        except RuntimeError as error:  # torch raises nothing narrower for a lost peer or a timeout
            self._failed = f"{what}: {_first_line(error)}"
            raise ChannelError(self._failed) from error

    def abandon(self) -> None:
        """See ``Fabric.abandon``.

        A group's destructor, which the interpreter calls when it ends, waits for what the group still has to do: for a
        peer that is gone, until the time limit. So the groups are never destroyed.
        """
        self._moving.abandon()
        for group in self._groups:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))

    def close(self) -> None:
        """See ``Fabric.close``."""
        self._moving.close()
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups = []


class _Reduction:
    """An all-reduce of int64 values under way; alone in its group (None), it is done at once."""

    def __init__(self, values: Sequence[int], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
        self._values = torch.tensor(list(values), dtype=torch.int64, device="cpu")
        self._work = dist.all_reduce(self._values, op=op, group=group, async_op=True) if group is not None else None

    def wait(self) -> list[int]:
        if self._work is not None:
            self._work.wait()
        return [int(v) for v in self._values.tolist()]


@dataclass(frozen=True, kw_only=True)
class _Round:
    """Slices, one a peer at most, that were posted together."""

    works: Sequence[dist.Work]
    nbytes: int
    posted_s: float
    is_paced: bool


class GlooChannel:
    """Point-to-point transfers over a gloo group of its own; the group's timeout bounds every wait.

    ``gate`` is asked before each slice that is sent.
    """

    def __init__(
        self, group: dist.ProcessGroup, in_flight_bytes: int, gate: Gate, clock: Clock, threads: Threads
    ) -> None:
        self._group = group
        self._gate = gate
        self._in_flight_bytes = in_flight_bytes // 2  # each way
        self._urgent_bytes = max(1 << 16, in_flight_bytes // 8)
        self._clock = clock
        self._receiving = threads.worker("moetion-receive")

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See ``Channel.exchange``. Bytes travel in rounds: the n-th slice to, or from, every peer.

        Sending and receiving have a thread each, so that a peer may send while our own slices are held back. Each posts
        its rounds in order and waits for the oldest. Of all slices under way anywhere, the one of the lowest number is
        therefore posted, or about to be, at both of its ends: nobody waits in a circle.
        """
        receiving = self._receiving.submit(self._move, receives, is_send=False) if receives else None
        try:
            try:
                self._move(sends, is_send=True)
            finally:
                if receiving is not None:
                    receiving.result()
        except RuntimeError as error:  # torch raises nothing narrower for a lost peer or a timeout
            peers = sorted({m.peer for m in (*sends, *receives)})
            raise ChannelError(f"transfer with rank(s) {peers} failed: {_first_line(error)}") from error

    def close(self) -> None:
        """End the thread. The group is its maker's to destroy."""
        self._receiving.close()

    def abandon(self) -> None:
        """Let go without waiting for the thread."""
        self._receiving.abandon()

    def _move(self, messages: Sequence[Message], *, is_send: bool) -> None:
        pending: deque[_Round] = deque()
        in_flight = 0
        for parts in self._rounds(messages):
            nbytes = sum(part.nbytes for _, part, _ in parts)
            is_paced = is_send and any(asks for _, _, asks in parts)
            limit = min(self._in_flight_bytes, self._gate.in_flight_bytes() if is_paced else self._in_flight_bytes)
            while pending and in_flight + nbytes > limit:
                in_flight -= self._finish(pending.popleft())
            if is_paced:
                self._gate.admit(nbytes)
            posted_s = self._clock.monotonic()
            works = [self._post(is_send, peer, part) for peer, part, _ in parts]
            pending.append(_Round(works=works, nbytes=nbytes, posted_s=posted_s, is_paced=is_paced))
            in_flight += nbytes
        while pending:
            self._finish(pending.popleft())

    def _finish(self, done: _Round) -> int:
        for work in done.works:
            work.wait()
        if done.is_paced:
            self._gate.left(done.nbytes, done.posted_s)
        return done.nbytes

    def _rounds(self, messages: Sequence[Message]) -> Iterator[list[tuple[int, Bytes, bool]]]:
        """For each round the slices (peer, bytes, whether the gate is asked) that are posted together."""
        streams: dict[int, list[tuple[int, Bytes, bool]]] = defaultdict(list)
        for message in messages:
            step = message.slice_bytes or self._urgent_bytes
            for start in range(0, message.data.nbytes, step):
                part = message.data[start : start + step]
                streams[message.peer].append((message.peer, part, message.slice_bytes > 0))
        for parts in zip_longest(*streams.values()):
            yield [part for part in parts if part is not None]

    def _post(self, is_send: bool, peer: int, part: Bytes) -> dist.Work:
        tensor = torch.from_numpy(part)
        posted = (
            dist.isend(tensor, dst=peer, group=self._group)
            if is_send
            else dist.irecv(tensor, src=peer, group=self._group)
        )
        assert posted is not None
        return posted


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
