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


def of_nodes(num_nodes: int, replicas: int, domains: list[str] | None = None) -> Placement:
    return place([str(n) for n in range(num_nodes)], replicas, domains or ())


def survives(placement: Placement, lost: set[int]) -> bool:
    """By looking at every rank."""
    node_of = placement.node_of
    return all(any(node_of[r] not in lost for r in (o, *held)) for o, held in enumerate(placement.holders))


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


@given(st.integers(0, 3), st.integers(0, 6), st.booleans(), st.data())
def test_every_set_of_lost_nodes(replicas: int, more: int, has_domains: bool, data: st.DataObject) -> None:
    nodes = replicas + 1 + more
    names = st.lists(st.sampled_from("abc"), min_size=nodes, max_size=nodes)
    placement = of_nodes(nodes, replicas, data.draw(names) if has_domains else None)
    for lost in range(nodes + 1):
        kept = sum(survives(placement, set(some)) for some in combinations(range(nodes), lost))
        assert odds(placement, lost) == Fraction(kept, comb(nodes, lost))


def test_several_ranks_a_node_share_its_fate() -> None:
    alone, shared = of_nodes(5, 1), place([str(r // 4) for r in range(20)], 1)
    assert shown(alone) == shown(shared)


def test_odds_of_more_nodes_than_there_are_are_left_out() -> None:
    assert list(shown(of_nodes(2, 1))) == [1, 2]
    assert shown(of_nodes(3, 0)) == dict.fromkeys((1, 2, 3), Fraction(0))


@given(st.integers(0, 3), st.integers(0, 6), st.data())
def test_every_lost_domain(replicas: int, more: int, data: st.DataObject) -> None:
    nodes = replicas + 1 + more
    switches = data.draw(st.lists(st.sampled_from("abc"), min_size=nodes, max_size=nodes))
    racks = data.draw(st.lists(st.sampled_from("xy"), min_size=nodes, max_size=nodes))
    domains = [f"root/{s}/{r}" for s, r in zip(switches, racks, strict=True)]
    placement, found = of_nodes(nodes, replicas, domains), exposure(of_nodes(nodes, replicas, domains))
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


@pytest.mark.parametrize(
    ("domains", "said", "is_warning"),
    [
        ([], "", False),
        (["r/a"] * 4, "all nodes are in r/a, which placement cannot change", False),
        (["r/a", "r/b", "r/a", "r/b"], "2; no two copies of a state are in one of them", False),
        (["r/a", "r/a", "r/a", "r/b"],
         "the state of 2 of 4 nodes has two copies in one domain, since a domain has more than 2 nodes, one for each "
         "group: nodes 0 and 2 share r/a. The loss of one of these domains would cost state: r/a (2 nodes)", True),
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
