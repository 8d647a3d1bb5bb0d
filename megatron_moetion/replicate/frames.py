# SPDX-License-Identifier: Apache-2.0
"""What an owner and a holder say to each other: a header of eight words and a body, each believed by its digest only.

=========== ======== ================================================ =========================
kind        from     words                                            body
=========== ======== ================================================ =========================
``OPEN``    owner    epoch, 0, 0, 0                                   ``Opening``, JSON
``TABLE``   holder   epoch, 0, 0, 0                                   its records
``UPDATE``  owner    epoch, iteration, stable, dropped << 32 | added  ``mirror.Update``
``DIGESTS`` owner    epoch, 0, 0, 0                                   ``mirror.encode_digests``
``DROP``    owner    epoch, 0, 0, 0                                   nothing
``YES``     holder   epoch, 0, 0, 0                                   nothing
``NO``      holder   epoch, 0, 0, 0                                   the reason, UTF-8
=========== ======== ================================================ =========================

Captures' bytes follow an ``UPDATE`` that was answered by ``YES``, in the order of its records, without a frame: their
chunk digests stand in the update. Those of fragments, which are made as they are sent, follow the bytes in a frame of
their own; it is empty where the captures have gone meanwhile.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from megatron_moetion.arrays import Bytes
from megatron_moetion.errors import NOT_OURS, ChannelError, CorruptArena
from megatron_moetion.replicate.channel import Connection
from megatron_moetion.snapshot.digest import digest_of
from megatron_moetion.snapshot.packer import HostPool
from megatron_moetion.store.manifest import MAX_BRANCHES, Branch, Page, is_possible
from megatron_moetion.store.spec import ArenaSpec

PURPOSE = "hold"
"""Of connections from owners to holders."""
HEADER_BYTES = 8 * 8
OPENING_BYTES_MAX = 64 << 20
_REASON_BYTES_MAX = 1000


class Kind(IntEnum):
    """What a frame is. Numbers are part of the protocol."""

    OPEN = 1
    TABLE = 2
    UPDATE = 3
    DROP = 4
    YES = 5
    NO = 6
    DIGESTS = 7


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One message, headers and body verified."""

    kind: Kind
    epoch: int
    iteration: int = 0
    stable: int = 0
    dropped: int = 0
    added: int = 0
    body: Bytes = field(default_factory=lambda: np.empty(0, dtype=np.uint8))

    @property
    def reason(self) -> str:
        """The text of a ``NO``."""
        return self.body.tobytes().decode(errors="replace")


def refusal(epoch: int, reason: str) -> Frame:
    """A ``NO``."""
    text = np.frombuffer(reason.encode()[:_REASON_BYTES_MAX], dtype=np.uint8)
    return Frame(kind=Kind.NO, epoch=epoch, body=text)


def send_frame(connection: Connection, pool: HostPool, frame: Frame) -> None:
    """``ChannelError`` as ``Connection.send``."""
    counts = frame.dropped << 32 | frame.added
    said = np.array([frame.epoch, frame.iteration, frame.stable], dtype=np.int64).view(np.uint64)
    body = frame.body
    words = np.array([frame.kind, *said, counts, body.nbytes, digest_of(pool, body), 0], dtype=np.uint64)
    words[-1] = digest_of(pool, words[:-1].view(np.uint8))
    connection.send([words.view(np.uint8), body] if body.nbytes else [words.view(np.uint8)])


def receive_frame(
    connection: Connection, pool: HostPool, *, body_bytes_max: int, timeout_s: float | None = None
) -> Frame:
    """``ChannelError`` as ``Connection.receive``, and for what is damaged or larger than ``body_bytes_max``.

    ``timeout_s`` is for the first byte.
    """
    words = np.zeros(8, dtype=np.uint64)
    connection.receive([words.view(np.uint8)], timeout_s)
    peer = connection.peer
    if digest_of(pool, words[:-1].view(np.uint8)) != int(words[-1]):
        raise ChannelError(f"a header of rank {peer} was damaged on the way")
    kind, _, _, _, counts, nbytes, digest, _ = words.tolist()
    epoch, iteration, stable = words[1:4].view(np.int64).tolist()
    if kind not in set(Kind) or nbytes > body_bytes_max:
        raise ChannelError(f"rank {peer} sends {nbytes} bytes of kind {kind}; the most is {body_bytes_max}")
    body = np.empty(nbytes, dtype=np.uint8)
    if nbytes:
        connection.receive([body])
    if digest_of(pool, body) != digest:
        raise ChannelError(f"a message of rank {peer} was damaged on the way ({Kind(kind).name}, {nbytes} bytes)")
    return Frame(
        kind=Kind(kind), epoch=epoch, iteration=iteration, stable=stable, dropped=counts >> 32,
        added=counts & 0xFFFFFFFF, body=body,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Whose arena an owner wants a mirror of, and the history that it belongs to."""

    spec: ArenaSpec
    page: Page
    """Of it the epoch, the lineage and the branches count."""

    def encode(self) -> Bytes:
        """As bytes."""
        page = self.page
        document = {
            "spec": self.spec.to_json().decode(),
            "epoch": page.epoch,
            "lineage": page.lineage,
            "branches": [(b.epoch, b.iteration, b.nonce) for b in page.branches],
        }
        return np.frombuffer(json.dumps(document, separators=(",", ":")).encode(), dtype=np.uint8)

    @classmethod
    def decode(cls, data: Bytes, peer: int) -> Opening:
        """Inverse of ``encode``; ``ChannelError`` for bytes that are no opening."""
        try:
            raw = json.loads(data.tobytes())
            branches = tuple(Branch(epoch=int(e), iteration=int(i), nonce=int(n)) for e, i, n in raw["branches"])
            page = Page(epoch=int(raw["epoch"]), lineage=int(raw["lineage"]), branches=branches)
            if not is_possible(page):
                raise ValueError("no run comes to such a page")
            return cls(spec=ArenaSpec.from_json(raw["spec"].encode()), page=page)
        except (*NOT_OURS, CorruptArena) as error:
            raise ChannelError(f"rank {peer} opens with something else than an arena: {error}") from error

    def is_history_of(self, page: Page) -> bool:
        """Whether a page belongs to the same history, as far as pages remember it."""
        ours = self.page
        return (ours.epoch, ours.lineage) == (page.epoch, page.lineage) and (
            ours.branches[-MAX_BRANCHES:] == page.branches[-MAX_BRANCHES:]
        )
