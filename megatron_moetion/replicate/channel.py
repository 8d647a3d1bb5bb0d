# SPDX-License-Identifier: Apache-2.0
"""What replication and recovery need of a network. One contract suite runs over every implementation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_moetion.arrays import Bytes


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """Bytes to or from one peer (a global rank). ``data`` must stay in place until ``exchange`` returns."""

    peer: int
    data: Bytes
    slice_bytes: int = 0
    """Cut into slices of so many bytes, each of which asks the channel's gate; both ends must say the same. 0: bytes
    that are few and urgent, and do not ask."""


class Gate(Protocol):
    """What a channel asks before it hands bytes of a snapshot to the network. Called by the sending thread."""

    def slice_bytes(self) -> int:
        """How many bytes to hand over at once, at least."""
        ...

    def in_flight_bytes(self) -> int:
        """Most bytes under way at once; the channel has a limit of its own too."""
        ...

    def admit(self, nbytes: int) -> None:
        """Return when these bytes may go. The wait is bounded."""
        ...

    def left(self, nbytes: int, posted_s: float) -> None:
        """Bytes that were posted at this moment of the monotonic clock have been taken by the network."""
        ...


class Channel(Protocol):
    """Moves bytes between pairs of ranks. Used by one thread at a time."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Send and receive, all at once, and return when everything has arrived.

        Both sides must call with matching messages: the n-th message to a peer is the n-th that this peer
        receives from us, of the same size. Every wait is bounded; a lost or late peer raises ``ChannelError``,
        after which the channel must not be used again. Bytes in flight are bounded.
        """
        ...


class Fabric(Protocol):
    """Everything that one rank's runtime says to other ranks. Calls that name no peer are collective."""

    rank: int
    world_size: int
    channel: Channel

    def gather(self, document: Any) -> list[Any]:
        """Every rank's JSON-able document, by rank. Bounded wait; ``ChannelError`` on a lost peer."""
        ...

    def start_agreement(self, *masks: int) -> None:
        """Begin to AND bitmasks (63 bits each) over all ranks; hides behind an iteration."""
        ...

    def finish_agreement(self) -> tuple[int, ...] | None:
        """The results of the last ``start_agreement``, None if there was none."""
        ...

    def start_sum(self, counts: Sequence[int]) -> None:
        """Begin to add up token counts over the ranks that share this rank's experts."""
        ...

    def finish_sum(self) -> list[int] | None:
        """The result of the last ``start_sum``, None if there was none."""
        ...

    def abandon(self) -> None:
        """The process is about to end, and nothing of the fabric may hold it back."""
        ...

    def close(self) -> None:
        """Release groups; the fabric must not be used again."""
        ...
