# SPDX-License-Identifier: Apache-2.0
"""The bitmasks of recoverable iterations, against sets; and ranks that learn results at different times."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.replicate.agreement import WINDOW, Agreed, Agreement, bits_of, combine_words, fates, newest_common
from megatron_moetion.replicate.channel import Note, Reduced

GAPS = st.lists(st.integers(1, 1000), min_size=50, max_size=50)
"""How many iterations lie between two snapshots."""


def places() -> st.SearchStrategy[list[frozenset[int]]]:
    return st.lists(st.frozensets(st.integers(0, 45), max_size=20), min_size=1, max_size=4)


def test_a_minimum_over_ranks_would_be_wrong() -> None:
    recent = (10, 9, 8)
    masks = [bits_of({8, 10}, recent), bits_of({8, 9}, recent)]
    assert newest_common(masks[0] & masks[1], recent) == 8


@given(places(), places(), st.integers(0, 45), GAPS)
def test_against_sets(able: list[frozenset[int]], dropped: list[frozenset[int]], newest: int, gaps: list[int]) -> None:
    """Snapshots are numbered 0, 1, ...; their iterations have any gaps."""
    at = [sum(gaps[:i]) for i in range(len(gaps))]
    recent = [at[i] for i in range(newest, -1, -1)]
    dropped = [dropped[r % len(dropped)] - a for r, a in enumerate(able)]
    known = frozenset(range(newest + 1))
    masks = reduce(int.__and__, (bits_of({at[i] for i in a}, recent) for a in able))
    alive = reduce(int.__and__, (bits_of({at[i] for i in known - d}, recent) for d in dropped))
    assert 0 <= masks < 2**63, "it travels as a signed 64-bit integer"
    window = range(max(0, newest - WINDOW + 1), newest + 1)
    everywhere = frozenset.intersection(*able).intersection(window)
    given_up = frozenset.union(*dropped).intersection(window)
    best = max(everywhere, default=None)
    assert newest_common(masks, recent) == (None if best is None else at[best])
    settled = {i for i in range(newest + 5) if i in given_up or (best is not None and i <= best) or i < window.start}
    assert fates(masks, alive, recent, at[: newest + 5]) == {at[i]: i in everywhere for i in settled}


def test_a_snapshot_that_one_rank_gave_up_is_settled_while_none_is_newer() -> None:
    recent = (10, 9, 8)
    able = bits_of({8, 9}, recent) & bits_of({8}, recent)
    alive = bits_of({8, 9, 10}, recent) & bits_of({8, 10}, recent)
    assert newest_common(able, recent) == 8
    assert fates(able, alive, recent, {8, 9, 10}) == {8: True, 9: False}


@pytest.mark.parametrize("step", [1, 2, 64, 1000])
def test_the_window_counts_snapshots_and_has_two_ends(step: int) -> None:
    recent = [step * i for i in range(100, 0, -1)]
    assert bits_of({100 * step}, recent) == 1
    assert bits_of({(101 - WINDOW) * step}, recent) == 1 << (WINDOW - 1)
    assert bits_of({(100 - WINDOW) * step, 101 * step}, recent) == 0


class Late:
    """A ``Reducer`` of several members in one process; each gets its results when ``deliver`` says so."""

    def __init__(self, members: int) -> None:
        self.parts: dict[int, list[Sequence[int]]] = {}
        self.members = members
        self.given = [0] * members

    def of(self, member: int) -> _Member:
        return _Member(self, member)

    def deliver(self, member: int, upto: int) -> None:
        self.given[member] = max(self.given[member], upto)

    def result(self, number: int) -> Reduced | None:
        parts = self.parts.get(number, [])
        if len(parts) < self.members:
            return None
        return Reduced(number=number, words=tuple(reduce(combine_words, parts)))


class _Member:
    def __init__(self, network: Late, member: int) -> None:
        self._network, self._member = network, member
        self._next = 0

    def contribute(self, number: int, words: Sequence[int], notes: Mapping[str, Note] | None = None) -> None:
        self._network.parts.setdefault(number, []).append(words)

    def results(self) -> list[Reduced]:
        found = []
        while self._next < self._network.given[self._member] and (r := self._network.result(self._next)) is not None:
            found.append(r)
            self._next += 1
        return found

    def wait(self, number: int, timeout_s: float) -> bool:
        raise AssertionError("nothing waits in a step")


@pytest.mark.parametrize("seed", range(30))
def test_ranks_that_learn_at_different_times_learn_the_same(seed: int) -> None:
    """Some snapshots are given up on some ranks, results come late, and T is one that every rank can recover."""
    draw = random.Random(seed)
    ranks, steps = 3, 120
    network = Late(ranks)
    agreements = [Agreement(network.of(r), 0) for r in range(ranks)]
    fate: list[dict[int, bool]] = [{} for _ in range(ranks)]
    seen: list[list[Agreed]] = [[] for _ in range(ranks)]
    for i in range(1, steps + 1):
        for r in range(ranks):
            network.deliver(r, draw.randint(0, i))
            seen[r] += agreements[r].poll()
            number = agreements[r].start(
                3 * i,
                rounds=dict(fate[r]),
                recoverable=[n for n, whole in fate[r].items() if whole],
                vote=-1,
                redundancy=r + 1,
            )
            assert number == i - 1
            pending = [3 * n for n in range(max(1, i - 3), i + 1) if 3 * n not in fate[r]]
            for n in pending[: draw.randint(0, len(pending))]:  # in their order
                fate[r][n] = draw.random() > 0.3
    for r in range(ranks):
        network.deliver(r, steps)
        seen[r] += agreements[r].poll()
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0]) == steps
    assert {a.redundancy for a in seen[0]} == {1}
    for agreed in seen[0]:
        assert all(fate[r].get(i) for i, ok in agreed.recoverable.items() if ok for r in range(ranks))
        if agreed.stable:
            assert all(fate[r][agreed.stable] for r in range(ranks))
    settled = [i for a in seen[0] for i in a.recoverable]
    assert len(settled) == len(set(settled)), "a fate is settled once"
    assert agreements[0].stable > 3 * steps // 2


def step(agreement: Agreement, network: Late, iteration: int, rounds: dict[int, bool]) -> list[Agreed]:
    agreement.start(
        iteration, rounds=rounds, recoverable=[i for i, whole in rounds.items() if whole], vote=0, redundancy=0
    )
    network.deliver(0, iteration)
    return agreement.poll()


def test_a_vetoed_iteration_never_becomes_stable_and_is_settled_at_once() -> None:
    network = Late(1)
    agreement = Agreement(network.of(0), 0)
    step(agreement, network, 1, {})
    assert step(agreement, network, 2, {1: True})[-1].stable == 1
    agreement.veto((2, 3))
    (agreed,) = step(agreement, network, 3, {1: True, 2: True})
    assert (agreed.stable, agreed.recoverable) == (1, {2: False, 3: False})
    (agreed,) = step(agreement, network, 4, {1: True, 2: True, 3: True})
    assert agreed.stable == 1
    (agreed,) = step(agreement, network, 5, {1: True, 2: True, 3: True, 4: True})
    assert (agreed.stable, agreed.recoverable) == (4, {4: True})


def test_what_was_given_up_is_not_taken_back() -> None:
    """Some rank may have freed it."""
    network = Late(1)
    agreement = Agreement(network.of(0), 0)
    step(agreement, network, 1, {})
    assert step(agreement, network, 2, {1: False})[-1].recoverable == {1: False}
    assert step(agreement, network, 3, {1: True})[-1].stable == 0
    assert step(agreement, network, 4, {1: True, 2: True})[-1].stable == 2


def test_what_is_stable_cannot_be_vetoed_any_more() -> None:
    network = Late(1)
    agreement = Agreement(network.of(0), 0)
    step(agreement, network, 1, {})
    step(agreement, network, 2, {1: True})
    agreement.veto((1, 2))
    (agreed,) = step(agreement, network, 3, {1: True, 2: True})
    assert agreed.stable == 1
    assert agreed.recoverable == {2: False}


def test_memory_is_bounded_while_no_result_comes() -> None:
    network = Late(2)
    agreement = Agreement(network.of(0), 0)
    for i in range(1, 1000):
        agreement.start(i, rounds={}, recoverable=(), vote=0, redundancy=0)
    other = Agreement(network.of(1), 0)
    for i in range(1, 1000):
        other.start(i, rounds={j: True for j in range(max(1, i - 5), i)}, recoverable=range(i), vote=0, redundancy=0)
    network.deliver(0, 1000)
    assert agreement.poll()[-1].stable == 0
    assert agreement.newest == 999


@pytest.mark.parametrize("away", [40, 64, 95, 100, 500, 5000])
def test_a_result_that_a_rank_missed_is_understood_however_long_it_was_away(away: int) -> None:
    """All others have learnt that 20 is stable, and have released what is older; this rank must not give 20 up."""
    network = Late(2)
    one, other = (Agreement(network.of(r), 0) for r in range(2))

    def start(agreement: Agreement, iteration: int) -> None:
        rounds = {i: True for i in range(max(1, iteration - 5), iteration)}
        agreement.start(iteration, rounds=rounds, recoverable=rounds, vote=0, redundancy=0)

    for i in range(1, 22):
        start(one, i)
        start(other, i)
        network.deliver(0, i)
        network.deliver(1, min(i, 20))
        one.poll()
        other.poll()
    assert (one.stable, other.stable) == (20, 19)
    for i in range(22, 22 + away):
        start(other, i)
    network.deliver(1, 21)
    (agreed,) = other.poll()
    assert agreed.stable == 20
    assert agreed.recoverable == {20: True}
