# SPDX-License-Identifier: Apache-2.0
"""What a placement survives: against every set of lost nodes, and against what is published."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moetion.coding import Coding
from megatron_moetion.replicate.placement import Placement, place
from megatron_moetion.replicate.survival import (
    describe,
    describe_domains,
    exposure,
    odds,
    percent,
    shown,
)


def of_nodes(num_nodes: int, replicas: int, domains: list[str] | None = None, coding_nodes: int = 0) -> Placement:
    return place([str(n) for n in range(num_nodes)], replicas, domains or (), coding_nodes)


def survives(placement: Placement, lost: set[int]) -> bool:
    """By looking at every rank: its own node is there, or different parts of its state that are enough."""
    node_of = placement.node_of
    for owner, (holders, parts) in enumerate(zip(placement.holders, placement.parts, strict=True)):
        left = [part for holder, part in zip(holders, parts, strict=True) if node_of[holder] not in lost]
        rebuilt = any(part.is_whole for part in left) or (left and len(set(left)) >= left[0].data)
        if node_of[owner] in lost and not rebuilt:
            return False
    return True


CODES = st.one_of(
    st.integers(0, 3).map(lambda replicas: (replicas, 0)),
    st.integers(2, 3).flatmap(lambda r: st.tuples(st.just(r), st.integers(r + 2, r + 3))),
)
"""Replicas, and the nodes of a group that keep fragments."""


def formula(nodes: int, copies: int, lost: int) -> Fraction:
    """GEMINI, SOSP'23: a lower bound where copies divide nodes, exact while no two groups can be lost."""
    if lost < copies:
        return Fraction(1)
    fatal = Fraction(nodes * comb(nodes - copies, lost - copies), copies * comb(nodes, lost))
    return max(Fraction(0), 1 - fatal)


def test_the_published_figures() -> None:
    assert percent(odds(of_nodes(16, 1), 2)) == "93.3%"
    assert percent(odds(of_nodes(16, 1), 3)) == "80.0%"
    ring = Placement(
        node_of=tuple(range(16)),
        holders=tuple(((n + 1) % 16,) for n in range(16)),
        groups=(tuple(range(16)),),
        coding=Coding(holders=1),
        parts=(),
        domains=((),) * 16,
    )
    assert percent(odds(ring, 2)) == "86.7%"


@pytest.mark.parametrize(("nodes", "replicas"), [(16, 1), (16_384, 1), (12, 2), (3_072, 2), (15, 4)])
def test_the_published_formula(nodes: int, replicas: int) -> None:
    placement = of_nodes(nodes, replicas)
    for lost in range(1, 2 * (replicas + 1)):
        assert odds(placement, lost) == formula(nodes, replicas + 1, lost)
    beyond = 2 * (replicas + 1)
    assert odds(placement, beyond) >= formula(nodes, replicas + 1, beyond)


@given(CODES, st.integers(0, 6), st.booleans(), st.data())
def test_every_set_of_lost_nodes(code: tuple[int, int], more: int, has_domains: bool, data: st.DataObject) -> None:
    replicas, coding_nodes = code
    nodes = (coding_nodes or replicas + 1) + more
    names = st.lists(st.sampled_from("abc"), min_size=nodes, max_size=nodes)
    placement = of_nodes(nodes, replicas, data.draw(names) if has_domains else None, coding_nodes)
    for lost in range(nodes + 1):
        kept = sum(survives(placement, set(some)) for some in combinations(range(nodes), lost))
        assert odds(placement, lost) == Fraction(kept, comb(nodes, lost))


def test_several_ranks_a_node_share_its_fate() -> None:
    alone, shared = of_nodes(5, 1), place([str(r // 4) for r in range(20)], 1)
    assert shown(alone) == shown(shared)


def test_odds_of_more_nodes_than_there_are_are_left_out() -> None:
    assert list(shown(of_nodes(2, 1))) == [1, 2]
    assert shown(of_nodes(3, 0)) == dict.fromkeys((1, 2, 3), Fraction(0))


@given(CODES, st.integers(0, 6), st.data())
def test_every_lost_domain(code: tuple[int, int], more: int, data: st.DataObject) -> None:
    replicas, coding_nodes = code
    nodes = (coding_nodes or replicas + 1) + more
    switches = data.draw(st.lists(st.sampled_from("abc"), min_size=nodes, max_size=nodes))
    racks = data.draw(st.lists(st.sampled_from("xy"), min_size=nodes, max_size=nodes))
    domains = [f"root/{s}/{r}" for s, r in zip(switches, racks, strict=True)]
    placement = of_nodes(nodes, replicas, domains, coding_nodes)
    found = exposure(placement)
    depth = len(found.around) + 1
    inside = {d[:k]: {n for n, e in enumerate(placement.domains) if e[:k] == d[:k]}
              for d in placement.domains for k in range(depth, len(d) + 1)}  # fmt: skip
    assert {d for d, _ in found.fatal} == {d for d, lost in inside.items() if not survives(placement, lost)}
    outermost = [lost for d, lost in inside.items() if len(d) == depth]
    assert found.domains == len(outermost)
    if outermost:
        assert found.odds == Fraction(sum(survives(placement, lost) for lost in outermost), len(outermost))


def test_a_line_says_the_groups_and_the_odds() -> None:
    text = describe(of_nodes(17, 1))
    assert text.startswith("placement: groups of nodes: 7 of 2 and 1 of 3; odds that all state survives lost nodes: ")
    assert text.endswith("100% of 1, 92.6% of 2, 78.2% of 3")


def test_fragments_survive_fewer_sets_of_losses_than_copies_since_their_groups_are_larger() -> None:
    copies, fragments = of_nodes(60, 2), of_nodes(60, 2, coding_nodes=5)
    assert shown(copies)[2] == shown(fragments)[2] == 1
    assert odds(copies, 3) == formula(60, 3, 3) == 1 - Fraction(20, comb(60, 3))
    assert odds(fragments, 3) == 1 - Fraction(12 * comb(5, 3), comb(60, 3))
    assert describe(fragments).startswith("placement: groups of nodes: 12 of 5; odds that all state survives lost")


def test_the_odds_of_the_largest_groups_are_quickly_counted() -> None:
    """A ring of 65 nodes, each of whose states is on the next 32."""
    ring = of_nodes(65, 2, coding_nodes=33)
    assert ring.groups == (tuple(range(65)),)
    assert 0 < shown(ring)[3] < 1


def test_a_line_says_where_fragments_lie_together() -> None:
    text, is_warning = describe_domains(of_nodes(5, 2, ["a", "a", "b", "c", "d"], 5))
    assert is_warning
    assert "has two fragments in one domain" in text
    assert "would cost state" not in text, "any two nodes may be lost"
    assert "would cost state: a (3 nodes)" in describe_domains(of_nodes(5, 2, ["a", "a", "a", "c", "d"], 5))[0]


@pytest.mark.parametrize(
    ("domains", "said", "is_warning"),
    [
        ([], "", False),
        (["r/a"] * 4, "all nodes are in r/a, which placement cannot change", False),
        (["r/a", "r/b", "r/a", "r/b"], "2; no two copies of a state are in one of them", False),
        (["r/a", "r/a", "r/a", "r/b"],
         "the state of 2 of 4 nodes has two copies in one domain, since a domain has more than 2 nodes, one for each "
         "group: nodes 0 and 2 share r/a. The loss of one of these domains would cost state: r/a (2 nodes)", True),
        (["r/a", "", "r/a", "r/b"],
         "those of 3 of 4 nodes are known, so none counts; SLURM says nothing on node(s) 1. Start all ranks by srun, "
         "or give a file with --moetion-failure-domains", True),
        (["p/a", "p/b", "p/c", "q/d"],
         "the state of 2 of 4 nodes has two copies in one domain, since a domain has more than 2 nodes, one for each "
         "group: nodes 0 and 2 share p. The loss of one of these domains would cost state: p (2 nodes)", True),
    ],
)  # fmt: skip
def test_a_line_says_who_shares_what(domains: list[str], said: str, is_warning: bool) -> None:
    text = f"failure domains: {said}" if said else ""
    assert describe_domains(of_nodes(4, 1, domains)) == (text, is_warning)


def test_a_line_names_a_few_of_many() -> None:
    text, is_warning = describe_domains(of_nodes(40, 1, ["a"] * 39 + ["b"]))
    assert is_warning
    assert text.count(" share ") == 4
    assert "; and 15 more. The loss" in text
    assert text.endswith("a (38 nodes)")


@pytest.mark.parametrize(
    ("value", "text"),
    [(Fraction(1), "100%"), (Fraction(0), "0%"), (Fraction(1022, 1023), "99.9%"), (Fraction(9999, 10000), "99.99%"),
     (1 - Fraction(1, 10**9), "99.9999999%"), (Fraction(1, 3), "33.3%")],
)  # fmt: skip
def test_less_than_certain_never_looks_certain(value: Fraction, text: str) -> None:
    assert percent(value) == text
