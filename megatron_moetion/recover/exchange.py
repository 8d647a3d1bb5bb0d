# SPDX-License-Identifier: Apache-2.0
"""Words and documents between a few ranks, while a run starts. Every wait is bounded."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from megatron_moetion.errors import ChannelError
from megatron_moetion.replicate.channel import Channel, Combine, Fabric, Message

_DIGEST_BYTES = 16
_DOCUMENT_BYTES_MAX = 1 << 30
"""More is no table of captures and no specification."""


def swap(
    channel: Channel,
    outgoing: Mapping[int, bytes],
    senders: Collection[int],
    bytes_max: int = _DOCUMENT_BYTES_MAX,
) -> dict[int, bytes]:
    """Send a document to each of some ranks, and receive one of each of ``senders``; by rank.

    All ranks of these pairs call together. ``ChannelError`` on a lost peer, and where a document arrives damaged or has
    more than ``bytes_max``.
    """
    if not outgoing and not senders:
        return {}
    leaving = {peer: np.frombuffer(sealed(data), dtype=np.uint8) for peer, data in sorted(outgoing.items())}
    sizes = {peer: np.zeros(1, dtype=np.int64) for peer in sorted(senders)}
    channel.exchange(
        [Message(peer=p, data=np.array([data.nbytes], dtype=np.int64).view(np.uint8)) for p, data in leaving.items()],
        [Message(peer=p, data=size.view(np.uint8)) for p, size in sizes.items()],
    )
    for peer, size in sizes.items():
        if not _DIGEST_BYTES <= size[0] <= bytes_max:
            raise ChannelError(f"rank {peer} announces a document of {size[0]} bytes; restart to try again")
    arrived = {peer: np.empty(int(size[0]), dtype=np.uint8) for peer, size in sizes.items()}
    channel.exchange(
        [Message(peer=p, data=data) for p, data in leaving.items()],
        [Message(peer=p, data=data) for p, data in arrived.items()],
    )
    found = {}
    for peer, document in arrived.items():
        found[peer] = document[:-_DIGEST_BYTES].tobytes()
        if document.tobytes() != sealed(found[peer]):
            raise ChannelError(f"a document of rank {peer} arrived damaged; restart to try again")
    return found


def sealed(document: bytes) -> bytes:
    """As it travels: with its digest behind it."""
    return document + hashlib.blake2b(document, digest_size=_DIGEST_BYTES).digest()


class Meeting:
    """Some ranks, this one among them, that combine words at once: each call is the same one on all of them."""

    def __init__(self, fabric: Fabric, name: str, members: Sequence[int], combine: Combine, timeout_s: float) -> None:
        self._members = members
        self._name = name
        self._timeout_s = timeout_s
        self._reducer = fabric.reducer(name, members, combine) if len(members) > 1 else None
        self._number = 0

    def combine(self, words: Sequence[int]) -> Sequence[int]:
        """The words of all members made one. ``ChannelError`` where one of them is lost, or late."""
        if self._reducer is None:
            return words
        number = self._number
        self._number += 1
        self._reducer.contribute(number, words)
        if not self._reducer.wait(number, self._timeout_s):
            raise ChannelError(
                f"{self._name}: not all of the {len(self._members)} ranks from rank {self._members[0]} on answered "
                f"within {self._timeout_s:.0f} s"
            )
        return next(result.words for result in self._reducer.results() if result.number == number)


def add(mine: Sequence[int], theirs: Sequence[int]) -> list[int]:
    """Two ranks' counts to one."""
    return [a + b for a, b in zip(mine, theirs, strict=True)]
