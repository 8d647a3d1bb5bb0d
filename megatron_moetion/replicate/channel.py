# SPDX-License-Identifier: Apache-2.0
"""What replication, agreement and recovery need of a network. One contract suite runs over every implementation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from megatron_moetion.arrays import Bytes
from megatron_moetion.observe.notes import Note as Note


@dataclass(frozen=True, kw_only=True, eq=False)
class Message:
    """Bytes to or from one peer (a global rank). ``data`` must stay in place until ``exchange`` returns."""

    peer: int
    data: Bytes


@dataclass(frozen=True, kw_only=True)
class Address:
    """Where other ranks reach this one."""

    interface: str
    """Of this host; "" where none has the address."""
    host: str


class Gate(Protocol):
    """What a connection asks before it hands bytes of a snapshot to the network. Called by one thread at a time."""

    def slice_bytes(self) -> int:
        """How many bytes to hand over at once, at least."""
        ...

    def in_flight_bytes(self) -> int:
        """Most bytes under way at once; the connection has a limit of its own too."""
        ...

    def admit(self, nbytes: int) -> None:
        """Return when these bytes may go. The wait is bounded."""
        ...

    def left(self, nbytes: int, posted_s: float) -> None:
        """Bytes that were posted at this moment of the monotonic clock have been taken by the network."""
        ...


class Connection(Protocol):
    """A stream of bytes between this rank and one peer. One thread at a time sends, and one receives.

    Every wait is bounded. After a ``ChannelError`` the connection is closed for good; another one can be made.
    """

    peer: int

    def send(self, parts: Sequence[Bytes], *, gate: Gate | None = None) -> None:
        """Send the parts, one behind the other; in slices that ask ``gate`` where there is one.

        ``ChannelError`` where the peer is lost, or takes nothing for too long.
        """
        ...

    def receive(self, parts: Sequence[Bytes], timeout_s: float | None = None) -> None:
        """Fill the parts, one behind the other. ``ChannelError`` where the peer is lost or nothing arrives in time.

        ``timeout_s``: for each wait without a byte, since a sender's gate may make pauses; None: as for every other.
        """
        ...

    def close(self) -> None:
        """Let go; the peer's next call fails. May be called from any thread and more than once."""
        ...


class Mesh(Protocol):
    """Makes connections between ranks, each where it is needed. May be used from any thread."""

    rank: int
    world_size: int

    def dial(self, peer: int, purpose: str, timeout_s: float) -> Connection:
        """A new connection to a rank, which serves this purpose. ``ChannelError`` where it does not answer in time."""
        ...

    def serve(self, purpose: str, handler: Callable[[Connection], None]) -> None:
        """Give every connection that is made for this purpose to ``handler``, in a thread of its own.

        The connection is closed when the handler returns. Errors of a handler close its connection only.
        """
        ...


class Channel(Protocol):
    """Moves bytes between pairs of ranks while a run starts. Used by one thread at a time."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        """Send and receive, all at once, and return when everything has arrived.

        Both sides must call with matching messages: the n-th message to a peer is the n-th that this peer
        receives from us, of the same size. Every wait is bounded; a lost or late peer raises ``ChannelError``,
        after which the channel must not be used again. Bytes in flight are bounded.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Reduced:
    """The result of one round of a ``Reducer``, the same on all members."""

    number: int
    words: tuple[int, ...]
    notes: Mapping[str, Note] = field(default_factory=dict)
    """By kind."""


Combine = Callable[[Sequence[int], Sequence[int]], Sequence[int]]
"""Two ranks' words to one: commutative and associative."""


class Reducer(Protocol):
    """Combines words over its members, round by round, in the background. Nothing of it waits.

    A member that is lost, or late, delays the results; they come when it is back, all of them and in order. Used by the
    training thread.
    """

    def contribute(self, number: int, words: Sequence[int], notes: Mapping[str, Note] | None = None) -> None:
        """This rank's part of round ``number``: 0, 1, 2 and so on, each once. Words are signed 64-bit integers.

        All members give equally many words, the same number in all rounds. ``notes`` are this rank's, by kind.
        """
        ...

    def results(self) -> list[Reduced]:
        """Results that have arrived since the last call, in order. Does not wait.

        ``ChannelError`` for what cannot be one: of a round that this rank has not given yet, or of other words.
        """
        ...

    def wait(self, number: int, timeout_s: float) -> bool:
        """Return once the result of this round has arrived, or after the timeout; whether it has."""
        ...


class Fabric(Protocol):
    """Everything that one rank's runtime says to other ranks."""

    rank: int
    world_size: int
    mesh: Mesh
    channel: Channel
    address: Address

    def gather(self, document: Any) -> list[Any]:
        """Every rank's JSON-able document, by rank. Collective. Bounded wait; ``ChannelError`` on a lost peer.

        Every rank receives the bytes of all: for documents of at most some hundred bytes.
        """
        ...

    def reduce(self, document: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """The JSON-able documents of all ranks made one; the same on all. Collective, as ``gather``.

        ``combine`` makes one of two: of neighbouring ranks', the lower first. It must be associative.
        """
        ...

    def reducer(self, name: str, members: Sequence[int], combine: Combine) -> Reducer:
        """Combines words of these ranks, this one among them. Not collective: members join as they come.

        All members give the same name and members. Names are unique in a run.
        """
        ...

    def silent(self) -> Mapping[int, float]:
        """Ranks that the control plane has heard nothing of, and for how long (seconds); most often empty."""
        ...

    def abandon(self) -> None:
        """The process is about to end, and nothing of the fabric may hold it back."""
        ...

    def close(self) -> None:
        """Release everything; the fabric must not be used again. Ranks that still need this one fail."""
        ...
