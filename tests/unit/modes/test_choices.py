# SPDX-License-Identifier: Apache-2.0
"""Ranks that share experts take the same ones, whenever each of them hears of what others know; recovery can use them.

Real agreements, books and choices of a few ranks in one thread, with the real retention and planning; only the network
is a model: every result reaches every rank when the draw says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moetion.modes.choices import Choices, combine_counts
from megatron_moetion.recover.plan import choose_newest_experts
from megatron_moetion.replicate.agreement import Agreement, combine_words
from megatron_moetion.replicate.channel import Combine, Note, Reduced
from megatron_moetion.schedule.sizes import LEVELS, Sizes, vote
from megatron_moetion.select.book import ExpertBook, Rules
from megatron_moetion.store.manifest import NO_RECORDS, Records
from megatron_moetion.store.retention import Newest, Settled
from megatron_moetion.units import UnitKind

EXPERTS = 6
GROUPS = ((0, 1), (2, 3, 4))
NAMES = tuple(f"experts.{e}" for e in range(EXPERTS))
UNITS = (("dense", UnitKind.DENSE), *((name, UnitKind.EXPERT) for name in NAMES), ("host", UnitKind.HOST))
ALWAYS = (0, EXPERTS + 1)


class Board:
    """The rounds of some ranks, and which of them each rank has heard the result of."""

    def __init__(self, members: Sequence[int], combine: Combine, delivered: Callable[[int], int]) -> None:
        self.said: dict[int, dict[int, Sequence[int]]] = {}
        self.heard = dict.fromkeys(members, 0)
        self.combine = combine
        self.delivered = delivered
        """How many results this rank hears at once, at most."""

    def member(self, rank: int) -> Member:
        return Member(self, rank)


class Member:
    """A ``Reducer``."""

    def __init__(self, board: Board, rank: int) -> None:
        self._board = board
        self._rank = rank

    def contribute(self, number: int, words: Sequence[int], notes: Mapping[str, Note] | None = None) -> None:
        self._board.said.setdefault(number, {})[self._rank] = words

    def results(self) -> list[Reduced]:
        board, found = self._board, []
        for number in range(board.heard[self._rank], board.heard[self._rank] + board.delivered(self._rank)):
            said = board.said.get(number, {})
            if len(said) < len(board.heard):
                break
            board.heard[self._rank] += 1
            found.append(Reduced(number=number, words=tuple(reduce(board.combine, said.values()))))
        return found

    def wait(self, number: int, timeout_s: float) -> bool:
        raise AssertionError("nothing waits")


class Rank:
    """One rank: what it has captured, and what it knows."""

    def __init__(self, rank: int, draw: random.Random, world: Board, group: Board) -> None:
        self.rank, self.draw = rank, draw
        self.group = group.member(rank)
        rules = Rules(policy="unsaved-tokens", reserved=2, most=4, staleness_cap=4, interval=1, lost_token_budget=0.2)
        self.book = ExpertBook(names=NAMES, layers=["dense"] * EXPERTS, rules=rules)
        self.choices = Choices(self.book, Sizes(2, 3), interval=1)
        self.agreement = Agreement(world.member(rank), 0)
        self.counts = [0] * EXPERTS
        self.rounds: dict[int, bool] = {}
        self.waiting: list[int] = []
        """Snapshots that are not whole yet."""
        self.records = NO_RECORDS
        self._capture(0, range(len(UNITS)))
        self.book.choose_all(0, self.counts)

    def step(self, number: int, drop: float, levels: Sequence[int]) -> tuple[int, ...] | None:
        """The next snapshot, and a vote for one of these sizes; returns its experts, None where it is left out."""
        iteration = number + 1
        self.counts = [n + self.draw.choice((0, 1, 50)) for n in self.counts]
        while self.waiting and self.draw.random() < 0.8:
            self.rounds[self.waiting.pop(0)] = self.draw.random() >= drop
        for agreed in self.agreement.poll():
            self.choices.hear(agreed)
            settled = Settled(stable=agreed.stable, whole=agreed.recoverable)
            self.records = Newest().keep(self.records, settled)
        recent = dict(sorted(self.rounds.items())[-31:])
        whole = [i for i, is_whole in recent.items() if is_whole]
        size = vote(self.draw.choice(levels))
        self.agreement.start(iteration, rounds=recent, recoverable=whole, vote=size, redundancy=1)
        self.group.contribute(number, self.choices.words(self.counts))
        self.choices.choose(number, iteration, self.counts, self.group.results())
        chosen = self.choices.chosen(number) if self.choices.is_known(number) else None
        if chosen is None:
            self.rounds[iteration] = False
        else:
            self._capture(iteration, (*ALWAYS, *(1 + e for e in chosen)))
            self.waiting.append(iteration)
        return chosen

    def _capture(self, iteration: int, units: Sequence[int]) -> None:
        self.records += Records.make(len(units), unit=list(units), iteration=iteration)

    @property
    def held(self) -> dict[int, set[int]]:
        found: dict[int, set[int]] = {}
        for unit, iteration in self.records.keys:
            found.setdefault(unit, set()).add(iteration)
        return found


class Job:
    """Two groups of ranks that share experts."""

    def __init__(self, draw: random.Random, delivered: Callable[[int], int]) -> None:
        self.draw = draw
        members = [rank for group in GROUPS for rank in group]
        world = Board(members, combine_words, delivered)
        boards = [Board(group, combine_counts, delivered) for group in GROUPS]
        self.ranks = [Rank(r, draw, world, board) for group, board in zip(GROUPS, boards, strict=True) for r in group]

    def step(
        self, number: int, drop: float = 0.0, levels: Sequence[int] = (LEVELS - 1,)
    ) -> list[tuple[int, ...] | None]:
        """All ranks' experts, by rank."""
        order = self.draw.sample(self.ranks, len(self.ranks))
        chosen = {rank.rank: rank.step(number, drop, levels) for rank in order}
        for group in GROUPS:
            assert len({chosen[r] for r in group if chosen[r] is not None}) <= 1, f"snapshot {number}: {chosen}"
        return [chosen[r] for r in range(len(self.ranks))]

    def check_recoverable(self) -> None:
        """What some rank takes for stable can be recovered, although ranks free captures at different moments."""
        stable = max(rank.agreement.stable for rank in self.ranks)
        for group in GROUPS:
            held = [self.ranks[r].held for r in group]
            common = {u: set.intersection(*(h.get(u, set()) for h in held)) for u in range(1, EXPERTS + 1)}
            for own in held:
                assert not isinstance(choose_newest_experts(UNITS, {**own, **common}, stable), str), f"T is {stable}"


@given(st.integers(0, 10**9), st.sampled_from((0.0, 0.1, 0.4)), st.sampled_from((0.3, 0.7, 1.0)))
@settings(max_examples=40, deadline=None)
def test_whenever_ranks_hear_they_choose_alike_and_the_stable_iteration_can_be_recovered(
    seed: int, drop: float, prompt: float
) -> None:
    draw = random.Random(seed)
    job = Job(draw, lambda _: draw.choice((1, 2, 5, 100)) if draw.random() < prompt else 0)
    for number in range(60):
        job.step(number, drop, levels=(1, *[LEVELS - 1] * 20))
        job.check_recoverable()


def test_a_rank_that_hears_late_leaves_its_snapshots_out_and_comes_back() -> None:
    deaf: set[int] = set()
    job = Job(random.Random(0), lambda rank: 0 if rank in deaf else 100)
    first, late = job.ranks[:2]
    for number in range(10):
        assert None not in job.step(number)
    deaf.add(1)
    chosen = [job.step(number) for number in range(10, 16)]
    assert all(row[1] is None for row in chosen[1:]), "of the first one it may have heard before"
    assert all(row[0] is not None for row in chosen)
    stood = late.agreement.stable
    deaf.clear()
    for number in range(16, 26):
        row = job.step(number)
        assert row[0] == row[1] is not None
        job.check_recoverable()
    assert late.agreement.stable > stood + 8
    assert first.book.ledger.staleness == late.book.ledger.staleness
    assert first.book.ledger.unsaved == late.book.ledger.unsaved


def test_rounds_without_a_result_are_passed_over() -> None:
    """A rank that was away for long gives its oldest rounds up, and then nobody has a result of them."""
    rules = Rules(policy="unsaved-tokens", reserved=1, most=1, staleness_cap=9, interval=1)
    book = ExpertBook(names=NAMES, layers=["dense"] * EXPERTS, rules=rules)
    choices = Choices(book, Sizes(1, 1), interval=1)
    results = {
        2: [Reduced(number=1, words=(0, 0, 0, 9, 0, 0, 0))],
        7: [Reduced(number=6, words=(5, 9, 9, 9, 9, 99, 9))],
    }
    known = []
    for number in range(9):
        choices.choose(number, number + 1, [0] * EXPERTS, results.get(number, ()))
        known.append(choices.is_known(number))
    assert known == [True, False, True, False, False, False, False, True, False]
    assert book.ledger.totals == [9, 9, 9, 9, 99, 9]
