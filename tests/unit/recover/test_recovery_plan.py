# SPDX-License-Identifier: Apache-2.0
"""The recovery plan: the newest iteration that all ranks can reach, from where, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from world import Left, World, plan_world, restamped

from megatron_moetion.recover.plan import (
    Choose,
    NoPlan,
    Reach,
    choose_newest_experts,
    choose_same_iteration,
    custodian,
    plan_of,
)
from megatron_moetion.recover.report import ArenaReport, History
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.store.manifest import MAX_BRANCHES, Branch, Record, Records
from megatron_moetion.units import UnitKind

DENSE, EXPERT, FROZEN, HOST = range(4)
UNITS = (
    ("dense", UnitKind.DENSE),
    ("layers.0.experts.0", UnitKind.EXPERT),
    ("frozen", UnitKind.FROZEN),
    ("host", UnitKind.HOST),
)
TWO = place(["a", "b"], 1)  # both ranks hold shards of the one expert


def captures(owner: int, *, dense: Iterable[int], expert: Iterable[int], epoch: int = 0) -> list[Record]:
    """Dense and host state at ``dense``, the expert at ``expert``, the frozen unit at 0."""
    taken = [(DENSE, i) for i in dense] + [(HOST, i) for i in dense] + [(EXPERT, i) for i in expert] + [(FROZEN, 0)]
    return [
        Record(unit=u, iteration=i, epoch=epoch, slot=n, nbytes=64, digest=owner * 10**6 + u * 10**4 + i, tokens=i)
        for n, (u, i) in enumerate(taken)
    ]


def left(
    node: int,
    owner: int,
    dense: Iterable[int],
    expert: Iterable[int] = (0,),
    epoch: int = 0,
    branches: tuple[Branch, ...] = (),
    stable: int = 0,
) -> Left:
    return Left(
        node=node,
        report=ArenaReport(
            path=f"/store/node{node}/rank{owner:05d}.arena",
            owner=owner,
            history=History(epoch=epoch, stable=stable, branches=branches),
            records=Records.of(captures(owner, dense=dense, expert=expert)),
        ),
    )


def with_captures(found: Left, records: Iterable[Record]) -> Left:
    return replace(found, report=replace(found.report, records=Records.of(records)))


def everywhere(dense: Iterable[int], expert: Iterable[int] = (0,)) -> list[Left]:
    """The same captures of both ranks on both nodes."""
    return [left(n, o, list(dense), list(expert)) for n in range(2) for o in range(2)]


def planned(found: Iterable[Left], choose: Choose = choose_newest_experts, placement: Placement = TWO) -> World:
    world = plan_world([UNITS] * 2, list(found), placement, choose)
    assert isinstance(world, World), world
    return world


def refused(found: Iterable[Left], choose: Choose = choose_newest_experts) -> NoPlan:
    plan = plan_world([UNITS] * 2, list(found), TWO, choose)
    assert isinstance(plan, NoPlan), plan
    return plan


def iterations(world: World) -> list[list[int]]:
    return [[c.iteration for c in row] for row in world.choices]


# -- which iteration ------------------------------------------------------------------------------------------


def test_the_newest_iteration_that_all_ranks_have() -> None:
    plan = planned([left(0, 0, [8, 10]), left(1, 1, [8, 9])])
    assert plan.iteration == 8
    assert iterations(plan) == [[8, 0, 0, 8]] * 2
    assert (plan.plan.epoch, plan.plan.branches) == (1, (Branch(epoch=1, iteration=8),))


def test_in_mode_full_experts_are_at_t_too() -> None:
    reports = [left(0, 0, [8, 9], [8, 9]), left(1, 1, [8, 9], [8])]
    assert planned(reports, choose_same_iteration).iteration == 8
    assert planned(reports, choose_newest_experts).iteration == 9
    assert iterations(planned(reports, choose_newest_experts)) == [[9, 8, 0, 9]] * 2


def test_an_expert_is_never_assembled_from_two_iterations() -> None:
    plan = planned([left(0, 0, [9], [3, 5, 7]), left(1, 1, [9], [3, 5, 8])])
    assert iterations(plan) == [[9, 5, 0, 9]] * 2


def test_an_experts_capture_beyond_t_is_not_used() -> None:
    plan = planned([left(0, 0, [8, 9], [4, 9]), left(1, 1, [8], [4, 9])])
    assert iterations(plan) == [[8, 4, 0, 8]] * 2


def test_a_frozen_unit_comes_from_the_baseline() -> None:
    full = planned(everywhere([7], [7]), choose_same_iteration)
    assert [row[FROZEN].iteration for row in full.choices] == [0, 0]


def test_safe_is_the_newest_iteration_that_was_agreed_on_and_never_beyond_t() -> None:
    assert planned([left(0, 0, [8, 9], stable=7), left(1, 1, [8, 9], stable=8)]).plan.safe == 8
    assert planned([left(0, 0, [6], stable=7), left(1, 1, [6], stable=7)]).plan.safe == 6


# -- from where -----------------------------------------------------------------------------------------------


def test_local_memory_is_preferred_and_nothing_moves_when_all_is_there() -> None:
    plan = planned(everywhere([5]))
    assert [[c.node for c in row] for row in plan.choices] == [[0] * 4, [1] * 4]
    assert plan.fetches == plan.copies == []


def test_a_lost_node_is_rebuilt_from_the_other() -> None:
    plan = planned([left(0, 0, [5]), left(0, 1, [5])])
    assert {(t.owner, t.source, t.target) for t in plan.fetches} == {(1, 0, 1)}
    assert {t.unit for t in plan.fetches} == set(range(4))
    assert {(t.owner, t.source, t.target) for t in plan.copies} == {(0, 0, 1)}
    assert {t.unit for t in plan.copies} == set(range(4))


def test_only_what_is_missing_is_fetched() -> None:
    damaged = left(1, 1, [5])
    damaged = with_captures(damaged, (r for r in damaged.report.records if r.unit != DENSE))
    plan = planned([left(0, 0, [5]), left(0, 1, [5]), left(1, 0, [5]), damaged])
    assert [(t.owner, t.unit, t.source, t.target) for t in plan.fetches] == [(1, DENSE, 0, 1)]
    assert plan.choices[1][DENSE].node == 0
    assert plan.copies == []


def test_a_choice_carries_digest_and_tokens_of_the_capture() -> None:
    choice = planned(everywhere([5], [4])).choices[1][EXPERT]
    assert (choice.digest, choice.tokens) == (10**6 + EXPERT * 10**4 + 4, 4)


def two_units(node: int, owner: int, iteration: int) -> Left:
    records = [Record(unit=u, iteration=iteration, epoch=0, slot=u, nbytes=64, digest=owner) for u in range(2)]
    return Left(node=node, report=ArenaReport(path="x", owner=owner, records=Records.of(records)))


@pytest.mark.parametrize("swapped", [False, True])
def test_ranks_that_land_on_other_nodes_find_their_state(swapped: bool) -> None:
    """Four ranks, two a node. If swapped, ranks 0 and 1 now run where 2 and 3 ran, and the other way round."""
    units = [(UNITS[DENSE], UNITS[HOST])] * 4
    placement = place(["a", "a", "b", "b"], 1)

    def plan_from(replicas: bool) -> World:
        found = [
            two_units(node, owner, 6)
            for owner in range(4)
            for node in range(2)
            if replicas or (node == owner // 2) != swapped
        ]
        world = plan_world(units, found, placement, choose_same_iteration)
        assert isinstance(world, World)
        return world

    assert plan_from(replicas=True).fetches == []
    expected = {(0, 2, 0), (1, 3, 1), (2, 0, 2), (3, 1, 3)} if swapped else set()
    assert {(t.owner, t.source, t.target) for t in plan_from(replicas=False).fetches} == expected


def test_a_node_that_should_not_have_it_is_a_source_too() -> None:
    """Three nodes after a permutation: rank 0's only copy is on node 1, which is neither its home nor its buddy's."""
    placement = place(["a", "b", "c"], 1)  # ring: 0 -> 1 -> 2 -> 0
    where = {0: 2, 1: 0, 2: 1}
    found = [two_units(node, owner, 4) for owner, node in where.items()]
    plan = plan_world([(UNITS[DENSE], UNITS[HOST])] * 3, found, placement, choose_same_iteration)
    assert isinstance(plan, World)
    assert {(t.owner, t.source, t.target) for t in plan.fetches} == {(0, 2, 0), (1, 0, 1), (2, 1, 2)}
    for owner, node in where.items():
        assert placement.node_of[custodian(owner, node, placement)] == node


def test_a_custodian_is_the_owner_then_the_buddy_then_somebody_of_the_node() -> None:
    placement = place(["a", "a", "b", "b", "c", "c"], 1)
    assert custodian(1, 0, placement) == 1
    assert placement.holders[1] == (3,)
    assert custodian(1, 1, placement) == 3
    assert custodian(1, 2, placement) == 5


# -- histories ------------------------------------------------------------------------------------------------


def test_after_a_failure_in_the_middle_of_a_recovery_t_is_found_again() -> None:
    """Some arenas have begun epoch 1 at T = 8; others are of epoch 0, with captures beyond T, a dead history now."""
    begun = {"epoch": 1, "branches": (Branch(epoch=1, iteration=8),)}
    reports = [
        left(0, 0, [8], **begun), left(0, 1, [8, 9]), left(1, 0, [8, 9]), left(1, 1, [8, 9]),
    ]  # fmt: skip
    plan = planned(reports)
    assert (plan.iteration, plan.plan.history_epoch, plan.plan.epoch) == (8, 1, 2)
    assert plan.plan.branches == (Branch(epoch=1, iteration=8), Branch(epoch=2, iteration=8))


def test_captures_of_a_dead_history_are_refused_although_they_are_newer() -> None:
    branches = (Branch(epoch=1, iteration=8),)
    reports = [
        with_captures(
            left(n, o, [], epoch=1, branches=branches),
            captures(o, dense=[8, 12], expert=[12, 3]) + captures(o, dense=[9], expert=[], epoch=1)[:2],
        )
        for n in range(2)
        for o in range(2)
    ]
    plan = planned(reports)
    assert plan.iteration == 9
    assert iterations(plan) == [[9, 3, 0, 9]] * 2


def test_an_arena_that_was_away_for_several_recoveries_gives_only_what_is_still_history() -> None:
    branches = (Branch(epoch=1, iteration=20), Branch(epoch=2, iteration=6))
    away = left(0, 0, [4, 10])  # epoch 0: 10 was kept by recovery 1 and undone by recovery 2
    now = left(1, 1, [4, 10], epoch=2, branches=branches)
    assert planned([away, now]).iteration == 4


def test_state_outlives_any_number_of_recoveries_that_made_no_progress() -> None:
    """Whoever writes an epoch re-stamps what it keeps, so a crash loop of any length loses nothing."""
    reports = everywhere([8])
    for _ in range(MAX_BRANCHES + 8):
        plan = planned(reports)
        assert plan.iteration == 8
        reports = restamped(reports, plan, MAX_BRANCHES)


@given(steps=st.lists(st.booleans(), max_size=12))
def test_recoveries_in_a_row_are_counted_until_something_newer_is_stable(steps: list[bool]) -> None:
    """A step is a recovery, after an iteration that became stable or none."""
    now, expected, found = 5, 0, everywhere([5])
    for is_new in steps:
        if is_new:
            now, expected = now + 1, 0
            epoch = found[0].report.history.epoch
            found = [
                with_captures(each, captures(each.report.owner, dense=[now], expert=[0], epoch=epoch)) for each in found
            ]
        world = planned(found)
        assert (world.iteration, world.plan.fruitless) == (now, expected)
        expected += 1
        found = restamped(found, world, MAX_BRANCHES)


def test_a_recovery_to_something_older_still_counts_the_ones_before() -> None:
    branches = tuple(Branch(epoch=e, iteration=i) for e, i in ((1, 3), (2, 9), (3, 9)))
    found = [
        with_captures(left(n, o, [], epoch=3, branches=branches), captures(o, dense=[8], expert=[0], epoch=3))
        for n in range(2)
        for o in range(2)
    ]
    assert planned(found).plan.fruitless == 2


def reaching(*iterations: int, vetoed: tuple[int, ...] = ()) -> Reach:
    return Reach(hosts=iterations, iterations=iterations, vetoed=vetoed)


@pytest.mark.parametrize(
    ("vetoed", "stable", "iteration", "said"),
    [
        ((), 5, 9, ()),
        ((9,), 5, 8, (9,)),
        ((8, 6), 5, 9, ()),
        ((9, 8), 5, 6, (9, 8)),
        ((9, 8, 6), 5, 9, (9,)),
        ((9, 8, 6), 8, 8, (9,)),
    ],
)
def test_a_vetoed_iteration_is_left_out_while_there_is_another_unless_it_was_stable(
    vetoed: tuple[int, ...], stable: int, iteration: int, said: tuple[int, ...]
) -> None:
    together = reaching(9, 8, 6, vetoed=vetoed[:1]).followed_by(reaching(9, 8, 7, 6, vetoed=(7, *vetoed[1:])))
    found = plan_of(Reach.from_json(together.to_json()), History(stable=stable), nonce=0)
    assert found is not None
    assert (found.iteration, found.vetoed) == (iteration, said)


# -- no plan --------------------------------------------------------------------------------------------------


def test_without_arenas_the_run_never_began() -> None:
    assert refused([]) == NoPlan(reason="no arena of this run was found on any node", began=False)


def test_arenas_that_wait_for_their_first_baseline_have_not_begun() -> None:
    assert not refused([with_captures(left(0, 0, [], stable=-1), ())]).began
    assert refused([with_captures(left(0, 0, [], stable=0), ())]).began


def test_a_damaged_arena_counts_as_begun() -> None:
    problem = "x: neither manifest page verifies"
    broken = Left(node=0, report=ArenaReport(path="x", problem=problem))
    assert refused([broken]) == NoPlan(reason=problem, began=True)
    assert refused([broken, with_captures(left(1, 1, [], stable=-1), ())]).began


def test_of_many_problems_the_first_are_told_and_the_others_counted() -> None:
    found = refused([Left(node=0, report=ArenaReport(path="x", problem=f"problem {n}")) for n in range(9)])
    assert found.reason == "problem 0; problem 1; problem 2; and 6 more"


def test_ranks_without_a_copy_are_named() -> None:
    found = refused([left(1, 1, [5], epoch=3, branches=tuple(Branch(epoch=e, iteration=9) for e in (1, 2, 3)))])
    assert found.reason == "no copy of rank(s) 0 is left on any node"
    assert found.began


def test_many_ranks_without_a_copy_are_counted() -> None:
    twelve = place([str(r) for r in range(12)], 1)
    found = plan_world([UNITS] * 12, [left(0, 0, [5])], twelve, choose_same_iteration)
    assert isinstance(found, NoPlan)
    assert found.reason == "no copy of rank(s) 1, 2, 3, 4, 5, 6, 7, 8 and 3 more is left on any node"


def test_no_common_iteration_is_said() -> None:
    found = refused([left(0, 0, [5]), left(1, 1, [6])])
    assert found.reason == "there is no iteration of which every rank has its host state"


def test_what_is_missing_is_named_for_each_iteration() -> None:
    lacking = left(1, 1, [5, 6])
    lacking = with_captures(lacking, (r for r in lacking.report.records if r.unit != DENSE))
    reason = refused([left(0, 0, [5, 6]), lacking]).reason
    assert "iteration 6: rank 1 has no copy of dense" in reason
    assert "iteration 5: rank 1 has no copy of dense" in reason
    torn = refused([left(0, 0, [5], [2]), left(1, 1, [5], [3])]).reason
    assert torn == "iteration 5: rank 0 has no iteration of layers.0.experts.0 that all its shards have"


def test_a_missing_newer_iteration_falls_back_to_an_older_one() -> None:
    lacking = left(1, 1, [5, 6])
    lacking = with_captures(lacking, (r for r in lacking.report.records if r.key != (DENSE, 6)))
    assert planned([left(0, 0, [5, 6]), lacking]).iteration == 5


# -- one plan on all ranks ------------------------------------------------------------------------------------


def test_the_plan_does_not_depend_on_the_order_of_reports() -> None:
    reports = [left(0, 0, [5, 6], [2]), left(0, 1, [5], [2]), left(1, 1, [5, 6], [2, 3]), left(1, 0, [6], [2])]
    worlds = [planned(order) for order in (reports, reports[::-1], reports[2:] + reports[:2])]
    assert len({world.plan.digest for world in worlds}) == 1
    assert len({tuple(order.to_bytes() for order in world.orders.values()) for world in worlds}) == 1


def test_plans_that_differ_have_different_digests() -> None:
    assert planned(everywhere([5])).plan.digest != planned(everywhere([6])).plan.digest
