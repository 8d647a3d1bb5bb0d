# SPDX-License-Identifier: Apache-2.0
"""The recovery plan: the newest iteration that all ranks can reach, from where, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from megatron_moetion.recover.plan import (
    Choose,
    NoPlan,
    RankFacts,
    RecoveryPlan,
    choose_newest_experts,
    choose_same_iteration,
    custodian,
    plan_recovery,
)
from megatron_moetion.recover.report import ArenaReport
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.store.manifest import MAX_BRANCHES, Branch, Record
from megatron_moetion.units import UnitKind

DENSE, EXPERT, FROZEN, HOST = range(4)
UNITS = (
    ("dense", UnitKind.DENSE),
    ("layers.0.experts.0", UnitKind.EXPERT),
    ("frozen", UnitKind.FROZEN),
    ("host", UnitKind.HOST),
)
FACTS = [RankFacts(rank=r, units=UNITS) for r in range(2)]  # both ranks hold shards of the one expert
TWO = place(["a", "b"], 1)


def captures(owner: int, *, dense: Iterable[int], expert: Iterable[int], epoch: int = 0) -> tuple[Record, ...]:
    """Dense and host state at ``dense``, the expert at ``expert``, the frozen unit at 0."""
    taken = [(DENSE, i) for i in dense] + [(HOST, i) for i in dense] + [(EXPERT, i) for i in expert] + [(FROZEN, 0)]
    return tuple(
        Record(unit=u, iteration=i, epoch=epoch, slot=n, nbytes=64, digest=owner * 10**6 + u * 10**4 + i, tokens=i)
        for n, (u, i) in enumerate(taken)
    )


def report(
    node: int,
    owner: int,
    dense: Iterable[int],
    expert: Iterable[int] = (0,),
    epoch: int = 0,
    branches: tuple[Branch, ...] = (),
    stable: int = 0,
) -> ArenaReport:
    return ArenaReport(
        path=f"/store/node{node}/rank{owner:05d}.arena",
        node=node,
        owner=owner,
        epoch=epoch,
        stable=stable,
        branches=branches,
        captures=captures(owner, dense=dense, expert=expert),
    )


def everywhere(dense: Iterable[int], expert: Iterable[int] = (0,)) -> list[ArenaReport]:
    """The same captures of both ranks on both nodes."""
    return [report(n, o, list(dense), list(expert)) for n in range(2) for o in range(2)]


def planned(
    reports: Iterable[ArenaReport], choose: Choose = choose_newest_experts, placement: Placement = TWO
) -> RecoveryPlan:
    plan = plan_recovery(FACTS, list(reports), placement, choose)
    assert isinstance(plan, RecoveryPlan), plan
    return plan


def refused(reports: Iterable[ArenaReport], choose: Choose = choose_newest_experts) -> NoPlan:
    plan = plan_recovery(FACTS, list(reports), TWO, choose)
    assert isinstance(plan, NoPlan), plan
    return plan


def iterations(plan: RecoveryPlan) -> list[list[int]]:
    return [[c.iteration for c in row] for row in plan.choices]


# -- which iteration ------------------------------------------------------------------------------------------


def test_the_newest_iteration_that_all_ranks_have() -> None:
    plan = planned([report(0, 0, [8, 10]), report(1, 1, [8, 9])])
    assert plan.iteration == 8
    assert iterations(plan) == [[8, 0, 0, 8]] * 2
    assert (plan.epoch, plan.branches) == (1, (Branch(epoch=1, iteration=8),))


def test_in_mode_full_experts_are_at_t_too() -> None:
    reports = [report(0, 0, [8, 9], [8, 9]), report(1, 1, [8, 9], [8])]
    assert planned(reports, choose_same_iteration).iteration == 8
    assert planned(reports, "popularity").iteration == 9
    assert iterations(planned(reports, "popularity")) == [[9, 8, 0, 9]] * 2


def test_an_expert_is_never_assembled_from_two_iterations() -> None:
    plan = planned([report(0, 0, [9], [3, 5, 7]), report(1, 1, [9], [3, 5, 8])])
    assert iterations(plan) == [[9, 5, 0, 9]] * 2


def test_an_experts_capture_beyond_t_is_not_used() -> None:
    plan = planned([report(0, 0, [8, 9], [4, 9]), report(1, 1, [8], [4, 9])])
    assert iterations(plan) == [[8, 4, 0, 8]] * 2


def test_a_frozen_unit_comes_from_the_baseline() -> None:
    full = planned(everywhere([7], [7]), choose_same_iteration)
    assert [row[FROZEN].iteration for row in full.choices] == [0, 0]


def test_safe_is_the_newest_iteration_that_was_agreed_on_and_never_beyond_t() -> None:
    assert planned([report(0, 0, [8, 9], stable=7), report(1, 1, [8, 9], stable=8)]).safe == 8
    assert planned([report(0, 0, [6], stable=7), report(1, 1, [6], stable=7)]).safe == 6


# -- from where -----------------------------------------------------------------------------------------------


def test_local_memory_is_preferred_and_nothing_moves_when_all_is_there() -> None:
    plan = planned(everywhere([5]))
    assert [[c.node for c in row] for row in plan.choices] == [[0] * 4, [1] * 4]
    assert plan.fetches == plan.copies == ()


def test_a_lost_node_is_rebuilt_from_the_other() -> None:
    plan = planned([report(0, 0, [5]), report(0, 1, [5])])
    assert {(t.owner, t.source, t.target) for t in plan.fetches} == {(1, 0, 1)}
    assert {t.unit for t in plan.fetches} == set(range(4))
    assert {(t.owner, t.source, t.target) for t in plan.copies} == {(0, 0, 1)}
    assert {t.unit for t in plan.copies} == set(range(4))


def test_only_what_is_missing_is_fetched() -> None:
    damaged = report(1, 1, [5])
    damaged = replace(damaged, captures=tuple(r for r in damaged.captures if r.unit != DENSE), damaged=1)
    plan = planned([report(0, 0, [5]), report(0, 1, [5]), report(1, 0, [5]), damaged])
    assert [(t.owner, t.unit, t.source, t.target) for t in plan.fetches] == [(1, DENSE, 0, 1)]
    assert plan.choices[1][DENSE].node == 0
    assert plan.copies == ()


def test_a_choice_carries_digest_and_tokens_of_the_capture() -> None:
    choice = planned(everywhere([5], [4])).choices[1][EXPERT]
    assert (choice.digest, choice.tokens) == (10**6 + EXPERT * 10**4 + 4, 4)


@pytest.mark.parametrize("swapped", [False, True])
def test_ranks_that_land_on_other_nodes_find_their_state(swapped: bool) -> None:
    """Four ranks, two a node. If swapped, ranks 0 and 1 now run where 2 and 3 ran, and the other way round."""
    facts = [RankFacts(rank=r, units=(UNITS[DENSE], UNITS[HOST])) for r in range(4)]
    placement = place(["a", "a", "b", "b"], 1)

    def plan_from(replicas: bool) -> RecoveryPlan:
        reports = [
            ArenaReport(
                path=f"{node}/{owner}",
                node=node,
                owner=owner,
                captures=tuple(Record(unit=u, iteration=6, epoch=0, slot=u, nbytes=64, digest=owner) for u in range(2)),
            )
            for owner in range(4)
            for node in range(2)
            if replicas or (node == owner // 2) != swapped
        ]
        plan = plan_recovery(facts, reports, placement, choose_same_iteration)
        assert isinstance(plan, RecoveryPlan)
        return plan

    assert plan_from(replicas=True).fetches == ()
    expected = {(0, 2, 0), (1, 3, 1), (2, 0, 2), (3, 1, 3)} if swapped else set()
    assert {(t.owner, t.source, t.target) for t in plan_from(replicas=False).fetches} == expected


def test_a_node_that_should_not_have_it_is_a_source_too() -> None:
    """Three nodes after a permutation: rank 0's only copy is on node 1, which is neither its home nor its buddy's."""
    placement = place(["a", "b", "c"], 1)  # ring: 0 -> 1 -> 2 -> 0
    facts = [RankFacts(rank=r, units=(UNITS[DENSE], UNITS[HOST])) for r in range(3)]
    where = {0: 2, 1: 0, 2: 1}
    reports = [
        ArenaReport(
            path="x", node=node, owner=owner,
            captures=tuple(Record(unit=u, iteration=4, epoch=0, slot=u, nbytes=64, digest=owner) for u in range(2)),
        )
        for owner, node in where.items()
    ]  # fmt: skip
    plan = plan_recovery(facts, reports, placement, choose_same_iteration)
    assert isinstance(plan, RecoveryPlan)
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
        report(0, 0, [8], **begun), report(0, 1, [8, 9]), report(1, 0, [8, 9]), report(1, 1, [8, 9]),
    ]  # fmt: skip
    plan = planned(reports)
    assert (plan.iteration, plan.history_epoch, plan.epoch) == (8, 1, 2)
    assert plan.branches == (Branch(epoch=1, iteration=8), Branch(epoch=2, iteration=8))


def test_captures_of_a_dead_history_are_refused_although_they_are_newer() -> None:
    branches = (Branch(epoch=1, iteration=8),)
    reports = [
        replace(
            report(n, o, [], epoch=1, branches=branches),
            captures=captures(o, dense=[8, 12], expert=[12, 3]) + captures(o, dense=[9], expert=[], epoch=1)[:2],
        )
        for n in range(2)
        for o in range(2)
    ]
    plan = planned(reports)
    assert plan.iteration == 9
    assert iterations(plan) == [[9, 3, 0, 9]] * 2


def test_an_arena_that_was_away_for_several_recoveries_gives_only_what_is_still_history() -> None:
    branches = (Branch(epoch=1, iteration=20), Branch(epoch=2, iteration=6))
    away = report(0, 0, [4, 10])  # epoch 0: 10 was kept by recovery 1 and undone by recovery 2
    now = report(1, 1, [4, 10], epoch=2, branches=branches)
    assert planned([away, now]).iteration == 4


def test_state_outlives_any_number_of_recoveries_that_made_no_progress() -> None:
    """Whoever writes an epoch re-stamps what it keeps, so a crash loop of any length loses nothing."""
    reports = everywhere([8])
    for _ in range(MAX_BRANCHES + 8):
        plan = planned(reports)
        assert plan.iteration == 8
        reports = [
            replace(
                r,
                epoch=plan.epoch,
                branches=plan.branches[-MAX_BRANCHES:],
                captures=tuple(replace(c, epoch=plan.epoch) for c in r.captures),
            )
            for r in reports
        ]


# -- no plan --------------------------------------------------------------------------------------------------


def test_without_arenas_the_run_never_began() -> None:
    assert refused([]) == NoPlan(reason="no arena of this run was found on any node", began=False, last_epoch=0)


def test_arenas_that_wait_for_their_first_baseline_have_not_begun() -> None:
    empty = replace(report(0, 0, [], stable=-1), captures=())
    assert not refused([empty]).began
    assert refused([replace(empty, stable=0)]).began


def test_a_damaged_arena_counts_as_begun() -> None:
    broken = ArenaReport(path="x", node=0, problem="x: neither manifest page verifies")
    assert refused([broken]) == NoPlan(reason=broken.problem, began=True, last_epoch=0)
    assert refused([broken, replace(report(1, 1, [], stable=-1), captures=())]).began


def test_ranks_without_a_copy_are_named() -> None:
    found = refused([report(1, 1, [5], epoch=3, branches=tuple(Branch(epoch=e, iteration=9) for e in (1, 2, 3)))])
    assert found.reason == "no copy of rank(s) 0 is left on any node"
    assert (found.began, found.last_epoch) == (True, 3)


def test_many_ranks_without_a_copy_are_counted() -> None:
    facts = [RankFacts(rank=r, units=UNITS) for r in range(12)]
    found = plan_recovery(facts, [report(0, 0, [5])], place([str(r) for r in range(12)], 1), choose_same_iteration)
    assert isinstance(found, NoPlan)
    assert found.reason == "no copy of rank(s) 1, 2, 3, 4, 5, 6, 7, 8 and 3 more is left on any node"


def test_no_common_iteration_is_said() -> None:
    found = refused([report(0, 0, [5]), report(1, 1, [6])])
    assert found.reason == "there is no iteration of which every rank has its host state"


def test_what_is_missing_is_named_for_each_iteration() -> None:
    lacking = report(1, 1, [5, 6])
    lacking = replace(lacking, captures=tuple(r for r in lacking.captures if r.unit != DENSE))
    reason = refused([report(0, 0, [5, 6]), lacking]).reason
    assert "iteration 6: unit dense of rank 1 has no copy" in reason
    assert "iteration 5: unit dense of rank 1 has no copy" in reason
    torn = refused([report(0, 0, [5], [2]), report(1, 1, [5], [3])]).reason
    assert torn == "iteration 5: expert layers.0.experts.0 has no iteration that ranks 0, 1 all hold"


def test_a_missing_newer_iteration_falls_back_to_an_older_one() -> None:
    lacking = report(1, 1, [5, 6])
    lacking = replace(lacking, captures=tuple(r for r in lacking.captures if r.key != (DENSE, 6)))
    assert planned([report(0, 0, [5, 6]), lacking]).iteration == 5


# -- one plan on all ranks ------------------------------------------------------------------------------------


def test_the_plan_does_not_depend_on_the_order_of_reports() -> None:
    reports = [report(0, 0, [5, 6], [2]), report(0, 1, [5], [2]), report(1, 1, [5, 6], [2, 3]), report(1, 0, [6], [2])]
    digests = {planned(order).digest for order in (reports, reports[::-1], reports[2:] + reports[:2])}
    assert len(digests) == 1


def test_plans_that_differ_have_different_digests() -> None:
    assert planned(everywhere([5])).digest != planned(everywhere([6])).digest
    assert planned(everywhere([5])).digest != planned(everywhere([5], [1])).digest
