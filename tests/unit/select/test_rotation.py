# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is in mode ``exact``, and what becomes of chains when a snapshot is not whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.select.rotation import Rotation, Turn
from megatron_moetion.snapshot.gradlog import GradientLog, gradient_log
from megatron_moetion.store.chains import ChainLayout
from megatron_moetion.store.manifest import Record, Records
from megatron_moetion.store.retention import Chains
from megatron_moetion.units import HOST_UNIT, Inventory, Region, Role, Unit, UnitKind

NONE: frozenset[int] = frozenset()


def cut(period: int, sizes: Collection[int]) -> GradientLog:
    """Units of so many times 64 elements, and a host state."""
    units = []
    for number, size in enumerate(sizes):
        roles = (Role.MASTER, Role.EXP_AVG, Role.EXP_AVG_SQ, Role.GRAD)
        regions = [
            Region(unit=f"u{number}", tensor="w", role=r, dtype="float32", start=0, nbytes=256 * size, address=1 << 20)
            for r in roles
        ]
        units.append(Unit(name=f"u{number}", kind=UnitKind.DENSE, regions=tuple(regions)))
    host = Unit(name=HOST_UNIT, kind=UnitKind.HOST, regions=(), reserved_bytes=100)
    return gradient_log(Inventory(units=(*units, host)), period)


class Rank:
    """One rotation and what it is told, iteration by iteration."""

    def __init__(self, log: GradientLog, iteration: int = 0, bases: Mapping[int, int] | None = None) -> None:
        self.log = log
        self.iteration = iteration
        self.rotation = Rotation(log, iteration, bases or dict.fromkeys(log.log_of, iteration))
        self.turns: dict[int, Turn] = {}

    def step(
        self, *, is_there: bool = True, captured: bool = True, late: bool = False, zero: Collection[int] = NONE
    ) -> Turn:
        """One snapshot; ``zero``: slices without a gradient."""
        self.iteration += 1
        turn = self.turns[self.iteration] = self.rotation.turn(self.iteration)
        self.rotation.begin(self.iteration, turn)
        zeros = frozenset(self.log.log_of[u] for u in zero) & frozenset(turn.logs)
        self.rotation.packed(is_there=is_there, captured=captured and not late, late=late, zero=zeros)
        return turn

    def gap(self) -> None:
        """A snapshot that is not there; two iterations later all ranks know."""
        self.step(is_there=False)
        waiting = [self.step() for _ in range(2)]
        assert waiting == [Turn(groups=(), captures=(), logs=())] * 2
        at = self.iteration - 2
        self.rotation.settle(max(0, at - 1), {at: False}, {at: False})

    def steps(self, number: int) -> list[Turn]:
        return [self.step() for _ in range(number)]

    def groups(self, number: int) -> list[tuple[int, ...]]:
        return [turn.groups for turn in self.steps(number)]

    def reachable(self, *missing: int) -> list[int]:
        return self.rotation.reachable({i: i not in missing for i in range(self.iteration + 1)})

    def bytes_of(self, turn: Turn) -> int:
        return sum(self.log.inventory.units[u].nbytes for u in (*turn.captures, *turn.logs))


def equal_groups(period: int) -> GradientLog:
    """One slice a group."""
    return cut(period, [10] * period)


# -- while all goes well ------------------------------------------------------------------------------------------


@given(st.integers(2, 20), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_each_group_has_one_turn_a_period_and_every_gradient_is_logged(period: int, sizes: list[int]) -> None:
    log = cut(period, sizes)
    groups = [g for g in log.groups if g]
    rank = Rank(log)
    for number, turn in enumerate(rank.steps(3 * period)):
        assert number < 1 or len(groups) == 1 or turn.captures == groups[number % len(groups)]
        assert turn.logs == tuple(log.log_of.values())
    assert rank.reachable() == list(range(3 * period + 1))


def test_after_a_recovery_the_oldest_capture_has_the_first_turn() -> None:
    log = equal_groups(4)
    rank = Rank(log, 20, dict(zip(log.log_of, (19, 17, 20, 18), strict=True)))
    assert rank.groups(5) == [(1,), (3,), (0,), (2,), (1,)]
    assert rank.reachable() == list(range(20, 26))


def test_a_group_is_as_old_as_its_newest_capture() -> None:
    """A slice that was spared lies one period further back, and is no reason to hurry."""
    log = cut(2, [10, 10, 10, 10])
    assert len(log.groups[0]) == 2
    ages = dict.fromkeys(log.groups[0], 18) | dict.fromkeys(log.groups[1], 19) | {log.groups[1][0]: 17}
    assert Rank(log, 19, ages).groups(2) == [(0,), (1,)]


def test_captures_that_are_missing_have_their_turn_again() -> None:
    rank = Rank(equal_groups(3))
    rank.step()
    late = rank.step(captured=False)
    assert [late.groups, *rank.groups(3)] == [(1,), (1,), (2,), (0,)]
    assert rank.reachable() == [0, 1, 2, 3, 4, 5], "gradients were logged"


def test_a_rank_without_parameters_has_turns_of_nothing() -> None:
    rank = Rank(cut(4, []))
    assert rank.steps(3) == [Turn(groups=(), captures=(), logs=())] * 3
    rank.step(is_there=False)
    rank.step()
    assert rank.reachable(4) == [0, 1, 2, 3, 5]


# -- slices without a gradient --------------------------------------------------------------------------------------


def test_a_quiet_slice_is_left_out_once_in_a_row() -> None:
    rank = Rank(equal_groups(2))
    quiet = rank.log.groups[1]
    captures = [rank.step(zero=quiet).captures for _ in range(12)]
    assert captures[0::2] == [rank.log.groups[0]] * 6
    assert captures[1::2] == [quiet, (), quiet, (), quiet, ()]
    assert rank.rotation.spared_bytes == 3 * rank.log.group_bytes[1]
    assert rank.reachable() == list(range(13))


def test_one_gradient_since_the_capture_is_enough_for_the_next() -> None:
    rank = Rank(equal_groups(3))
    quiet = rank.log.groups[0]
    assert rank.step(zero=quiet).captures == quiet
    rank.step(zero=quiet)
    rank.step()
    assert rank.step(zero=quiet).captures == quiet
    rank.step(zero=quiet)
    rank.step(zero=quiet)
    assert rank.step(zero=quiet).captures == ()
    assert rank.rotation.spared_bytes == rank.log.group_bytes[0]


def test_what_was_zero_before_the_first_capture_spares_nothing() -> None:
    """The baseline does not count: the runtime has not seen what came before it."""
    rank = Rank(equal_groups(4))
    everything = list(rank.log.log_of)
    assert [rank.step(zero=everything).captures for _ in range(4)] == list(rank.log.groups)
    assert [rank.step(zero=everything).captures for _ in range(4)] == [()] * 4


def test_a_quiet_slice_that_missed_its_second_turn_is_not_spared_again() -> None:
    rank = Rank(equal_groups(2))
    quiet = rank.log.groups[0]
    rank.step(zero=quiet)
    rank.step(zero=quiet)
    assert rank.step(zero=quiet).captures == ()
    rank.step(zero=quiet)
    assert rank.step(zero=quiet, captured=False).captures == quiet
    assert rank.step(zero=quiet).captures == quiet
    assert rank.rotation.spared_bytes == rank.log.group_bytes[0], "counted when the snapshot was made"


def test_only_the_quiet_slices_of_a_group_are_left_out() -> None:
    rank = Rank(cut(2, [10, 10, 10, 10]))
    loud, quiet = rank.log.groups[0]
    captures = [rank.step(zero=[quiet]).captures for _ in range(5)]
    assert captures[0::2] == [(loud, quiet), (loud,), (loud, quiet)]


# -- snapshots that are not whole -------------------------------------------------------------------------------------


def test_a_snapshot_that_is_not_there_breaks_every_chain() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(5)
    rank.gap()
    assert not rank.rotation.is_whole
    assert rank.reachable(6) == [], "no chain leads over the gap"


@given(st.integers(2, 20), st.integers(1, 40), st.integers(0, 60))
def test_chains_begin_anew_all_at_once(period: int, size: int, before: int) -> None:
    rank = Rank(cut(period, [size, 2 * size, 3 * size]))
    rank.steps(before)
    rank.gap()
    turn = rank.step()
    assert (sorted(turn.captures), turn.logs) == (sorted(rank.log.log_of), ())
    assert rank.rotation.is_whole
    assert rank.reachable(before + 1) == [rank.iteration]
    taking_turns = [(g,) for g in range(len([g for g in rank.log.groups if g]))]
    assert rank.groups(len(taking_turns)) == taking_turns


def test_where_all_at_once_is_late_they_begin_in_parts() -> None:
    rank = Rank(equal_groups(8))
    rank.steps(8)
    rank.gap()
    counts = []
    while not rank.rotation.is_whole:
        counts.append(len(rank.step(late=not counts or counts[-1] > 2).groups))
    assert counts == [8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1], "the third is late too, for all that it knows"


def test_after_every_gap_all_at_once_is_tried_first() -> None:
    rank = Rank(equal_groups(8))
    rank.steps(8)
    rank.gap()
    assert [len(rank.step(late=late).groups) for late in (True, True, False)] == [8, 4, 2]
    rank.gap()
    assert len(rank.step().groups) == 8


def test_captures_that_find_no_room_while_chains_begin_anew_are_tried_again() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(4)
    rank.gap()
    without_room = rank.step(captured=False)
    again = rank.step()
    assert (again.groups, again.logs) == (without_room.groups, ())


def test_only_slices_without_a_chain_begin_anew() -> None:
    """There are two slots a slice: one for the stable iteration, one for the chain that has begun."""
    rank = Rank(cut(2, [10, 10, 10, 10]))
    loud, quiet = rank.log.groups[0]
    rank.step(zero=[quiet])
    rank.step(zero=[quiet])
    turn = rank.step(zero=[quiet])
    assert turn.captures == (loud,)
    rank.rotation.settle(1, {1: True, 2: False}, {1: True, 2: False})
    assert set(rank.step().captures) == {quiet, *rank.log.groups[1]}
    assert rank.rotation.is_whole


# -- what can be recovered --------------------------------------------------------------------------------------------


def test_an_iteration_is_reachable_once_every_chain_has_begun_after_the_gap() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(5)
    rank.gap()
    while not rank.rotation.is_whole:
        rank.step()
    first = rank.iteration
    rank.steps(3)
    assert rank.reachable(6) == list(range(first, first + 4))


def test_a_snapshot_that_a_buddy_refused_is_a_gap_too_before_it_is_settled() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(8)
    assert rank.reachable(5) == [0, 1, 2, 3, 4], "all captures at 5 ... 8, but chains of 8 begin at 5"
    rank.steps(1)
    assert rank.reachable(5) == [0, 1, 2, 3, 4, 9]


def test_a_snapshot_that_another_rank_dropped_breaks_chains_here() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(7)
    rank.rotation.settle(5, {5: True, 6: False}, {5: True, 6: False})
    assert not rank.rotation.is_whole
    assert rank.reachable() == [], "what was whole here goes back to before the gap"
    turn = rank.step()
    assert turn.logs == tuple(rank.log.log_of[u] for u in rank.turns[7].captures), "begun after the gap"
    assert not {*turn.groups} & {*rank.turns[7].groups}


def test_a_snapshot_that_is_whole_and_cannot_be_recovered_breaks_nothing() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(7)
    rank.rotation.settle(5, {5: True, 6: False}, {5: True, 6: True})
    assert rank.rotation.is_whole
    assert rank.reachable() == [5, 6, 7]
    assert len(rank.step().logs) == 4


def test_iterations_before_the_stable_one_are_forgotten() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(6)
    rank.rotation.settle(4, {i: True for i in range(1, 5)}, {i: True for i in range(1, 5)})
    assert rank.reachable() == [4, 5, 6]


def test_what_arenas_retain_follows_what_was_agreed_on() -> None:
    rank = Rank(equal_groups(2))
    a, b = rank.log.log_of
    layout = ChainLayout(log_of=rank.log.log_of, always=frozenset(rank.log.always))
    (host,) = rank.log.always

    def record(unit: int, iteration: int) -> Record:
        return Record(unit=unit, iteration=iteration, epoch=0, slot=0, nbytes=64, digest=0)

    rank.steps(7)
    records = [record(u, 0) for u in (a, b, host)]
    for iteration, turn in rank.turns.items():
        records += [record(u, iteration) for u in (*turn.captures, *turn.logs, host)]

    def kept() -> dict[int, list[int]]:
        found = Chains(layout).keep(Records.of(records), rank.rotation.settled)
        return {u: [r.iteration for r in found if r.unit == u] for u in (a, rank.log.log_of[a], b, host)}

    rank.rotation.settle(4, {}, {})
    assert kept() == {a: [3, 5, 7], rank.log.log_of[a]: [4, 5, 6, 7], b: [4, 6], host: [4, 5, 6, 7]}
    rank.rotation.settle(4, {5: False, 6: False}, {5: False, 6: True})
    assert kept() == {a: [3, 7], rank.log.log_of[a]: [4], b: [4, 6], host: [4, 7]}, "6 is whole, and a chain is not"
    rank.rotation.settle(7, {7: True}, {7: True})
    assert kept() == {a: [7], rank.log.log_of[a]: [], b: [6], host: [7]}
