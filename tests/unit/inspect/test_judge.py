# SPDX-License-Identifier: Apache-2.0
"""What arenas add up to, with all nodes at hand and without some."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from support import identity

from megatron_moetion.inspect.judge import CHOOSE, Copy, judge
from megatron_moetion.modes.exact import ExactMode
from megatron_moetion.modes.full import FullMode
from megatron_moetion.modes.popularity import PopularityMode
from megatron_moetion.store.manifest import Branch, Page, Record
from megatron_moetion.store.spec import ArenaSpec
from megatron_moetion.units import UnitKind

FULL = (("dense", UnitKind.DENSE, 64), ("host", UnitKind.HOST, 64))
EXPERTS = (*FULL, ("experts.0", UnitKind.EXPERT, 64), ("experts.1", UnitKind.EXPERT, 64))
EXACT = (*FULL, ("dense.grad", UnitKind.LOG, 64))


def copy(
    owner: int,
    node: int,
    captures: Sequence[tuple[int, int] | tuple[int, int, int]],
    units: Sequence[tuple[str, UnitKind, int]] = FULL,
    page: Page | None = None,
    epoch: int = 0,
    **changes: Any,
) -> Copy:
    """A copy with these captures: unit, iteration and perhaps tokens."""
    fields = {"world_size": 2, "mode": "full", "owner": owner, **changes}
    spec = ArenaSpec(identity=identity(**fields), units=tuple((n, int(k), b) for n, k, b in units), slots=((64, 99),))
    records = [
        Record(unit=c[0], iteration=c[1], epoch=epoch, slot=i, nbytes=64, digest=7, tokens=c[2] if len(c) > 2 else 0)
        for i, c in enumerate(captures)
    ]
    base = page if page is not None else Page(stable=1, lineage=5)
    return Copy.of(node, spec, Page(**{**vars(base), "records": tuple(records)}))


def whole(*iterations: int) -> list[tuple[int, int]]:
    return [(unit, i) for i in iterations for unit in (0, 1)]


def test_choices_are_those_of_the_modes() -> None:
    modes = {"full": FullMode, "popularity": PopularityMode, "exact": ExactMode}
    assert {name: mode.choose for name, mode in modes.items()} == dict(CHOOSE)


def test_both_ranks_on_both_nodes() -> None:
    found = judge([copy(r, n, whole(1, 2)) for r in (0, 1) for n in (0, 1)])
    assert (found.iteration, found.newest, found.missing, found.reason) == (2, 2, (), None)
    assert [(r.rank, r.reaches, r.complete) for r in found.ranks] == [(0, (2, 1), 2), (1, (2, 1), 2)]
    assert found.least_copies == 2


def test_the_slowest_copy_counts() -> None:
    found = judge([copy(0, 0, whole(1, 2)), copy(0, 1, whole(1)), copy(1, 1, whole(1, 2))])
    assert found.iteration == 2
    assert [r.complete for r in found.ranks] == [1, 1]


def test_a_rank_without_a_copy_is_missing() -> None:
    found = judge([copy(1, 0, whole(1, 2))])
    assert (found.missing, found.iteration, found.least_copies) == ((0,), 2, 0)


def test_ranks_that_have_no_iteration_in_common() -> None:
    found = judge([copy(0, 0, whole(1)), copy(1, 1, whole(2))])
    assert (found.iteration, found.newest, found.missing) == (-1, 2, ())
    assert found.reason == "there is no iteration of which every rank that is here has its host state"
    found = judge([copy(0, 0, whole(2)), copy(1, 1, [(1, 2)])])
    assert found.reason == "iteration 2: rank 1 has no copy of dense"


def test_parts_on_two_nodes_make_one_state() -> None:
    found = judge([copy(0, 0, [(0, 2)]), copy(0, 1, [(1, 2)]), copy(1, 1, whole(2))])
    assert found.iteration == 2
    assert [r.complete for r in found.ranks] == [0, 1]


def test_a_history_that_did_not_go_on_and_other_settings_are_of_no_use() -> None:
    old = copy(0, 0, whole(8), page=Page(stable=7, lineage=4))
    other = copy(0, 2, whole(9), mode="exact", period=4)
    found = judge([copy(0, 1, whole(2)), copy(1, 1, whole(2)), old, other])
    assert found.iteration == 2
    assert [j.problem for j in found.copies] == [
        None,
        None,
        "belongs to a history of this run that did not go on",
        "is of other settings: mode 'exact' instead of 'full', period 4 instead of 0",
    ]


def test_captures_that_a_recovery_went_back_before_do_not_count() -> None:
    page = Page(stable=3, lineage=5, epoch=1, branches=(Branch(epoch=1, iteration=3),))
    found = judge([copy(r, 0, whole(3, 4), page=page) for r in (0, 1)])
    assert (found.iteration, found.newest) == (3, 3)
    assert [j.captured for j in found.copies] == [2, 2]


def test_an_unhealthy_iteration_is_the_last_resort() -> None:
    copies = [copy(r, 0, whole(2, 3)) for r in (0, 1)]
    assert judge(copies, vetoed={3}).iteration == 2
    assert judge(copies, vetoed={2, 3}).iteration == 3


def test_a_chain_must_be_whole() -> None:
    base = [(0, 1), (1, 1), (1, 2), (1, 3)]
    changes = {"units": EXACT, "mode": "exact", "period": 4}
    found = judge([copy(r, 0, [*base, (2, 2), (2, 3)], **changes) for r in (0, 1)])
    assert (found.iteration, found.ranks[0].reaches) == (3, (3, 2, 1))
    found = judge([copy(0, 0, [*base, (2, 2), (2, 3)], **changes), copy(1, 0, [*base, (2, 3)], **changes)])
    assert (found.iteration, found.ranks[1].reaches) == (1, (1,))


def test_staleness_counts_from_the_recovered_iteration() -> None:
    captures = [(0, 10), (1, 10), (2, 10, 1000), (3, 4, 160), (3, 8, 400)]
    found = judge([copy(0, 0, captures, units=EXPERTS, mode="popularity", world_size=1)])
    stale = found.staleness
    assert stale is not None
    assert (stale.experts, stale.longest, stale.mean) == (2, 2, 1.0)
    assert stale.tokens_at_risk == 2 * (400 - 160) / (8 - 4)
    assert stale.iterations_at_risk == pytest.approx(120 / (1000 / 10 + 60))
    assert [(e.name, e.iteration, e.at_risk) for e in stale.stalest] == [("experts.1", 8, 120.0)]


def test_shared_experts_are_as_old_as_their_oldest_shard() -> None:
    mine = [(0, 10), (1, 10), (2, 6, 60), (2, 10, 100), (3, 10, 50)]
    theirs = [(0, 10), (1, 10), (2, 6, 30), (2, 8, 40), (3, 10, 50)]
    changes = {"units": EXPERTS, "mode": "popularity"}
    found = judge([copy(0, 0, mine, **changes), copy(1, 1, theirs, **changes)])
    assert found.staleness is not None
    assert [(e.name, e.iteration, e.at_risk) for e in found.staleness.stalest] == [("experts.0", 6, 4 * (10 + 5))]
    theirs.remove((2, 6, 30))  # both have some, and none in common
    lacking = judge([copy(0, 0, mine, **changes), copy(1, 1, theirs, **changes)])
    assert lacking.iteration == -1
    assert "that all its shards have" in str(lacking.reason)


def test_nothing_is_here() -> None:
    found = judge([])
    assert (found.identity, found.iteration, found.least_copies) == (None, -1, 0)


def test_fragments_count_where_there_are_enough_of_them() -> None:
    """Of two and one: what three are worth, two, and one alone. A page tells only digests of fragments."""

    def fragments(count: int) -> list[Copy]:
        return [copy(0, n, whole(1, 2), fragment=n, data=2, parity=1) for n in range(1, count + 1)]

    other = [copy(1, 9, whole(1, 2))]
    for count, complete in ((3, 2), (2, 1)):
        found = judge([*fragments(count), *other])
        assert (found.iteration, found.least_copies) == (2, 1)
        assert [rank.complete for rank in found.ranks] == [complete, 1]
    found = judge([*fragments(1), *other])
    assert (found.iteration, found.missing, found.least_copies) == (2, (0,), 0)
    assert judge([copy(0, 0, whole(1, 2)), *fragments(3), *other]).ranks[0].complete == 3


def test_a_node_counts_once_whatever_it_has_of_a_rank() -> None:
    """A whole copy and a fragment, two fragments, fragments of two codings: of a recovery that failed halfway."""

    def held(*places: tuple[int, int], data: int = 2) -> list[Copy]:
        return [copy(0, node, whole(1, 2), fragment=n, data=data, parity=1) for node, n in places]

    def complete(*copies: Copy) -> int:
        return judge([*copies, copy(1, 9, whole(1, 2))]).ranks[0].complete

    apart = held((1, 1), (2, 2), (3, 3))
    assert complete(*apart) == 2
    assert complete(*held((1, 1), (1, 2), (2, 3))) == 1, "without the first node there is one fragment of two"
    assert complete(copy(0, 1, whole(1, 2)), *apart) == 2, "one node has both, and the others have two fragments"
    assert complete(*apart, *held((2, 1), (3, 2), (4, 3), (5, 4), data=3)) == 2, "nodes 2 and 3 have both kinds"
