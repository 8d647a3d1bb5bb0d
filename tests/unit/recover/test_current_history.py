# SPDX-License-Identifier: Apache-2.0
"""Memory that comes back from a history that did not go on is never mixed with the present (G8)."""

from __future__ import annotations

from functools import reduce

from megatron_moetion.recover.report import ArenaReport, History, Summary, of_history
from megatron_moetion.store.manifest import Branch


def report(node: int, *, lineage: int = 5, stable: int = 10, branches: tuple[Branch, ...] = ()) -> ArenaReport:
    epoch = branches[-1].epoch if branches else 0
    history = History(lineage=lineage, stable=stable, epoch=epoch, branches=branches)
    return ArenaReport(path=f"node{node}", owner=node, history=history)


def of_use(*reports: ArenaReport) -> list[int]:
    summary = reduce(Summary.followed_by, (Summary.of([r]) for r in reports))
    assert summary == Summary.of(reports), "whoever looks at which arenas"
    assert summary.newest is not None
    return [r.owner for r in of_history(reports, summary.newest) if not r.problem]


def test_one_history_stays_as_it_is() -> None:
    began = (Branch(epoch=1, iteration=8, nonce=7),)
    reports = [report(0), report(1, branches=began), report(2, branches=began)]
    assert of_use(*reports) == [0, 1, 2]
    assert list(of_history(reports, reports[1].history)) == reports


def test_a_node_from_before_the_run_began_anew_is_ignored_however_far_it_had_come() -> None:
    old = report(0, lineage=4, stable=900, branches=(Branch(epoch=3, iteration=700, nonce=1),))
    assert of_use(old, report(1), report(2)) == [1, 2]


def test_of_two_recoveries_with_one_number_the_one_that_went_on_counts() -> None:
    cut_short = report(0, stable=8, branches=(Branch(epoch=1, iteration=8, nonce=1),))
    went_on = [report(n, stable=40, branches=(Branch(epoch=1, iteration=6, nonce=2),)) for n in (1, 2)]
    assert of_use(cut_short, *went_on) == [1, 2]
    later = [
        report(n, stable=40, branches=(Branch(epoch=1, iteration=6, nonce=2), Branch(epoch=2, iteration=30, nonce=3)))
        for n in (1, 2)
    ]
    assert of_use(cut_short, *later) == [1, 2]


def test_arenas_that_cannot_be_used_decide_nothing() -> None:
    broken = ArenaReport(path="x", problem="the header does not verify", history=History(lineage=99))
    assert of_use(broken, report(1)) == [1]
    assert Summary.of([broken]).newest is None
