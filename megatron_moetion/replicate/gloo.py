# SPDX-License-Identifier: Apache-2.0
"""The default channel: gloo, which every build of torch has."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
from torch import distributed as dist

from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Bytes, Channel, Message


class GlooFabric:
    """``Fabric`` on three gloo groups of its own: control, data, and the ranks that share experts.

    Making it is collective. ``expert_peers`` are the ranks that hold shards of the same experts as this one,
    itself included; every rank of such a set must name the same set.
    """

    def __init__(self, *, expert_peers: Sequence[int], timeout_s: int, in_flight_bytes: int) -> None:
        timeout = timedelta(seconds=timeout_s)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        data = dist.new_group(backend="gloo", timeout=timeout)
        assert data is not None
        self.channel: Channel = GlooChannel(data, in_flight_bytes)
        self._groups = [self._control, data]
        self._experts: dist.ProcessGroup | None = None
        for peers in sorted({tuple(p) for p in self.gather(sorted(expert_peers))}):
            if len(peers) > 1:
                group = dist.new_group(list(peers), backend="gloo", timeout=timeout)
                if self.rank in peers:
                    self._experts = group
                    self._groups.append(group)
        self._mask: _Reduction | None = None
        self._sum: _Reduction | None = None

    def gather(self, document: Any) -> list[Any]:
        """See ``Fabric.gather``: lengths first, then the padded documents."""
        body = json.dumps(document).encode()
        try:
            lengths = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(self.world_size)]
            dist.all_gather(lengths, torch.tensor([len(body)], device="cpu"), group=self._control)
            longest = int(max(lengths).item())
            mine = torch.zeros(longest, dtype=torch.uint8, device="cpu")
            mine[: len(body)] = torch.frombuffer(bytearray(body), dtype=torch.uint8)
            parts = [torch.empty(longest, dtype=torch.uint8, device="cpu") for _ in range(self.world_size)]
            dist.all_gather(parts, mine, group=self._control)
        except RuntimeError as error:  # torch raises nothing narrower for a lost peer or a timeout
            raise ChannelError(f"a rank was lost while ranks compared notes: {_first_line(error)}") from error
        return [json.loads(p.numpy()[: int(n.item())].tobytes()) for p, n in zip(parts, lengths, strict=True)]

    def start_agreement(self, mask: int) -> None:
        """See ``Fabric.start_agreement``."""
        self._mask = _Reduction([mask], dist.ReduceOp.BAND, self._control)

    def finish_agreement(self) -> int | None:
        """See ``Fabric.finish_agreement``."""
        done, self._mask = self._mask, None
        return done.wait()[0] if done is not None else None

    def start_sum(self, counts: Sequence[int]) -> None:
        """See ``Fabric.start_sum``."""
        self._sum = _Reduction(counts, dist.ReduceOp.SUM, self._experts)

    def finish_sum(self) -> list[int] | None:
        """See ``Fabric.finish_sum``."""
        done, self._sum = self._sum, None
        return done.wait() if done is not None else None

    def close(self) -> None:
        """See ``Fabric.close``."""
        for group in self._groups:
            dist.destroy_process_group(group)
        self._groups = []


class _Reduction:
    """An all-reduce of int64 values under way; alone in its group (None), it is done at once."""

    def __init__(self, values: Sequence[int], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> None:
        self._values = torch.tensor(list(values), dtype=torch.int64, device="cpu")
        self._work = dist.all_reduce(self._values, op=op, group=group, async_op=True) if group is not None else None

    def wait(self) -> list[int]:
        try:
            if self._work is not None:
                self._work.wait()
        except RuntimeError as error:  # torch raises nothing narrower for a lost peer or a timeout
            raise ChannelError(f"ranks could not agree: {_first_line(error)}") from error
        return [int(v) for v in self._values.tolist()]


class GlooChannel:
    """Point-to-point transfers over a gloo group of its own; the group's timeout bounds every wait."""

    def __init__(self, group: dist.ProcessGroup, in_flight_bytes: int) -> None:
        self._group = group
        self._slice_bytes = max(1 << 16, min(8 << 20, in_flight_bytes // 8))
        self._in_flight_bytes = in_flight_bytes

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """See ``Channel.exchange``. Bytes travel in rounds: the n-th slice to and from every peer.

        A rank waits only for rounds that it has posted itself, oldest first, and both ends number the slices between
        them alike. So whoever waits for the lowest round finds it posted by all its peers: nobody waits in a circle.
        """
        pending: deque[tuple[list[dist.Work], int]] = deque()
        in_flight = 0
        try:
            for parts in self._rounds(sends, receives):
                nbytes = sum(part.nbytes for _, _, part in parts)
                while pending and in_flight + nbytes > self._in_flight_bytes:
                    in_flight -= _finish(*pending.popleft())
                pending.append(([self._post(*part) for part in parts], nbytes))
                in_flight += nbytes
            while pending:
                _finish(*pending.popleft())
        except RuntimeError as error:  # torch raises nothing narrower for a lost peer or a timeout
            peers = sorted({m.peer for m in (*sends, *receives)})
            raise ChannelError(f"transfer with rank(s) {peers} failed: {_first_line(error)}") from error

    def _rounds(self, sends: Sequence[Message], receives: Sequence[Message]) -> Iterator[list[tuple[bool, int, Bytes]]]:
        """For each round the slices (is sent, peer, bytes) that are posted together."""
        streams: dict[tuple[bool, int], list[Bytes]] = defaultdict(list)
        for is_send, messages in ((False, receives), (True, sends)):
            for message in messages:
                starts = range(0, message.data.nbytes, self._slice_bytes)
                streams[is_send, message.peer] += [message.data[s : s + self._slice_bytes] for s in starts]
        for parts in zip_longest(*streams.values()):
            yield [(*stream, part) for stream, part in zip(streams, parts, strict=True) if part is not None]

    def _post(self, is_send: bool, peer: int, part: Bytes) -> dist.Work:
        tensor = torch.from_numpy(part)
        posted = (
            dist.isend(tensor, dst=peer, group=self._group)
            if is_send
            else dist.irecv(tensor, src=peer, group=self._group)
        )
        assert posted is not None
        return posted


def _finish(works: Sequence[dist.Work], nbytes: int) -> int:
    for work in works:
        work.wait()
    return nbytes


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
