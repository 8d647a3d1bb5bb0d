# SPDX-License-Identifier: Apache-2.0
"""One member's part in combining contributions over a tree, round by round. Pure: what is to be said comes back.

A member combines its own contribution with those of its children, tells its parent, and keeps what it said until the
result comes. The root's combination is the result, which goes down again. Rounds are combined in order.

A message may be lost with its connection. So a child that is connected again says which result it had last and repeats
what has no result yet; its parent answers with the results since then. Both are bounded: a member with ``kept`` rounds
without a result gives up the oldest. That round is void: it has no result at any member.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from megatron_moetion.replicate.tree import Place

KEPT = 64
"""Rounds of a reducer without a result."""
Merge = Callable[[int, Sequence[bytes]], bytes]
"""The contributions of neighbouring members to one round, in the order of their ranks, made one."""


class Kind(IntEnum):
    """What one member says to another one about a tree."""

    HERE = 1
    """Parent to child: this member knows the tree now; say all that has no result."""
    AGAIN = 2
    """Child to parent: ``number`` is the last result here; what has no result follows."""
    UP = 3
    """Child to parent: its contribution, and that of all below it."""
    DOWN = 4
    """Parent to child: a result."""


@dataclass(frozen=True, kw_only=True)
class Say:
    """Something to be said to a neighbour."""

    peer: int
    kind: Kind
    number: int
    floor: int = 0
    """Of ``UP``: older rounds are void."""
    payload: bytes = b""


class Rounds:
    """See the module. ``number`` counts 0, 1, 2 and so on. Not thread-safe."""

    def __init__(self, place: Place, merge: Merge, kept: int = KEPT) -> None:
        self.place = place
        self._merge = merge
        self.kept = kept
        self._own: dict[int, bytes] = {}
        self._below: dict[int, dict[int, bytes]] = {child: {} for child in place.children}
        self._said: dict[int, bytes] = {}
        """What has gone up and has no result yet."""
        self._listening: set[int] = set()
        self._next = 0
        self._floor = 0
        self._history: deque[tuple[int, bytes]] = deque(maxlen=kept)
        self._results: list[tuple[int, bytes]] = []
        self.last = -1
        """The round of the last result."""
        self.given_up = 0
        """Rounds that this member itself gave up."""

    def take_results(self) -> list[tuple[int, bytes]]:
        """Results since the last call, in order: rounds, and their combined contributions."""
        found, self._results = self._results, []
        return found

    def missing(self, number: int) -> list[int]:
        """Neighbours without which this round cannot be finished here: children first, else the parent."""
        children = [child for child, said in self._below.items() if self._next <= number and number not in said]
        return children or ([self.place.parent] if self.place.parent is not None else [])

    def contribute(self, number: int, payload: bytes) -> list[Say]:
        """This member's own contribution."""
        if number <= self.last or number < self._floor:
            return []
        self._own[number] = payload
        oldest = number - self.kept + 1
        self.given_up += sum(n < oldest for n in (*self._own, *self._said))
        self._raise_floor(oldest)
        return self._advance()

    def from_child(self, child: int, number: int, floor: int, payload: bytes) -> list[Say]:
        """``UP`` has come."""
        if child not in self._below:
            return []
        self._raise_floor(min(floor, number))
        if self._next <= number < self._floor + 2 * self.kept:
            self._below[child][number] = payload
        return self._advance()

    def from_parent(self, number: int, payload: bytes) -> list[Say]:
        """``DOWN`` has come."""
        return self._finish(number, payload) if number > self.last else []

    def child_again(self, child: int, last: int) -> list[Say]:
        """``AGAIN`` has come: the results that this child has missed. From now on it gets all others."""
        if child not in self._below:
            return []
        self._listening.add(child)
        return [Say(peer=child, kind=Kind.DOWN, number=n, payload=p) for n, p in self._history if n > last]

    def child_lost(self, child: int) -> None:
        """The connection to this child has ended: it gets no results until it has said which it had last."""
        self._listening.discard(child)

    def again(self) -> list[Say]:
        """The parent is connected, or has come to know this tree."""
        if self.place.parent is None:
            return []
        return [Say(peer=self.place.parent, kind=Kind.AGAIN, number=self.last)] + [
            self._up(number, payload) for number, payload in sorted(self._said.items())
        ]

    def here(self) -> list[Say]:
        """This member has come to know the tree."""
        return [Say(peer=child, kind=Kind.HERE, number=0) for child in self.place.children]

    def _advance(self) -> list[Say]:
        """Combine what is complete, in order."""
        said: list[Say] = []
        while self._next in self._own and all(self._next in below for below in self._below.values()):
            number = self._next
            self._next += 1
            parts = [self._own.pop(number), *(below.pop(number) for below in self._below.values())]
            payload = self._merge(number, parts) if len(parts) > 1 else parts[0]
            if self.place.parent is None:
                said += self._finish(number, payload)
            else:
                self._said[number] = payload
                said.append(self._up(number, payload))
        return said

    def _up(self, number: int, payload: bytes) -> Say:
        assert self.place.parent is not None
        return Say(peer=self.place.parent, kind=Kind.UP, number=number, floor=self._floor, payload=payload)

    def _finish(self, number: int, payload: bytes) -> list[Say]:
        self.last = number
        self._history.append((number, payload))
        self._results.append((number, payload))
        self._raise_floor(number + 1)
        return [Say(peer=c, kind=Kind.DOWN, number=number, payload=payload) for c in sorted(self._listening)]

    def _raise_floor(self, floor: int) -> None:
        """Rounds before this one have a result or are void."""
        if floor <= self._floor:
            return
        self._floor = floor
        self._next = max(self._next, floor)
        for waiting in (self._own, self._said, *self._below.values()):
            for number in [n for n in waiting if n < floor]:
                del waiting[number]
