# SPDX-License-Identifier: Apache-2.0
"""Memory that comes back from a history that did not go on is never mixed with the present (G8)."""

from __future__ import annotations

from megatron_moetion.recover.report import ArenaReport, current_history
from megatron_moetion.store.manifest import Branch


def report(node: int, *, lineage: int = 5, stable: int = 10, branches: tuple[Branch, ...] = ()) -> ArenaReport:
    epoch = branches[-1].epoch if branches else 0
    return ArenaReport(
        path=f"node{node}", node=node, owner=node, lineage=lineage, stable=stable, epoch=epoch, branches=branches
    )


def alive(*reports: ArenaReport) -> list[int]:
    return [r.node for r in current_history(reports) if not r.problem]


def test_one_history_stays_as_it_is() -> None:
    began = (Branch(epoch=1, iteration=8, nonce=7),)
    reports = [report(0), report(1, branches=began), report(2, branches=began)]
    assert list(current_history(reports)) == reports
    assert current_history([]) == ()


def test_a_node_from_before_the_run_began_anew_is_ignored_however_far_it_had_come() -> None:
    old = report(0, lineage=4, stable=900, branches=(Branch(epoch=3, iteration=700, nonce=1),))
    assert alive(old, report(1), report(2)) == [1, 2]


def test_of_two_recoveries_with_one_number_the_one_that_went_on_counts() -> None:
    cut_short = report(0, stable=8, branches=(Branch(epoch=1, iteration=8, nonce=1),))
    went_on = [report(n, stable=40, branches=(Branch(epoch=1, iteration=6, nonce=2),)) for n in (1, 2)]
    assert alive(cut_short, *went_on) == [1, 2]
    later = [
        report(n, stable=40, branches=(Branch(epoch=1, iteration=6, nonce=2), Branch(epoch=2, iteration=30, nonce=3)))
        for n in (1, 2)
    ]
    assert alive(cut_short, *later) == [1, 2]


def test_arenas_that_cannot_be_used_decide_nothing() -> None:
    broken = ArenaReport(path="x", node=9, problem="the header does not verify", lineage=99)
    assert alive(broken, report(1)) == [1]
    assert [r.problem for r in current_history([broken])] == [broken.problem]
