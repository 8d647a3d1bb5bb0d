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
    """One rotation and what it is told, iteration by iteration; others can recover all, as far as they say."""

    def __init__(self, log: GradientLog, iteration: int = 0, bases: Mapping[int, int] | None = None) -> None:
        self.log = log
        self.first = self.iteration = iteration
        self.stable = iteration
        self.rotation = Rotation(log, iteration, bases or dict.fromkeys(log.log_of, iteration))
        self.turns: dict[int, Turn] = {}
        self.reached = {iteration}
        """The iterations that could be recovered at some time."""

    def step(
        self,
        *,
        is_there: bool = True,
        captured: bool = True,
        late: bool = False,
        zero: Collection[int] = NONE,
        hears: bool = True,
        can_be_logged: bool = True,
    ) -> Turn:
        """One snapshot; ``zero``: slices without a gradient; ``hears``: of the agreement about the one before last."""
        self.iteration += 1
        if hears and self.iteration - 2 > self.first:
            self.hear(self.iteration - 2)
        if not can_be_logged:
            self.rotation.interrupt(self.iteration)
        turn = self.turns[self.iteration] = self.rotation.turn(self.iteration)
        self.rotation.begin(self.iteration, turn)
        zeros = frozenset(self.log.log_of[u] for u in zero) & frozenset(turn.logs)
        is_there = is_there and not turn.is_gap
        self.rotation.packed(is_there=is_there, captured=captured and not late, late=late, zero=zeros)
        self.reached |= set(self.reachable())
        return turn

    def hear(self, iteration: int, given_up: bool = False) -> None:
        """All ranks can recover an iteration that this one can, unless one of them has given it up."""
        is_recoverable = not given_up and iteration in self.reachable()
        self.stable = iteration if is_recoverable else self.stable
        self.rotation.settle(self.stable, {iteration: is_recoverable})

    def gap(self) -> Turn:
        """A snapshot that is not there; the turn after it."""
        self.step(is_there=False)
        return self.step()

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
    assert rank.reached == set(range(3 * period + 1))


def test_after_a_recovery_the_oldest_capture_has_the_first_turn() -> None:
    log = equal_groups(4)
    rank = Rank(log, 20, dict(zip(log.log_of, (19, 17, 20, 18), strict=True)))
    assert rank.groups(5) == [(1,), (3,), (0,), (2,), (1,)]
    assert rank.reached == set(range(20, 26))


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
    assert rank.reached == {0, 1, 2, 3, 4, 5}, "gradients were logged"


def test_a_rank_without_parameters_has_turns_of_nothing() -> None:
    rank = Rank(cut(4, []))
    assert rank.steps(3) == [Turn(groups=(), captures=(), logs=())] * 3
    rank.step(is_there=False)
    rank.step()
    assert rank.reached == {0, 1, 2, 3, 5}


# -- slices without a gradient --------------------------------------------------------------------------------------


def test_a_quiet_slice_is_left_out_once_in_a_row() -> None:
    rank = Rank(equal_groups(2))
    quiet = rank.log.groups[1]
    captures = [rank.step(zero=quiet).captures for _ in range(12)]
    assert captures[0::2] == [rank.log.groups[0]] * 6
    assert captures[1::2] == [quiet, (), quiet, (), quiet, ()]
    assert rank.rotation.spared_bytes == 3 * rank.log.group_bytes[1]
    assert rank.reached == set(range(13))


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


NOTHING = Turn(groups=(), captures=(), logs=(), is_gap=True)


@given(st.integers(2, 20), st.integers(1, 40), st.integers(1, 60))
def test_chains_begin_anew_all_at_once_right_after_a_gap(period: int, size: int, before: int) -> None:
    rank = Rank(cut(period, [size, 2 * size, 3 * size]))
    rank.steps(before)
    turn = rank.gap()
    assert (sorted(turn.captures), turn.logs) == (sorted(rank.log.log_of), ())
    assert rank.rotation.is_whole
    assert rank.reached == set(range(before + 3)) - {before + 1}


def test_what_old_chains_lead_to_is_not_given_up_for_new_ones() -> None:
    """While it is not known which iteration is stable, any that was said to be recoverable may be."""
    rank = Rank(equal_groups(4))
    rank.steps(5)
    rank.step(is_there=False, hears=False)
    assert [rank.step(hears=False) for _ in range(20)] == [NOTHING] * 20
    assert rank.reachable() == [3, 4, 5]
    assert rank.rotation.settled.broken == -1
    rank.hear(4)
    assert rank.step(hears=False) == NOTHING, "5 may still become stable"
    assert rank.reachable() == [4, 5]
    rank.hear(5)
    assert rank.rotation.settled.broken == rank.iteration
    assert sorted(rank.step(hears=False).captures) == sorted(rank.log.log_of)


def test_what_another_rank_gives_up_is_waited_for_no_longer() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(5)
    rank.step(is_there=False, hears=False)
    rank.hear(4, given_up=True)
    assert rank.step(hears=False) == NOTHING
    rank.hear(5, given_up=True)
    assert (rank.reachable(), rank.rotation.settled.broken) == ([3], 7)
    assert sorted(rank.step(hears=False).captures) == sorted(rank.log.log_of)


def test_gaps_in_a_row_are_one_gap() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(5)
    for _ in range(30):
        rank.step(is_there=False)
    assert sorted(rank.step().captures) == sorted(rank.log.log_of)
    assert rank.reachable() == [5, 36]


def test_where_all_at_once_is_late_they_begin_in_parts() -> None:
    rank = Rank(equal_groups(8))
    rank.steps(8)
    rank.step(is_there=False)
    counts = []
    while not rank.rotation.is_whole:
        counts.append(len(rank.step(late=not counts or counts[-1] > 2).groups))
    assert counts == [8, 4, 2, 1, 1, 1, 1, 1, 1, 1, 1], "the third is late too, for all that it knows"


def test_after_every_gap_all_at_once_is_tried_first() -> None:
    rank = Rank(equal_groups(8))
    rank.steps(8)
    rank.step(is_there=False)
    assert [len(rank.step(late=late).groups) for late in (True, True, False)] == [8, 4, 2]
    while not rank.rotation.is_whole:
        rank.step()
    rank.steps(3)
    assert len(rank.gap().groups) == 8


def test_after_a_gap_in_between_more_is_tried_at_once() -> None:
    rank = Rank(equal_groups(8))
    rank.steps(8)
    rank.step(is_there=False)
    assert [len(rank.step(late=True).groups) for _ in range(3)] == [8, 4, 2]
    assert len(rank.step(is_there=False).groups) == 1
    assert len(rank.step().groups) == 2


def test_captures_that_find_no_room_while_chains_begin_anew_are_tried_again() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(4)
    rank.step(is_there=False)
    without_room = rank.step(captured=False)
    again = rank.step()
    assert (again.groups, again.logs) == (without_room.groups, ())


# -- while the stable iteration stands still ------------------------------------------------------------------------


def test_each_slice_is_captured_once_more_and_every_gradient_logged() -> None:
    """There are two slots a slice: one for the stable iteration, and one after it."""
    rank = Rank(equal_groups(4))
    rank.steps(4)
    stable = rank.stable
    turns = [rank.step(hears=False) for _ in range(10)]
    taken = [u for turn in [*map(rank.turns.__getitem__, range(stable + 1, 5)), *turns] for u in turn.captures]
    assert sorted(taken) == sorted(rank.log.log_of)
    assert all(turn.logs == tuple(rank.log.log_of.values()) for turn in turns)
    assert rank.reachable() == list(range(stable, rank.iteration + 1))


def test_what_another_rank_has_dropped_breaks_nothing_here() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(5)
    for iteration in (4, 5, 6, 7):
        rank.step(hears=False)
        rank.hear(iteration, given_up=True)
    assert rank.reachable() == [3, 8, 9]
    assert rank.rotation.unreachable == {4, 5, 6, 7}
    assert len(rank.step(hears=False).logs) == 4


# -- steps that cannot be logged ------------------------------------------------------------------------------------


def test_after_such_a_step_all_is_captured_at_the_next_iteration() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(6)
    assert rank.step(can_be_logged=False) == NOTHING, "the second slots are taken until 6 is stable"
    turn = rank.step()
    assert (sorted(turn.captures), turn.logs) == (sorted(rank.log.log_of), ())
    rank.steps(5)
    assert rank.reached == set(range(14)) - {7}


def test_where_no_step_can_be_logged_every_second_iteration_is_captured_as_a_whole() -> None:
    rank = Rank(equal_groups(4))
    rank.steps(6)
    for _ in range(20):
        rank.step(can_be_logged=False)
    assert rank.reached == {*range(7), *range(8, 27, 2)}


# -- what arenas keep -----------------------------------------------------------------------------------------------


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

    rank.rotation.settle(4, {})
    assert kept() == {a: [3, 5, 7], rank.log.log_of[a]: [4, 5, 6, 7], b: [4, 6], host: [4, 5, 6, 7]}
    rank.rotation.settle(4, {6: False})
    assert kept() == {a: [3, 5, 7], rank.log.log_of[a]: [4, 5, 6, 7], b: [4, 6], host: [4, 5, 7]}, "7 is to come"
    rank.step(is_there=False, hears=False)
    rank.rotation.settle(5, {5: True})
    assert kept() == {a: [5, 7], rank.log.log_of[a]: [6, 7], b: [4, 6], host: [5, 7]}
    rank.rotation.settle(5, {7: False})
    assert kept() == {a: [5], rank.log.log_of[a]: [], b: [4], host: [5]}
