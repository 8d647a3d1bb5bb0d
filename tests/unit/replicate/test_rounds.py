# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence

import pytest

from megatron_moetion.replicate.rounds import Kind, Rounds, Say
from megatron_moetion.replicate.tree import place_of


def joined(number: int, parts: Sequence[bytes]) -> bytes:
    return b"".join(parts)


class Model:
    """Members that talk over connections that break; what is on the way is then lost, in both directions."""

    def __init__(self, members: int, seed: int, kept: int = 64) -> None:
        self.random = random.Random(seed)
        self.rounds = [Rounds(place_of(r, range(members), 2, 2), joined, kept) for r in range(members)]
        self.wires: dict[tuple[int, int], deque[Say]] = {}
        """Of the connected pairs, both directions."""
        self.results: list[list[tuple[int, bytes]]] = [[] for _ in self.rounds]
        self.next = [0] * members

    def say(self, rank: int, said: Sequence[Say]) -> None:
        for say in said:
            if (rank, say.peer) in self.wires:
                self.wires[(rank, say.peer)].append(say)
        self.results[rank] += self.rounds[rank].take_results()

    def connect(self, rank: int) -> None:
        parent = self.rounds[rank].place.parent
        if parent is not None:
            self.wires[(rank, parent)], self.wires[(parent, rank)] = deque(), deque()
            self.say(rank, self.rounds[rank].again())

    def disconnect(self, rank: int) -> None:
        parent = self.rounds[rank].place.parent
        if parent is not None:
            self.wires.pop((rank, parent), None)
            self.wires.pop((parent, rank), None)
            self.rounds[parent].child_lost(rank)

    def contribute(self, rank: int) -> None:
        number = self.next[rank]
        self.next[rank] += 1
        self.say(rank, self.rounds[rank].contribute(number, f"{rank}:{number},".encode()))

    def deliver(self, wire: tuple[int, int]) -> None:
        source, target = wire
        if not self.wires.get(wire):
            return
        say, there = self.wires[wire].popleft(), self.rounds[target]
        match say.kind:
            case Kind.UP:
                self.say(target, there.from_child(source, say.number, say.floor, say.payload))
            case Kind.DOWN:
                self.say(target, there.from_parent(say.number, say.payload))
            case Kind.AGAIN:
                self.say(target, there.child_again(source, say.number))
            case Kind.HERE:
                self.say(target, there.again())

    def settle(self) -> None:
        """Everything is connected and arrives."""
        for rank in range(len(self.rounds)):
            if (rank, self.rounds[rank].place.parent) not in self.wires:
                self.connect(rank)
        while any(self.wires.values()):
            for wire in list(self.wires):
                self.deliver(wire)

    def expected(self, number: int) -> tuple[int, bytes]:
        return number, b"".join(f"{r}:{number},".encode() for r in range(len(self.rounds)))


@pytest.mark.parametrize("seed", range(20))
def test_all_results_come_in_order_and_once_on_connections_that_break(seed: int) -> None:
    model = Model(7, seed)
    for rank in range(7):
        model.connect(rank)
    for _ in range(3000):
        rank = model.random.randrange(7)
        match model.random.randrange(12):
            case 0:
                model.disconnect(rank)
            case 1:
                model.disconnect(rank)
                model.connect(rank)
            case 2 if model.next[rank] < 30:
                model.contribute(rank)
            case _ if model.wires:
                model.deliver(model.random.choice(list(model.wires)))
    for rank in range(7):
        while model.next[rank] < 30:
            model.contribute(rank)
    model.settle()
    assert model.results == [[model.expected(n) for n in range(30)]] * 7


@pytest.mark.parametrize("late", [0, 1, 5, 6])
def test_a_member_that_is_late_by_more_than_is_kept_costs_the_same_rounds_everywhere(late: int) -> None:
    model = Model(7, 0, kept=4)
    for rank in range(7):
        model.connect(rank)
        if rank != late:
            for _ in range(10):
                model.contribute(rank)
    model.settle()
    assert model.results == [[]] * 7
    for _ in range(12):
        model.contribute(late)
        model.settle()
    assert model.results == [[model.expected(n) for n in range(6, 10)]] * 7
    for rank in range(7):
        while model.next[rank] < 12:
            model.contribute(rank)
    model.settle()
    assert model.results == [[model.expected(n) for n in range(6, 12)]] * 7
    assert {r.given_up for k, r in enumerate(model.rounds) if k != late} == {6}


def test_a_parent_that_comes_late_to_the_tree_asks_for_what_it_has_missed() -> None:
    model = Model(2, 0)
    child, parent = model.rounds[1], model.rounds[0]
    child.contribute(0, b"1:0,")
    model.connect(1)
    model.wires[(1, 0)].clear()  # the parent did not know the tree
    model.say(0, parent.here())
    model.contribute(0)
    model.settle()
    assert model.results == [[(0, b"0:0,1:0,")]] * 2


def test_strangers_change_nothing() -> None:
    rounds = Rounds(place_of(0, (0, 1), 1), joined)
    assert rounds.from_child(5, 0, 0, b"x") == []
    assert rounds.child_again(5, -1) == []
    assert rounds.contribute(0, b"a") == []
    assert rounds.missing(0) == [1]
    assert rounds.from_child(1, 1000, 0, b"far") == []
    assert rounds.missing(1000) == [1]
